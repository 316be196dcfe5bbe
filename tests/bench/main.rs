//! What redirection costs: side by side, on one machine, in interleaved rounds.
//!
//! `cargo xtask bench` builds and runs it.
#![expect(
    unused_crate_dependencies,
    reason = "these are the dependencies of the harness"
)]
#![expect(clippy::print_stdout, reason = "it is there to be watched")]

mod bars;
mod chart;
mod figures;
mod load;
mod machine;
mod memory;
mod others;
mod proxy;
mod report;
mod role;
mod rounds;
mod server;
mod stats;
mod world;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use anyhow::Context as _;
use clap::{Parser, ValueEnum};
use shunt_tests::interrupt::Interrupt;

use machine::Machine;
use report::Report;
use role::Cores;
use rounds::Effort;
use world::{Kind, Site, Way};

#[derive(Debug, Parser)]
struct Arguments {
    /// Fewer ways, rounds and figures
    #[arg(long)]
    quick: bool,
    /// Nothing but these parts
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// The directory for benchmarks.md, benchmarks.json and benchmarks.svg
    #[arg(long)]
    out: PathBuf,
}

/// What can be measured by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Requests on a kept connection.
    Requests,
    /// Bytes in one second.
    Bulk,
    /// The time that connect() takes.
    Connect,
    /// Connections in one second.
    Connections,
    /// Kernel memory for an open connection.
    Memory,
    /// All of these, through two Envoys.
    Envoy,
}

impl Arguments {
    /// Whether this is one of the parts to measure.
    fn wants(&self, part: Part) -> bool {
        let parts = || self.only.iter().filter(|&&part| part != Part::Envoy);
        parts().next().is_none() || parts().any(|&wanted| wanted == part)
    }

    /// Through which proxies.
    fn kinds(&self) -> Vec<Kind> {
        if self.only.contains(&Part::Envoy) {
            vec![Kind::Envoy]
        } else if self.quick || !self.only.is_empty() {
            vec![Kind::Minimal]
        } else {
            vec![Kind::Minimal, Kind::Envoy]
        }
    }

    fn effort(&self) -> &'static Effort {
        if self.quick {
            &Effort::QUICK
        } else {
            &Effort::FULL
        }
    }
}

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    if words.next().as_deref() == Some(role::ARGUMENT) {
        return outcome(role::play(&words.next().unwrap_or_default()));
    }
    let arguments = Arguments::parse();
    shunt_tests::require_root();
    match run(&arguments, &Interrupt::watch()) {
        Err(Interrupted) => {
            println!("\nInterrupted: everything is cleaned up, nothing is written.");
            ExitCode::from(130)
        }
        Ok(report) => outcome(write(&report, &arguments.out)),
    }
}

#[expect(clippy::print_stderr, reason = "an error is for a terminal")]
fn outcome(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Somebody wants it to end before its end.
#[derive(Debug)]
struct Interrupted;

/// Ends here when somebody wants that.
fn go_on(interrupt: &Interrupt) -> Result<(), Interrupted> {
    if interrupt.is_wanted() {
        return Err(Interrupted);
    }
    Ok(())
}

/// Everything that is made here undoes itself when this returns, in whichever
/// way.
fn run(arguments: &Arguments, interrupt: &Interrupt) -> Result<Report, Interrupted> {
    let start = Instant::now();
    let mut report = Report::new(Machine::this(), arguments.effort().to_string());
    println!("{}", report.machine);
    let cores = Cores::choose();
    for kind in arguments.kinds() {
        println!("Setting up the ways, {}:", kind.name());
        let mut sites = Vec::new();
        for way in ways(arguments.quick, &mut report) {
            go_on(interrupt)?;
            println!("  {}", way.name());
            sites.push(Site::start(way, kind, cores));
        }
        let wanted = |part| arguments.wants(part);
        rounds::measure(&sites, arguments.effort(), wanted, interrupt, &mut report)?;
    }
    println!("Measured in {} s.\n", start.elapsed().as_secs());
    println!("{}", report.markdown());
    Ok(report)
}

/// What is compared; says what is left out.
fn ways(quick: bool, report: &mut Report) -> Vec<Way> {
    let shunt = world::shunt_ways();
    if shunt.len() == 1 {
        report.note(
            "This agent does not know `--splice`: its modes `proxy` and `all` are left out, \
             and what it does is called \"shunt off\".",
        );
    }
    let mut ways = vec![
        Way::Direct,
        Way::Explicit,
        Way::Iptables("iptables-nft-restore"),
    ];
    if !quick {
        ways.extend([Way::Iptables("iptables-legacy-restore"), Way::Nftables]);
    }
    ways.extend(shunt);
    ways
}

/// Writes the report into three files.
fn write(report: &Report, directory: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(directory)
        .with_context(|| format!("cannot make the directory {}", directory.display()))?;
    let files = [
        ("md", report.document()),
        ("json", serde_json::to_string_pretty(report)? + "\n"),
        ("svg", chart::draw(report)?),
    ];
    for (kind, text) in files {
        let path = directory.join("benchmarks").with_extension(kind);
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        println!("wrote {}", path.display());
    }
    Ok(())
}
