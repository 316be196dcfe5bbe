//! What becomes of redirection when the agent ends.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::{
    datapath::Afterwards,
    node::{DEFAULT_STATE_DIR, Store},
};

/// What becomes of redirection when the agent ends.
#[derive(Args, Clone, Debug)]
pub(super) struct PersistFlags {
    /// Leaves redirection in force when the agent ends, however it ends; the next one
    /// takes it over, and `shunt uninstall` ends it [always with --kubernetes]
    #[arg(
        long,
        env = "SHUNT_PERSISTENT",
        value_parser = clap::builder::BoolishValueParser::new()
    )]
    persistent: bool,
    /// Where enrolments are saved for the next agent, with --persistent
    #[arg(
        long,
        env = "SHUNT_STATE_DIR",
        value_name = "PATH",
        default_value = DEFAULT_STATE_DIR
    )]
    pub(super) state_dir: PathBuf,
    /// Takes everything away from the node, as `shunt uninstall` does, when the agent is
    /// stopped by SIGTERM or SIGINT
    #[arg(
        long,
        env = "SHUNT_UNINSTALL_ON_STOP",
        value_parser = clap::builder::BoolishValueParser::new()
    )]
    pub(super) uninstall_on_stop: bool,
}

impl PersistFlags {
    /// What becomes of everything, and where enrolments are saved.
    pub(super) fn store(&self, kubernetes: bool) -> Result<(Afterwards, Option<Store>)> {
        if self.persistent || kubernetes {
            Ok((Afterwards::Stays, Some(Store::open(&self.state_dir)?)))
        } else {
            Ok((Afterwards::Nothing, None))
        }
    }
}
