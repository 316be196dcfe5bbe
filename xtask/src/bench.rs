//! `cargo xtask bench`: what redirection costs, side by side.

use std::convert::Infallible;

use anyhow::Result;

use crate::{
    build, env,
    exec::Step,
    paths,
    setup::{self, Use},
};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Within three minutes: fewer ways and rounds, through the minimal proxy alone
    #[arg(long)]
    quick: bool,
    /// These parts and no others, separated by commas: requests, bulk, connect, connections,
    /// memory; envoy for two Envoys in place of the minimal proxies; outside, enrolling, open
    #[arg(long, value_name = "PARTS")]
    only: Option<String>,
}

/// Does not return but by an error: it becomes the benchmark, so that Ctrl-C is
/// the benchmark's own, which then cleans up.
pub(crate) fn command(arguments: &Arguments) -> Result<Infallible> {
    paths::require_root(
        "bench",
        "the benchmark needs root because it makes network namespaces and loads BPF programs",
    )?;
    setup::ensure(&[Use::Build, Use::Tests, Use::Bench])?;
    build::agent_and("bench")?;
    let Arguments { quick, only } = arguments;
    // What is kept in the repository is the whole.
    let out = if *quick || only.is_some() {
        paths::target().join("bench")
    } else {
        paths::root().join("docs")
    };
    let mut step = Step::new(paths::release("bench"), "starting the benchmark")
        .arg("--out")
        .arg(out);
    if *quick {
        step = step.arg("--quick");
    }
    if let Some(parts) = only {
        step = step.arg("--only").arg(parts);
    }
    env::with_tests(step)?.replace_self()
}
