//! `cargo xtask build`: the agent, with the BPF programs inside, and the CNI plugin.

use anyhow::Result;

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

/// Builds what `selection` selects, for release.
pub(crate) fn release(selection: &[&str]) -> Result<()> {
    Step::new("cargo", "building for release")
        .args(["build", "--release", "--locked"])
        .args(selection)
        .dir(&paths::root())
        .remedy("Read the compiler's first error; where it speaks of the BPF toolchain or of bpf-linker, `cargo xtask setup` looks after them.")
        .run()
}
