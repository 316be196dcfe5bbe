//! `cargo xtask verifier`: what the programs cost the verifier of each kernel.

use std::{collections::BTreeMap, fs, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{
    Which,
    image::RESULTS,
    kernel::{self, Kernel},
    packed,
    session::Session,
    side_by_side, which,
};
use crate::{
    arch::Arch,
    build, complain,
    exec::Step,
    paths, say,
    setup::{self, Use},
};

/// What `cargo xtask verifier` takes.
#[derive(clap::Args, Debug)]
pub(crate) struct Arguments {
    /// The kernel: host for this machine's, 6.1, 6.12, 6.18, 7.2, several with commas between
    /// them, all, or ci: the oldest and the newest, and those that are in the cache already
    #[arg(long, value_name = "SERIES", default_value = "host", value_parser = kernels)]
    kernel: Kernels,
    /// How many VMs run side by side; each has two processors
    #[arg(long, value_name = "N", default_value_t = 2)]
    jobs: usize,
    /// How long a VM may take, in minutes
    #[arg(long, value_name = "MINUTES", default_value_t = 10)]
    limit: u64,
}

/// The kernels that are asked for.
#[derive(Clone, Debug)]
struct Kernels {
    /// This machine's.
    host: bool,
    others: Option<Which>,
}

/// What this machine is called among the kernels.
const HOST: &str = "host";

fn kernels(text: &str) -> Result<Kernels, String> {
    let (host, others): (Vec<&str>, Vec<&str>) = text.split(',').partition(|word| *word == HOST);
    let others = (!others.is_empty()).then(|| which(&others.join(",")));
    Ok(Kernels {
        host: !host.is_empty() || text == "all",
        others: others.transpose()?,
    })
}

/// What the kernel takes at most: instructions that its verifier looks at, and bytes of
/// stack of functions that call each other.
const MOST_INSTRUCTIONS: u64 = 1_000_000;
const MOST_STACK: u64 = 512;

/// The program that loads every program.
const PROGRAM: &str = "verifier";

/// Where it is in a VM.
const IN_VM: &str = "/usr/local/bin/verifier";

/// Twice: the programs as they are, and with what logs their decisions in them.
const LOGS: [&str; 2] = ["warn", "warn,shunt::bpf=debug"];

/// Said in a VM when every program was loaded.
const DONE: &str = "every program was loaded";

pub(crate) fn command(arguments: &Arguments) -> Result<ExitCode> {
    paths::require_root(
        "verifier",
        "what the programs cost the verifier is found out by loading them, which takes root",
    )?;
    let Kernels { host, others } = &arguments.kernel;
    let uses: &[Use] = match others {
        Some(_) => &[Use::Build, Use::Tests, Use::Vm],
        None => &[Use::Build, Use::Tests],
    };
    setup::ensure(uses)?;
    build::agent_and(PROGRAM)?;
    let mut found = Vec::new();
    if *host {
        found.push(on_host()?);
    }
    if let Some(others) = others {
        let limit = Duration::from_secs(arguments.limit * 60);
        let kernels = kernel::ready(Arch::X86_64, &others.series(Arch::X86_64)?)?;
        let in_vms = side_by_side(&kernels, arguments.jobs, |kernel| in_vm(kernel, limit));
        found.extend(in_vms.into_iter().collect::<Result<Vec<_>>>()?);
    }
    for found in &found {
        say(found.table());
    }
    let near: Vec<String> = found.iter().flat_map(Found::complaints).collect();
    for complaint in &near {
        complain(complaint);
    }
    Ok(if near.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// On this machine.
fn on_host() -> Result<Found> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")
        .context("cannot read the kernel's release")?;
    let mut found = Found::of(release.trim());
    for log in LOGS {
        let lines = Step::new(paths::release(PROGRAM), "loading every program")
            .env("SHUNT_LOG", log)
            .remedy("Read what the verifier said.")
            .output()?;
        for line in lines.lines() {
            found.see(line)?;
        }
    }
    found.checked()
}

/// In a VM.
fn in_vm(kernel: &Kernel, limit: Duration) -> Result<Found> {
    let program = packed(paths::release(PROGRAM), IN_VM);
    let mut found = Found::of(&kernel.release());
    let (mut done, mut said) = (false, Vec::new());
    let loading: Vec<String> = LOGS
        .iter()
        .map(|log| format!("SHUNT_LOG={log} {IN_VM}"))
        .collect();
    let run = format!(
        "exec >{RESULTS} 2>&1 </dev/null\n{} && echo {DONE}\n",
        loading.join(" && ")
    );
    let name = format!("verifier-{}", kernel.series);
    let session = Session::run(&name, kernel, &[program], &run, limit, |line| {
        done |= line == DONE;
        // What is no figure is what went wrong.
        if found.see(line).is_err() {
            said.push(line.to_owned());
        }
    })?;
    ensure!(
        done,
        "on Linux {} not every program was loaded; its console: {}\n{}",
        kernel.release(),
        session.console().display(),
        said.join("\n")
    );
    session.forget()?;
    found.checked()
}

/// What one kernel said.
#[derive(Debug)]
struct Found {
    release: String,
    programs: BTreeMap<String, Figures>,
}

/// What a program cost, at most, of all the times that it was loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Figures {
    instructions: u64,
    total_states: u64,
    peak_states: u64,
    stack: u64,
    combined_stack: u64,
}

impl Found {
    fn of(release: &str) -> Self {
        Self {
            release: release.to_owned(),
            programs: BTreeMap::new(),
        }
    }

    /// A line of what the program says.
    fn see(&mut self, line: &str) -> Result<()> {
        let (program, figures) = figures(line).with_context(|| format!("no figures: {line}"))?;
        let most = self.programs.entry(program).or_default();
        *most = most.max(figures);
        Ok(())
    }

    fn checked(self) -> Result<Self> {
        ensure!(
            !self.programs.is_empty(),
            "Linux {}: no program was loaded",
            self.release
        );
        Ok(self)
    }

    /// Every program and its figures.
    fn table(&self) -> String {
        let mut text = format!(
            "Linux {}\n{:<16}{:>13}{:>13}{:>13}{:>7}{:>10}",
            self.release,
            "program",
            "instructions",
            "total states",
            "peak states",
            "stack",
            "combined"
        );
        for (program, figures) in &self.programs {
            text.push_str(&format!(
                "\n{program:<16}{:>13}{:>13}{:>13}{:>7}{:>10}",
                figures.instructions,
                figures.total_states,
                figures.peak_states,
                figures.stack,
                figures.combined_stack
            ));
        }
        text.push('\n');
        text
    }

    /// The programs that have more than half of what a limit allows.
    fn complaints(&self) -> Vec<String> {
        let mut complaints = Vec::new();
        for (program, figures) in &self.programs {
            for (what, found, limit) in [
                ("instructions", figures.instructions, MOST_INSTRUCTIONS),
                ("bytes of stack", figures.combined_stack, MOST_STACK),
            ] {
                let most = limit / 2;
                if found > most {
                    complaints.push(format!(
                        "Linux {}: {program} has {found} {what}; it may have {most}, and the \
                         kernel's limit is {limit}",
                        self.release
                    ));
                }
            }
        }
        complaints
    }
}

impl Figures {
    /// Each figure the larger of both.
    fn max(self, other: Self) -> Self {
        Self {
            instructions: self.instructions.max(other.instructions),
            total_states: self.total_states.max(other.total_states),
            peak_states: self.peak_states.max(other.peak_states),
            stack: self.stack.max(other.stack),
            combined_stack: self.combined_stack.max(other.combined_stack),
        }
    }
}

/// The program and its figures, in a line of `tests/verifier`.
fn figures(line: &str) -> Option<(String, Figures)> {
    let value: Value = serde_json::from_str(line).ok()?;
    let number = |name: &str| value[name].as_u64();
    let figures = Figures {
        instructions: number("instructions")?,
        total_states: number("total_states")?,
        peak_states: number("peak_states")?,
        stack: number("stack")?,
        combined_stack: number("combined_stack")?,
    };
    Some((value["program"].as_str()?.to_owned(), figures))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(program: &str, instructions: u64, combined_stack: u64) -> String {
        serde_json::json!({
            "program": program,
            "instructions": instructions,
            "total_states": 3,
            "peak_states": 2,
            "stack": 16,
            "combined_stack": combined_stack,
        })
        .to_string()
    }

    #[test]
    fn of_each_figure_the_largest_is_kept() {
        let mut found = Found::of("6.1");
        for line in [line("shunt_a", 10, 64), line("shunt_a", 20, 32)] {
            found.see(&line).expect("figures");
        }
        found.see("[WARN] something else").expect_err("no figures");
        assert_eq!(
            found.programs,
            BTreeMap::from([(
                "shunt_a".to_owned(),
                Figures {
                    instructions: 20,
                    total_states: 3,
                    peak_states: 2,
                    stack: 16,
                    combined_stack: 64,
                }
            )])
        );
    }

    #[test]
    fn a_program_near_a_limit_is_named() {
        let complaints = |program, instructions, stack| {
            let mut found = Found::of("6.1");
            found
                .see(&line(program, instructions, stack))
                .expect("figures");
            found.complaints()
        };
        assert!(complaints("shunt_a", 500_000, 256).is_empty());
        assert_eq!(
            complaints("shunt_a", 500_001, 257),
            [
                "Linux 6.1: shunt_a has 500001 instructions; it may have 500000, and the \
                 kernel's limit is 1000000",
                "Linux 6.1: shunt_a has 257 bytes of stack; it may have 256, and the kernel's \
                 limit is 512",
            ]
        );
    }

    #[test]
    fn this_machine_is_one_of_the_kernels() {
        let chosen = |text| {
            let Kernels { host, others } = kernels(text).ok()?;
            let series = others.map(|others| others.series(Arch::X86_64).expect("they are named"));
            Some((host, series.map(|series| series.len())))
        };
        assert_eq!(chosen("host"), Some((true, None)));
        assert_eq!(chosen("all"), Some((true, Some(4))));
        assert_eq!(chosen("6.1,host,7.2"), Some((true, Some(2))));
        assert_eq!(chosen("6.12"), Some((false, Some(1))));
        assert_eq!(chosen("5.4"), None);
    }
}
