//! `shunt make-maps`: what the agent has another process do ([`crate::datapath::maps`]).

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use clap::Args;
use nix::{
    sys::{prctl::set_pdeathsig, signal::Signal},
    unistd::{Pid, getppid},
};

use crate::datapath::maps::{self, AGENT, AT, MAP_LIMIT, MapLimit};

/// Makes the maps of connections outside of every memory cgroup. The agent calls it.
#[derive(Args, Clone, Debug)]
pub struct MakeMaps {
    /// The number of the agent, without which it ends
    #[arg(long = AGENT, value_name = "PID")]
    agent: i32,
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
    /// When this process may not leave its memory cgroup, the kernel refuses a map, or the
    /// agent has ended.
    pub fn run(&self) -> Result<()> {
        self.end_with_the_agent()?;
        maps::make(&self.dir, &self.limits)
    }

    /// Whoever ends the agent's cgroup does not end this process, and the next agent would meet
    /// it at the same pins.
    fn end_with_the_agent(&self) -> Result<()> {
        set_pdeathsig(Signal::SIGKILL).context("cannot ask to end with the agent")?;
        // It may have ended before.
        if getppid() != Pid::from_raw(self.agent) {
            bail!(
                "process {} did not start this one; the agent does",
                self.agent
            );
        }
        Ok(())
    }
}
