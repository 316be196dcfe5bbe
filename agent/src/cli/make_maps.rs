//! `shunt make-maps`: what the agent has another process do ([`crate::datapath::maps`]).

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::datapath::maps::{self, AT, MAP_LIMIT, MapLimit};

/// Makes the maps outside of every memory cgroup. The agent calls it.
#[derive(Args, Clone, Debug)]
pub struct MakeMaps {
    /// Where they are pinned
    #[arg(long = AT, value_name = "PATH")]
    dir: PathBuf,
    /// Gives a map another size
    #[arg(long = MAP_LIMIT, value_name = "NAME=ENTRIES")]
    limits: Vec<MapLimit>,
}

impl MakeMaps {
    /// Makes them.
    ///
    /// # Errors
    ///
    /// When this process may not leave its memory cgroup, or the kernel refuses a map.
    pub fn run(&self) -> Result<()> {
        maps::make(&self.dir, &self.limits)
    }
}
