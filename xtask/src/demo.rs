//! `cargo xtask demo`: the main job, shown.

use std::convert::Infallible;

use anyhow::Result;

use crate::{
    build, env,
    exec::Step,
    paths,
    setup::{self, Use},
};

/// Does not return but by an error: it becomes the demo, so that Ctrl-C is the
/// demo's own, which then cleans up.
pub(crate) fn command() -> Result<Infallible> {
    paths::require_root(
        "demo",
        "the demo needs root because it makes network namespaces and loads BPF programs",
    )?;
    setup::ensure(&[Use::Build, Use::Tests])?;
    build::agent_and("demo")?;
    env::with_tests(Step::new(paths::release("demo"), "starting the demo"))?.replace_self()
}
