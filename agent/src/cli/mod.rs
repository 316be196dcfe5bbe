//! The subcommands, one file each.

pub mod check;
pub mod enroll;
pub mod explain;
pub mod run;
pub mod status;

use std::{
    io::{ErrorKind, IsTerminal as _, Write as _},
    path::Path,
    process::ExitCode,
};

use anyhow::{Context as _, Result};
use tracing_subscriber::EnvFilter;

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

/// Starts the log, on stderr; `SHUNT_LOG` says how much of it (`info`, `debug`,
/// `shunt=trace`).
pub fn start_logs() {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_env_filter(EnvFilter::try_from_env("SHUNT_LOG").unwrap_or_else(|_| "info".into()))
        .init();
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
