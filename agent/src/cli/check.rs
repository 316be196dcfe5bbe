//! `shunt check`.

use std::{fmt, path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::Args;
use serde::Serialize;

use super::{Output, say};
use crate::{
    bpffs,
    preflight::{self, Finding, Level, Places},
};

/// Says whether this node can run the agent, and changes nothing. Needs root to
/// see everything. Exit code 1 when the agent cannot run.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
    shunt check
    shunt check --output json | jq '.findings[] | select(.level != \"ok\")'")]
pub struct Check {
    /// The cgroup v2 directory whose sockets would be redirected [default: the
    /// root of the hierarchy, found in /proc/self/mounts]
    #[arg(long, env = "SHUNT_CGROUP", value_name = "PATH")]
    cgroup: Option<PathBuf>,
    /// Where maps would be pinned
    #[arg(long, env = "SHUNT_BPFFS", value_name = "PATH", default_value = bpffs::DEFAULT_DIR)]
    bpffs: PathBuf,
    /// How to write the answer
    #[arg(long, env = "SHUNT_OUTPUT", value_enum, default_value_t)]
    output: Output,
}

/// The answer.
#[derive(Serialize)]
struct Answer {
    /// Whether the agent can run here.
    can_run: bool,
    findings: Vec<Finding>,
}

impl Check {
    /// Looks at everything and prints what was found.
    ///
    /// # Errors
    ///
    /// When the answer cannot be written.
    pub fn run(&self) -> Result<ExitCode> {
        let findings = preflight::all(&Places {
            cgroup: self.cgroup.clone(),
            bpffs: self.bpffs.clone(),
        });
        let can_run = findings.iter().all(|one| one.level < Level::Failure);
        let answer = Answer { can_run, findings };
        match self.output {
            Output::Json => {
                say(&serde_json::to_string_pretty(&answer).context("cannot write JSON")?)?;
            }
            Output::Text => say(&Text(&answer))?,
        }
        Ok(if can_run {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }
}

/// An answer as people read it.
struct Text<'a>(&'a Answer);

impl fmt::Display for Text<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        for finding in &self.0.findings {
            let level = match finding.level {
                Level::Ok => "ok",
                Level::Warning => "WARN",
                Level::Failure => "FAIL",
            };
            writeln!(out, "{level:<5} {:<14} {}", finding.subject, finding.found)?;
            if !finding.remedy.is_empty() {
                writeln!(out, "{:<20} → {}", "", finding.remedy)?;
            }
        }
        out.write_str(if self.0.can_run {
            "shunt can run here"
        } else {
            "shunt cannot run here"
        })
    }
}
