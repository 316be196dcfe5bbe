//! `cargo xtask demo`: the main job, shown.

use std::convert::Infallible;

use anyhow::Result;

use crate::{
    build, env,
    exec::Step,
    paths,
    setup::{self, Use},
};

/// What `cargo xtask demo` takes.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Leave everything as it is, and give a shell that knows the pods; it goes when that ends
    #[arg(long)]
    stay: bool,
}

/// Does not return but by an error: it becomes the demo, so that Ctrl-C is the
/// demo's own, which then cleans up.
pub(crate) fn command(arguments: &Arguments) -> Result<Infallible> {
    paths::require_root(
        "demo",
        "the demo needs root because it makes network namespaces and loads BPF programs",
    )?;
    setup::ensure(&[Use::Build, Use::Tests])?;
    build::agent_and("demo")?;
    let demo = Step::new(paths::release("demo"), "starting the demo")
        .args(arguments.stay.then_some("--stay"));
    env::with_tests(demo)?.replace_self()
}
