//! cargo-deny, for the lints.

use anyhow::Result;

use crate::exec::{Step, find_program};

const VERSION: &str = "0.20.2";

pub(crate) fn is_missing() -> bool {
    find_program("cargo-deny").is_none()
}

pub(crate) fn install() -> Result<()> {
    Step::new("cargo", "building cargo-deny")
        .args(["install", "cargo-deny", "--locked", "--version", VERSION])
        // Compiled in half the time; its check takes a second either way.
        .arg("--debug")
        .remedy("Check the network.")
        .run()
}
