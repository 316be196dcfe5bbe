//! The Helm chart: checked by `cargo xtask lint`, made into plain manifests by
//! `cargo xtask manifests`. What is checked is in `deploy/chart.py`, because Helm's
//! library and Kubernetes' schemas are packages of Python.

use anyhow::Result;

use crate::{
    exec::Step,
    paths, say,
    setup::{self, Use},
};

/// `cargo xtask manifests`.
pub(crate) fn command() -> Result<()> {
    setup::ensure(&[Use::Chart])?;
    say(program("write", "writing the manifests")?.output()?.trim());
    Ok(())
}

/// The lint of the chart.
pub(crate) fn check() -> Result<()> {
    let step = program("check", "checking the chart")?
        .remedy("Repair deploy/chart, or deploy/chart.py where it is the check that is old.");
    // Helm's library writes remarks to standard error.
    say(step.output()?.trim());
    Ok(())
}

fn program(task: &str, purpose: &str) -> Result<Step> {
    Ok(Step::new("python3", purpose)
        .arg(paths::root().join("deploy/chart.py"))
        .arg(task)
        .env("PYTHONPATH", setup::helm()?)
        .env("PYTHONDONTWRITEBYTECODE", "1"))
}
