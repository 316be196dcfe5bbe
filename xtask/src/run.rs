//! `cargo xtask run`: the agent, on this machine.

use std::convert::Infallible;

use anyhow::Result;

use crate::{
    build,
    exec::Step,
    paths,
    setup::{self, Use},
    target::Target,
};

/// What `cargo xtask run` takes.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// What `shunt run` is given, such as --splice auto
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

/// Does not return but by an error: it becomes the agent, so that Ctrl-C is the
/// agent's own, which then detaches.
pub(crate) fn command(arguments: &Arguments) -> Result<Infallible> {
    paths::require_root(
        "run",
        "the agent needs root because it loads BPF programs and attaches them",
    )?;
    setup::ensure(&[Use::Build])?;
    build::agent(&Target::Native)?;
    Step::new(paths::release("shunt"), "starting the agent")
        .arg("run")
        .args(&arguments.arguments)
        .replace_self()
}
