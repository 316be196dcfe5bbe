//! `cargo xtask verifier`: what the programs cost the verifier of each kernel, and how far
//! each kernel splices.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::{
    Which, directory, image, in_vm, integration_tests,
    kernel::{self, Kernel},
    packed, side_by_side, stripped, which,
};
use crate::{
    build, complain, env,
    exec::Step,
    paths, say,
    setup::{self, Use},
};

/// What `cargo xtask verifier` takes.
#[derive(clap::Args, Debug)]
pub(crate) struct Arguments {
    /// The kernels beside this machine's: 6.1, 6.12, 6.18, 7.2, separated by commas, all of
    /// them, or none
    #[arg(long, value_name = "SERIES", default_value = "all", value_parser = which)]
    kernel: Which,
    /// How many VMs run side by side
    #[arg(long, value_name = "N", default_value_t = 2)]
    jobs: usize,
    /// How long a VM may take, in minutes
    #[arg(long, value_name = "MINUTES", default_value_t = 20)]
    limit: u64,
    /// Write docs/kernels.md
    #[arg(long)]
    write: bool,
}

/// Tests that between them load every program.
const TESTS: [&str; 2] = [
    "check::this_machine_can_run_the_agent",
    "virtual::rules_and_agent_can_stand_in_one_pod",
];

/// The library that asks for the figures, in a VM.
const LIBRARY: &str = "/usr/local/lib/libshunt_verifier_log.so";

/// What the kernel takes at most, of every program.
const MOST_INSTRUCTIONS: u64 = 1_000_000;
/// Bytes of stack, of a program and what it calls.
const MOST_STACK: u64 = 512;

