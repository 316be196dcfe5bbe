//! `shunt status`.
#![expect(clippy::print_stdout, reason = "this is the command's answer")]

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use clap::Args;

use super::{Output, ask};
use crate::{
    control::{Reply, Request},
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
                let json = serde_json::to_string_pretty(&status).context("cannot write JSON")?;
                println!("{json}");
            }
            Output::Text => print(&status),
        }
        Ok(())
    }
}

fn print(status: &Status) {
    println!("shunt {}", status.version);
    println!("programs");
    for program in &status.programs {
        let place = program.attached_to.as_deref().unwrap_or("-");
        println!("  {:<18} id {:<6} {place}", program.name, program.id);
    }
    println!("pods: {}", status.pods.len());
    for pod in &status.pods {
        print_pod(pod);
    }
}

fn print_pod(pod: &PodStatus) {
    let settings = &pod.settings;
    println!("  {} (netns cookie {})", pod.netns.display(), pod.cookie);
    println!(
        "    outbound port {}, inbound port {}, proxy uids {:?}, gids {:?}",
        settings.outbound_port,
        settings.inbound_port,
        settings.proxy_uids.as_slice(),
        settings.proxy_gids.as_slice()
    );
    for (rule, count) in &pod.counters.rules {
        println!("    {rule:<28} {count}");
    }
    for (error, count) in &pod.counters.errors {
        println!("    error {error:<22} {count}");
    }
}
