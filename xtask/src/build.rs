//! `cargo xtask build`: the agent, with the BPF programs inside, and the CNI plugin.

use std::fs;

use anyhow::{Context as _, Result};

use crate::{
    exec::Step,
    paths, say,
    setup::{self, Use},
};

pub(crate) fn command() -> Result<()> {
    setup::ensure(&[Use::Build])?;
    agent()?;
    say(format!("built {}", paths::release("shunt").display()));
    Ok(())
}

/// Builds the agent and the CNI plugin for release.
pub(crate) fn agent() -> Result<()> {
    release(&["--package", "shunt", "--bins"])
}

/// Builds the agent, and the program of the tests that shows or measures it.
pub(crate) fn agent_and(program: &str) -> Result<()> {
    let packages = ["--package", "shunt", "--package", "shunt-tests"];
    release(&[&packages[..], &["--bin", "shunt", "--bin", program]].concat())
}

/// Builds the agent with another layout of maps, for the tests of upgrades, and keeps it
/// at [`paths::other_agent`]. cargo puts both in one place: this one has to be first.
pub(crate) fn other_agent() -> Result<()> {
    release(&[
        "--package",
        "shunt",
        "--bin",
        "shunt",
        "--features",
        "other-layout",
    ])?;
    let (built, kept) = (paths::release("shunt"), paths::other_agent());
    // A program that runs cannot be written to, but replaced.
    let aside = kept.with_extension("new");
    fs::copy(&built, &aside)
        .and_then(|_| fs::rename(&aside, &kept))
        .with_context(|| format!("keeping {} as {}", built.display(), kept.display()))
}

/// Builds what `selection` selects, for release.
pub(crate) fn release(selection: &[&str]) -> Result<()> {
    Step::new("cargo", "building for release")
        .args(["build", "--release", "--locked"])
        .args(selection)
        .dir(&paths::root())
        .remedy("Read the compiler's first error; where it speaks of the BPF toolchain or of bpf-linker, `cargo xtask setup` looks after them.")
        .run()
}
