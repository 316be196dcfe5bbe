//! `cargo xtask env`: where things are.

use std::path::PathBuf;

use anyhow::Result;

use crate::{exec::Step, paths, say, setup, target::Target};

pub(crate) fn command() -> Result<()> {
    say(format!("SHUNT_CACHE={}", paths::cache()?.display()));
    for (name, path) in for_tests()? {
        say(format!("{name}={}", path.display()));
    }
    Ok(())
}

/// What the tests and the demo learn by their environment.
fn for_tests() -> Result<[(&'static str, PathBuf); 3]> {
    Ok([
        ("SHUNT_BIN", paths::release("shunt")),
        ("SHUNT_OTHER_BIN", Target::Native.other_agent()),
        (setup::ENVOY_VARIABLE, setup::envoy()?),
    ])
}

/// `step`, with that environment.
pub(crate) fn with_tests(step: Step) -> Result<Step> {
    let variables = for_tests()?;
    Ok(variables
        .into_iter()
        .fold(step, |step, (name, path)| step.env(name, path)))
}
