//! `cargo xtask build`: the agent, with the BPF programs inside, and the CNI plugin.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result};

use crate::{
    arch::Arch,
    paths, say,
    setup::{self, Use},
    target::Target,
};

/// What `cargo xtask build` takes.
#[derive(clap::Args, Debug)]
pub(crate) struct Arguments {
    /// The processor to build for. What is built for aarch64 is linked statically, and goes to
    /// target/aarch64-unknown-linux-gnu/release
    #[arg(long, value_enum, default_value_t = Arch::X86_64)]
    arch: Arch,
}

pub(crate) fn command(arguments: &Arguments) -> Result<()> {
    let uses: &[Use] = match arguments.arch {
        Arch::X86_64 => &[Use::Build],
        Arch::Aarch64 => &[Use::Build, Use::Aarch64],
    };
    let ready = setup::ensure(uses)?;
    let target = Target::new(arguments.arch, &ready.toolchain);
    agent(&target)?;
    say(format!("built {}", target.release("shunt").display()));
    Ok(())
}

/// Builds the agent and the CNI plugin for release.
pub(crate) fn agent(target: &Target) -> Result<()> {
    release(target, &["--bin", "shunt", "--bin", "shunt-cni"])
}

/// Builds the agent, and the program of the tests that shows or measures it.
pub(crate) fn agent_and(program: &str) -> Result<()> {
    release(&Target::Native, &["--bin", "shunt", "--bin", program])
}

/// Builds the agent with another layout of maps, for the tests of upgrades, and keeps it
/// beside the agent. cargo puts both in one place: this one has to be first.
pub(crate) fn other_agent(target: &Target) -> Result<PathBuf> {
    release(
        target,
        &["--bin", "shunt", "--features", "shunt/other-layout"],
    )?;
    let (built, kept) = (target.release("shunt"), target.other_agent());
    // A program that runs cannot be written to, but replaced.
    let aside = kept.with_extension("new");
    fs::copy(&built, &aside)
        .and_then(|_| fs::rename(&aside, &kept))
        .with_context(|| format!("keeping {} as {}", built.display(), kept.display()))?;
    Ok(kept)
}

/// The packages of every release build. A crate is compiled with the features that all of
/// them want of it: with others from build to build, most crates would be compiled again.
const PACKAGES: [&str; 4] = ["--package", "shunt", "--package", "shunt-tests"];

/// Builds what `selection` selects, for release.
fn release(target: &Target, selection: &[&str]) -> Result<()> {
    target
        .cargo("build", "building for release")
        .args(["--release", "--locked"])
        .args(PACKAGES)
        .args(selection)
        .dir(&paths::root())
        .remedy("Read the compiler's first error; where it speaks of the BPF toolchain or of bpf-linker, `cargo xtask setup` looks after them.")
        .run()
}
