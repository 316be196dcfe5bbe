//! The subcommands, one file each.

pub mod check;
pub mod enroll;
pub mod explain;
pub mod kubernetes;
pub mod make_maps;
pub mod run;
pub mod status;
pub mod uninstall;

use std::{
    io::{ErrorKind, Write as _},
    path::Path,
    process::ExitCode,
};

use anyhow::{Context as _, Result};
use clap::{Arg, Command, builder::Resettable};

use crate::control::{Client, Reply, Request};

/// How a command writes its answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Output {
    /// For people.
    #[default]
    Text,
    /// For programs: one JSON document.
    Json,
}

/// Asks the agent at `socket` once.
fn ask(socket: &Path, request: &Request) -> Result<Reply> {
    tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .context("cannot start the runtime")?
        .block_on(async { Client::connect(socket).await?.ask(request).await })
}

/// Writes a command's answer. A reader that has seen enough (`| head`) is no
/// error.
fn say(text: &impl std::fmt::Display) -> Result<()> {
    match writeln!(std::io::stdout(), "{text}") {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(error).context("cannot write the answer")
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Lets variables that are empty count as unset, as those of the settings do:
/// manifests set them so.
#[must_use]
pub fn without_empty_variables(command: Command) -> Command {
    let is_empty = |arg: &Arg| {
        let text = arg.get_env().and_then(std::env::var_os);
        text.is_some_and(|text| text.to_string_lossy().trim().is_empty())
    };
    command
        .mut_args(|arg| {
            if is_empty(&arg) {
                arg.env(Resettable::Reset)
            } else {
                arg
            }
        })
        .mut_subcommands(without_empty_variables)
}

/// Says why a command failed, and gives its exit code: 2 for a setting that
/// makes no sense, 1 for everything else.
#[expect(clippy::print_stderr, reason = "this is where errors are said")]
pub fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("shunt: {error:#}");
    let is_input = error.chain().any(|cause| {
        cause.is::<crate::settings::SettingsError>()
            || cause.is::<crate::settings::ResolvConfError>()
    });
    ExitCode::from(if is_input { 2 } else { 1 })
}
