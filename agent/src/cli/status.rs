//! `shunt status`.

use std::{fmt, path::Path};

use anyhow::{Context as _, Result, bail};
use clap::Args;

use super::{Output, ask, say};
use crate::{
    control::{Reply, Request},
    datapath::SpliceStatus,
    node::{PodStatus, Status},
};

/// Shows what is enrolled, counted and attached.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
    shunt status
    shunt status --output json | jq '.pods[].counters'")]
pub struct StatusCommand {
    /// How to write the answer
    #[arg(long, env = "SHUNT_OUTPUT", value_enum, default_value_t)]
    output: Output,
}

impl StatusCommand {
    /// Asks the agent and prints the answer.
    ///
    /// # Errors
    ///
    /// When the agent is not to be reached.
    pub fn run(&self, socket: &Path) -> Result<()> {
        let Reply::Status(status) = ask(socket, &Request::Status)? else {
            bail!("the agent answered something else; are it and the command of one version?");
        };
        match self.output {
            Output::Json => {
                say(&serde_json::to_string_pretty(&status).context("cannot write JSON")?)
            }
            Output::Text => say(&Text(&status)),
        }
    }
}

/// A status as people read it.
struct Text<'a>(&'a Status);

impl fmt::Display for Text<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let status = self.0;
        writeln!(out, "shunt {}", status.version)?;
        writeln!(out, "programs")?;
        for program in &status.programs {
            let place = program.attached_to.as_deref().unwrap_or("-");
            writeln!(out, "  {:<18} id {:<6} {place}", program.name, program.id)?;
        }
        write_splice(out, &status.splice)?;
        write!(out, "pods: {}", status.pods.len())?;
        status.pods.iter().try_for_each(|pod| write_pod(out, pod))
    }
}

fn write_splice(out: &mut fmt::Formatter<'_>, splice: &SpliceStatus) -> fmt::Result {
    writeln!(
        out,
        "splicing: {} (asked: {}): {}",
        splice.mode.name(),
        splice.asked.name(),
        splice.reason
    )?;
    for trial in &splice.trials {
        match &trial.failed {
            None => writeln!(
                out,
                "  ok      {:<6} {}",
                trial.needed_for.name(),
                trial.name
            )?,
            Some(why) => {
                writeln!(
                    out,
                    "  failed  {:<6} {}: {why}",
                    trial.needed_for.name(),
                    trial.name
                )?;
            }
        }
    }
    Ok(())
}

fn write_pod(out: &mut fmt::Formatter<'_>, pod: &PodStatus) -> fmt::Result {
    let settings = &pod.settings;
    write!(
        out,
        "\n  {} (netns cookie {})",
        pod.netns.display(),
        pod.cookie
    )?;
    write!(
        out,
        "\n    outbound port {}, inbound port {}, proxy uids {:?}, gids {:?}",
        settings.outbound_port,
        settings.inbound_port,
        settings.proxy_uids.as_slice(),
        settings.proxy_gids.as_slice()
    )?;
    match settings.as_flags() {
        Some(flags) => write!(out, "\n    settings {flags}")?,
        None => write!(out, "\n    settings that no flags give: see --output json")?,
    }
    for (rule, count) in &pod.counters.rules {
        write!(out, "\n    {rule:<28} {count}")?;
    }
    let splice = &pod.counters.splice;
    if splice.messages > 0 {
        write!(
            out,
            "\n    spliced messages             {}\n    spliced bytes                {}",
            splice.messages, splice.bytes
        )?;
    }
    for (why, count) in &splice.fallbacks {
        write!(out, "\n    by TCP {why:<21} {count}")?;
    }
    for (error, count) in &pod.counters.errors {
        write!(out, "\n    error {error:<22} {count}")?;
    }
    Ok(())
}
