//! `cargo xtask lint`: what a change has to satisfy besides the tests.

use std::process::ExitCode;

use anyhow::Result;

use crate::{
    chart, complain,
    exec::Step,
    paths, say,
    setup::{self, Toolchain, Use},
};

/// Runs every lint, also after one that failed.
pub(crate) fn command() -> Result<ExitCode> {
    let ready = setup::ensure(&[Use::Build, Use::Lint, Use::Chart])?;
    let lints = [
        format(),
        clippy_host(),
        clippy_bpf(&ready.toolchain),
        rustdoc(),
        deny(),
    ];
    let root = paths::root();
    let lints = lints.into_iter().map(|lint| lint.dir(&root).run());
    let mut failed = false;
    // Each is run when it is asked for.
    for done in lints.chain(std::iter::once_with(chart::check)) {
        if let Err(error) = done {
            complain(format!("error: {error:#}"));
            failed = true;
        }
    }
    if failed {
        return Ok(ExitCode::FAILURE);
    }
    say("all lints passed");
    Ok(ExitCode::SUCCESS)
}

fn format() -> Step {
    Step::new("cargo", "checking the formatting")
        .args(["fmt", "--all", "--check"])
        .remedy("Run `cargo fmt --all`.")
}

fn clippy_host() -> Step {
    Step::new("cargo", "linting the crates of the host")
        .args([
            "clippy",
            "--locked",
            "--workspace",
            "--exclude",
            "shunt-programs",
            "--all-targets",
        ])
        .args(["--", "--deny", "warnings"])
        .remedy("Repair what clippy reports above.")
}

/// The programs are linted for their own target, as they are compiled.
fn clippy_bpf(toolchain: &Toolchain) -> Step {
    let target = if cfg!(target_endian = "big") {
        "bpfeb"
    } else {
        "bpfel"
    };
    toolchain
        .cargo("linting the BPF programs")
        .args(["clippy", "--locked", "--package", "shunt-programs", "-Z", "build-std=core"])
        .args(["--target", &format!("{target}-unknown-none")])
        // Its own directory: another compiler, which would have cargo compile
        // again what the other lints have just compiled.
        .arg("--target-dir")
        .arg(paths::target().join("bpf-lint"))
        .args(["--", "--deny", "warnings"])
        .remedy("Repair what clippy reports above; where this toolchain has no clippy: `rustup component add clippy --toolchain nightly`.")
}

fn rustdoc() -> Step {
    Step::new("cargo", "checking the documentation")
        .args([
            "doc",
            "--locked",
            "--workspace",
            "--exclude",
            "shunt-programs",
            "--no-deps",
        ])
        .env("RUSTDOCFLAGS", "--deny warnings")
        .remedy("Repair what rustdoc reports above.")
}

fn deny() -> Step {
    Step::new(
        "cargo",
        "checking licences, duplicates and sources of the dependencies",
    )
    .args(["deny", "--locked", "check", "bans", "licenses", "sources"])
    .remedy(
        "Repair what cargo-deny reports above, or give an exception with its reason in deny.toml.",
    )
}
