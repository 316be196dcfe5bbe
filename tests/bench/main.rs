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
mod client;
mod figures;
mod load;
mod machine;
mod memory;
mod neighbours;
mod open;
mod phases;
mod proxy;
mod report;
mod role;
mod rounds;
mod scheduling;
mod server;
mod stats;
mod times;
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
    /// All of these, or those that are asked for with it, through two Envoys.
    Envoy,
    /// connect() of a process outside the mesh.
    Outside,
    /// The time that it takes to enrol a pod.
    Enrolling,
    /// Connections while many others are open.
    Open,
}

impl Part {
    /// Whether it is measured of every way.
    fn is_of_ways(self) -> bool {
        match self {
            Self::Requests | Self::Bulk | Self::Connect | Self::Connections | Self::Memory => true,
            Self::Envoy | Self::Outside | Self::Enrolling | Self::Open => false,
        }
    }
}

impl Arguments {
    /// Whether this is one of the parts to measure.
    fn wants(&self, part: Part) -> bool {
        let all_of_ways = || !self.only.iter().any(|only| only.is_of_ways());
        if self.only.is_empty() {
            !self.quick || part.is_of_ways()
        } else {
            self.only.contains(&part)
                || part.is_of_ways() && self.only.contains(&Part::Envoy) && all_of_ways()
        }
    }

    /// Through which proxies.
    fn kinds(&self) -> Vec<Kind> {
        if self.only.is_empty() && !self.quick {
            vec![Kind::Minimal, Kind::Envoy]
        } else if self.only.contains(&Part::Envoy) {
            vec![Kind::Envoy]
        } else if self.only.is_empty() || self.only.iter().any(|only| only.is_of_ways()) {
            vec![Kind::Minimal]
        } else {
            Vec::new()
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

/// One line for whoever watches.
fn say(line: std::fmt::Arguments<'_>) {
    println!("{line}");
}

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
    let effort = arguments.effort();
    let mut report = Report::new(Machine::this(), effort.to_string());
    println!("{}", report.machine);
    let cores = Cores::choose();
    let ways = ways(arguments.quick, &mut report);
    let minimal = arguments.kinds().contains(&Kind::Minimal);
    if minimal && arguments.wants(Part::Connect) && !arguments.quick {
        phases::connects(&ways, cores, effort, interrupt, &mut report)?;
    }
    for kind in arguments.kinds() {
        println!("Setting up the ways, {}:", kind.name());
        let mut sites = Vec::new();
        for way in &ways {
            go_on(interrupt)?;
            println!("  {}", way.name());
            match Site::start(*way, kind, cores) {
                Ok(site) => sites.push(site),
                Err(why) => report.note(&format!("Left out, \"{}\": {why}.", way.name())),
            }
        }
        let wanted = |part| arguments.wants(part);
        rounds::measure(&sites, effort, wanted, interrupt, &mut report)?;
    }
    let parts = [Part::Outside, Part::Enrolling].map(|part| arguments.wants(part));
    if parts.contains(&true) {
        let [outside, enrolling] = parts;
        neighbours::measure(outside, enrolling, effort, interrupt, &mut report)?;
    }
    if arguments.wants(Part::Open) {
        open::connections(effort, interrupt, &mut report)?;
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
        ("json", report.json()?),
        ("svg", chart::draw(report)?),
    ];
    for (kind, text) in files {
        let path = directory.join("benchmarks").with_extension(kind);
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        println!("wrote {}", path.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(words: &[&str]) -> Arguments {
        let words = ["bench", "--out", "target"].iter().chain(words);
        Arguments::try_parse_from(words).expect("a good command line")
    }

    #[test]
    fn everything_is_measured_unless_something_is_asked_for() {
        let full = arguments(&[]);
        assert!(Part::value_variants().iter().all(|&part| full.wants(part)));
        assert_eq!(full.kinds(), [Kind::Minimal, Kind::Envoy]);
        let quick = arguments(&["--quick"]);
        assert!(quick.wants(Part::Memory) && !quick.wants(Part::Open));
        assert_eq!(quick.kinds(), [Kind::Minimal]);
    }

    #[test]
    fn what_is_asked_for_is_measured_alone() {
        let some = arguments(&["--only", "bulk,open"]);
        assert!(some.wants(Part::Bulk) && some.wants(Part::Open));
        assert!(!some.wants(Part::Requests) && !some.wants(Part::Outside));
        assert_eq!(some.kinds(), [Kind::Minimal]);
        assert_eq!(arguments(&["--only", "open"]).kinds(), []);
    }

    #[test]
    fn envoys_alone_are_measured_in_everything() {
        let all = arguments(&["--only", "envoy"]);
        assert!(all.wants(Part::Requests) && !all.wants(Part::Outside));
        assert_eq!(all.kinds(), [Kind::Envoy]);
        let one = arguments(&["--only", "envoy,bulk"]);
        assert!(one.wants(Part::Bulk) && !one.wants(Part::Requests));
    }
}