pub(crate) fn command(arguments: &Arguments) -> Result<ExitCode> {
    paths::require_root("verifier", "loading BPF programs needs root")?;
    setup::ensure(&[Use::Build, Use::Tests, Use::Vm])?;
    build::release(&["--package", "shunt", "--bin", "shunt"])?;
    build::release(&["--package", "shunt-verifier-log"])?;
    let tests = stripped(&integration_tests()?)?;
    let library = paths::release("libshunt_verifier_log.so");
    let mut all = vec![here(&tests, &library)?];

    let files = [
        packed(paths::release("shunt"), image::AGENT),
        packed(tests, image::TESTS),
        packed(library, LIBRARY),
        packed(setup::envoy()?, image::ENVOY),
    ];
    let kernels = kernel::ready(&arguments.kernel.0)?;
    let run = RUN.replace("TESTS", &TESTS.join(" "));
    let limit = Duration::from_secs(arguments.limit * 60);
    let found = side_by_side(&kernels, arguments.jobs, |kernel| {
        there(kernel, &files, &run, limit)
    });
    for found in found {
        all.push(found?);
    }
    let table = document(&all);
    say(&table);
    if arguments.write {
        let file = paths::root().join("docs/kernels.md");
        fs::write(&file, &table).with_context(|| format!("writing {}", file.display()))?;
    }
    let complaints: Vec<_> = all.iter().flat_map(Found::complaints).collect();
    for complaint in &complaints {
        complain(complaint);
    }
    Ok(if complaints.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// What a VM does.
const RUN: &str = "\
export SHUNT_BIN=/usr/local/bin/shunt SHUNT_ENVOY=/usr/local/bin/envoy
exec >/dev/ttyS1 2>&1 </dev/null
SHUNT_VERIFIER_LOG=/tmp/figures LD_PRELOAD=/usr/local/lib/libshunt_verifier_log.so integration TESTS
cat /tmp/figures
shunt run --splice auto &
until shunt status >/dev/null 2>&1 || ! kill -0 $!; do sleep 1; done
echo \"status $(shunt status --output json | tr '\\n' ' ')\"
kill $!
wait $!
";

/// What one kernel said.
#[derive(Debug, Default)]
struct Found {
    release: String,
    programs: BTreeMap<String, Figures>,
    splicing: Option<Splicing>,
}

/// What a program cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Figures {
    /// Instructions that were looked at, each as often as it was.
    instructions: u64,
    /// States that were kept, to see that one was looked at already.
    states: u64,
    /// Bytes of stack, of the program and of everything that it may call together: more
    /// than the kernel counts.
    stack: u64,
}

/// What `--splice auto` comes to.
#[derive(Debug, Default, PartialEq, Eq)]
struct Splicing {
    mode: String,
    /// The trials, and why they failed.
    trials: Vec<(String, Option<String>)>,
}

/// On this machine. How far it splices is not asked: an agent of this machine's own may
/// be at work.
fn here(tests: &Path, library: &Path) -> Result<Found> {
    let log = directory()?.join("figures");
    if log.exists() {
        fs::remove_file(&log)?;
    }
    let step = Step::new(tests, "loading the programs on this machine")
        .args(TESTS)
        .env("SHUNT_VERIFIER_LOG", &log)
        .env("LD_PRELOAD", library);
    env::with_tests(step)?.output()?;
    let lines = fs::read_to_string(&log).with_context(|| format!("reading {}", log.display()))?;
    let mut found = Found {
        release: fs::read_to_string("/proc/sys/kernel/osrelease")?
            .trim()
            .to_owned(),
        ..Found::default()
    };
    lines.lines().for_each(|line| found.see(line));
    Ok(found)
}

fn there(kernel: &Kernel, files: &[super::Packed], run: &str, limit: Duration) -> Result<Found> {
    let mut found = Found {
        release: kernel.release(),
        ..Found::default()
    };
    let mut said = Vec::new();
    let ran = in_vm(kernel, files, run, limit, |line| {
        found.see(line);
        said.push(line.to_owned());
    })?;
    if let Some(complaint) = ran.complaint {
        bail!(
            "Linux {}: {complaint}\n{}",
            kernel.release(),
            said.join("\n")
        );
    }
    Ok(found)
}

impl Found {
    /// A line of what was said.
    fn see(&mut self, line: &str) {
        if let Some((program, figures)) = figures(line) {
            let most = self.programs.entry(program).or_default();
            *most = most.max(figures);
        }
        if let Some(status) = line.strip_prefix("status ") {
            self.splicing = splicing(status);
        }
    }

    /// Programs that come within a factor of two of a limit.
    fn complaints(&self) -> Vec<String> {
        let near = self.programs.iter().filter(|(_, figures)| {
            figures.instructions * 2 > MOST_INSTRUCTIONS || figures.stack * 2 > MOST_STACK
        });
        let mut complaints: Vec<_> = near
            .map(|(program, figures)| {
                format!(
                    "Linux {}: {program} comes within a factor of two of a limit: {} of {MOST_INSTRUCTIONS} instructions, {} of {MOST_STACK} bytes of stack",
                    self.release, figures.instructions, figures.stack
                )
            })
            .collect();
        if self.programs.is_empty() {
            complaints.push(format!("Linux {}: no program was loaded", self.release));
        }
        complaints
    }
}

impl Figures {
    fn max(self, other: Self) -> Self {
        Self {
            instructions: self.instructions.max(other.instructions),
            states: self.states.max(other.states),
            stack: self.stack.max(other.stack),
        }
    }
}

/// The program and its figures, in a line of the log.
fn figures(line: &str) -> Option<(String, Figures)> {
    let words: Vec<&str> = line.strip_prefix("verifier ")?.split_whitespace().collect();
    let program = words.first().filter(|name| name.starts_with("shunt"))?;
    let after = |name: &str| {
        let place = words.iter().position(|word| *word == name)?;
        words.get(place + 1).copied()
    };
    let number = |name| after(name)?.parse().ok();
    let stack = after("depth").map_or(0, |parts| {
        parts
            .split('+')
            .filter_map(|part| part.parse::<u64>().ok())
            .sum()
    });
    let figures = Figures {
        instructions: number("processed")?,
        states: number("total_states").unwrap_or_default(),
        stack,
    };
    Some(((*program).to_owned(), figures))
}

/// What the agent's status says of splicing.
fn splicing(status: &str) -> Option<Splicing> {
    let status: Value = serde_json::from_str(status).ok()?;
    let splice = status
        .pointer("/splice")
        .or_else(|| status.pointer("/node/splice"))?;
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let trials = splice["trials"].as_array().into_iter().flatten();
    Some(Splicing {
        mode: text(&splice["mode"])?,
        trials: trials
            .filter_map(|trial| Some((text(&trial["name"])?, text(&trial["failed"]))))
            .collect(),
    })
}

/// docs/kernels.md.
fn document(all: &[Found]) -> String {
    let programs: BTreeSet<&String> = all.iter().flat_map(|found| found.programs.keys()).collect();
    let mut text = HEAD.to_owned();
    let releases = || all.iter().map(|found| found.release.as_str());
    let row = |cells: &mut dyn Iterator<Item = String>| {
        format!("| {} |\n", cells.collect::<Vec<_>>().join(" | "))
    };
    let header = |first: &str| {
        row(&mut std::iter::once(first.to_owned()).chain(releases().map(str::to_owned)))
            + &row(&mut std::iter::repeat_n("---".to_owned(), all.len() + 1))
    };
    text.push_str(&header("program"));
    for program in programs {
        let cells = all.iter().map(|found| {
            found
                .programs
                .get(program)
                .map_or_else(String::new, |figures| {
                    format!(
                        "{}, {}, {}",
                        figures.instructions, figures.states, figures.stack
                    )
                })
        });
        text.push_str(&row(
            &mut std::iter::once(format!("`{program}`")).chain(cells)
        ));
    }
    text.push_str(SPLICING);
    for found in all {
        let Some(splicing) = &found.splicing else {
            continue;
        };
        text.push_str(&format!("- Linux {}: `{}`.", found.release, splicing.mode));
        let failed = splicing
            .trials
            .iter()
            .filter_map(|(name, why)| Some((name, why.as_ref()?)));
        let failed: Vec<_> = failed
            .map(|(name, why)| format!(" *{name}*: {why}."))
            .collect();
        if failed.is_empty() {
            text.push_str(&format!(" All {} trials pass.", splicing.trials.len()));
        } else {
            text.push_str(&format!(
                " Of {} trials {} fail:{}",
                splicing.trials.len(),
                failed.len(),
                failed.concat()
            ));
        }
        text.push('\n');
    }
    text
}

const HEAD: &str = "\
# Kernels

Written by `cargo xtask verifier --write`, which loads every program on this machine and
in a VM with each kernel of the matrix.

## What the programs cost the verifier

Instructions that it looked at, states that it kept, bytes of stack. The limits are
1,000,000 instructions and 512 bytes of stack for a program with what it calls; the
command fails when a program comes within a factor of two of either. The stack is the
sum over the program and everything in it that may be called, which is more than the
kernel counts. The kernel cuts names after 15 characters.

";

const SPLICING: &str = "
## What `--splice auto` comes to

The trials of [splicing.md](splicing.md), on each kernel:

";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read() {
        let line = "verifier shunt_connect4 verification time 123 usec stack depth 72+16+0 processed 1234 insns (limit 1000000) max_states_per_insn 4 total_states 56 peak_states 50 mark_read 10 ";
        let expected = Figures {
            instructions: 1234,
            states: 56,
            stack: 88,
        };
        assert_eq!(figures(line), Some(("shunt_connect4".to_owned(), expected)));
        assert_eq!(figures("verifier  processed 2 insns"), None);
        assert_eq!(figures("test x ... ok"), None);
    }

    #[test]
    fn a_program_near_a_limit_is_named() {
        let with = |instructions, stack| {
            let figures = Figures {
                instructions,
                states: 1,
                stack,
            };
            let found = Found {
                programs: BTreeMap::from([("shunt_x".to_owned(), figures)]),
                ..Found::default()
            };
            found.complaints().len()
        };
        assert_eq!(with(500_000, 256), 0);
        assert_eq!(with(500_001, 256), 1);
        assert_eq!(with(500_000, 257), 1);
        assert_eq!(Found::default().complaints().len(), 1);
    }

    #[test]
    fn the_status_says_how_far_it_splices() {
        let status = r#"{"splice": {"mode": "proxy", "trials": [{"name": "a"}, {"name": "b", "failed": "it reads 0"}]}}"#;
        let splicing = splicing(status).expect("a status");
        assert_eq!(splicing.mode, "proxy");
        assert_eq!(splicing.trials[0], ("a".to_owned(), None));
        assert_eq!(splicing.trials[1].1.as_deref(), Some("it reads 0"));
    }
}
