//! `cargo xtask test`: every test, the integration tests last.

use std::{
    path::PathBuf,
    process::ExitCode,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::Result;
use clap::Args;

use crate::{
    build, complain, env,
    exec::Step,
    kubernetes, paths, say,
    setup::{self, Use},
    tally::Tally,
    target::Target,
};

/// The variables by which the tests learn of `--random`, `--stress`, `--splice` and
/// `--seed`.
const RANDOM: &str = "SHUNT_TEST_RANDOM";
const STRESS: &str = "SHUNT_TEST_STRESS";
pub(crate) const SPLICE: &str = "SHUNT_TEST_SPLICE";
const SEED: &str = "SHUNT_TEST_SEED";

/// The modes that the tests can be told.
pub(crate) const SPLICE_MODES: [&str; 3] = ["between", "proxy", "all"];

/// Has the test runner print what the tests that passed have printed: in a mode that was
/// told, what looked other than by TCP.
pub(crate) const SHOW: &str = "--show-output";

/// What `cargo xtask test` takes.
#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// How many random settings the differential test adds to its fixed ones
    #[arg(long, value_name = "N", default_value_t = 20)]
    random: u64,
    /// How long the stress tests take, all together
    #[arg(long, value_name = "SECONDS", default_value_t = 90)]
    stress: u64,
    /// Which mode of splicing is compared with none, in place of the one that the agent
    /// picks; what was seen is printed
    #[arg(long, value_name = "MODE", value_parser = SPLICE_MODES)]
    splice: Option<String>,
    /// Where the random ones start from, to repeat a run; chosen and printed when absent.
    /// The second of them has the seed S + 1, and so on
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Run the tests on a real node instead, which is made of Kubernetes' own programs;
    /// they are built from Debian's source package the first time, in about 10 minutes
    #[arg(long)]
    kubernetes: bool,
    /// Run only the tests whose name contains one of these
    filter: Vec<String>,
}

pub(crate) fn command(arguments: &Arguments) -> Result<ExitCode> {
    paths::require_root(
        "test",
        "the tests need root because they make network namespaces, load BPF programs and iptables rules",
    )?;
    let (runs, variables) = if arguments.kubernetes {
        setup::ensure(&[Use::Build, Use::Tests, Use::Kubernetes, Use::Chart])?;
        (ON_A_NODE, kubernetes::for_tests()?)
    } else {
        setup::ensure(&[Use::Build, Use::Tests])?;
        (RUNS, Vec::new())
    };
    build::other_agent(&Target::Native)?;
    build::agent(&Target::Native)?;
    let seed = arguments.seed.unwrap_or_else(new_seed);
    say(format!(
        "random tests: --random {} --seed {seed}",
        arguments.random
    ));

    let mut report = Report::default();
    for run in runs {
        report.add(
            run,
            outcome(run, arguments, seed, &variables)?,
            !arguments.filter.is_empty(),
        );
    }
    for complaint in report.complaints() {
        complain(complaint);
    }
    // The last line of the whole, alone: the sum of the runners' own counts.
    say(report.total);
    Ok(if report.is_good() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// One call of `cargo test`.
#[derive(Clone, Copy, Debug)]
struct Run {
    name: &'static str,
    selection: &'static [&'static str],
    /// Whether it may have no test at all when nothing is filtered out.
    may_be_empty: bool,
}

/// The integration tests are the last, so that their count closes the output.
const RUNS: &[Run] = &[
    Run {
        name: "the unit tests",
        // The BPF programs are a binary for another target.
        selection: &[
            "--workspace",
            "--exclude",
            "shunt-programs",
            "--exclude",
            "shunt-tests",
        ],
        may_be_empty: false,
    },
    Run {
        name: "the test harness's own tests",
        selection: &["--package", "shunt-tests", "--lib"],
        may_be_empty: true,
    },
    Run {
        name: "the benchmark's own tests",
        selection: &["--package", "shunt-tests", "--bin", "bench"],
        may_be_empty: true,
    },
    Run {
        name: "the examples in the harness's documentation",
        selection: &["--package", "shunt-tests", "--doc"],
        may_be_empty: true,
    },
    Run {
        name: "the integration tests",
        selection: &["--package", "shunt-tests", "--test", "integration"],
        may_be_empty: false,
    },
];

/// What `--kubernetes` runs.
const ON_A_NODE: &[Run] = &[Run {
    name: "the tests on a real node",
    selection: &["--package", "shunt-tests", "--test", "kubernetes"],
    may_be_empty: false,
}];

/// How a run ended.
#[derive(Clone, Copy, Debug)]
struct Outcome {
    tally: Tally,
    success: bool,
}

fn outcome(
    run: &Run,
    arguments: &Arguments,
    seed: u64,
    variables: &[(&str, PathBuf)],
) -> Result<Outcome> {
    let mut step = Step::new("cargo", format!("running {}", run.name))
        .args(["test", "--locked", "--no-fail-fast"])
        .args(run.selection)
        .arg("--")
        .args(&arguments.filter)
        .dir(&paths::root())
        .env(RANDOM, arguments.random.to_string())
        .env(STRESS, arguments.stress.to_string())
        .env(SEED, seed.to_string())
        .remedy("Install rustup's stable toolchain (https://rustup.rs).");
    if let Some(mode) = &arguments.splice {
        step = step.arg(SHOW).env(SPLICE, mode);
    }
    for (name, path) in variables {
        step = step.env(name, path);
    }
    let mut tally = Tally::default();
    let status = env::with_tests(step)?.stream(|line| {
        say(line);
        tally += Tally::from_line(line).unwrap_or_default();
    })?;
    Ok(Outcome {
        tally,
        success: status.success(),
    })
}

/// All runs together.
#[derive(Debug, Default)]
struct Report {
    total: Tally,
    complaints: Vec<String>,
}

impl Report {
    fn add(&mut self, run: &Run, outcome: Outcome, filtered: bool) {
        let Outcome { mut tally, success } = outcome;
        let name = run.name;
        let complaint = if tally.failed > 0 {
            Some(format!("{name}: {} failed", tally.failed))
        } else if !success {
            Some(format!(
                "{name}: cargo failed without a failed test, so they did not compile or the runner died: see above"
            ))
        } else if tally.ignored > 0 {
            Some(format!(
                "{name}: {} ignored; a test that cannot run has to fail, so take #[ignore] away",
                tally.ignored
            ))
        } else if tally.filtered > 0 && !filtered {
            Some(format!(
                "{name}: {} filtered out, although every test was asked for",
                tally.filtered
            ))
        } else if tally.passed == 0 && !filtered && !run.may_be_empty {
            Some(format!("{name}: there was none to run"))
        } else {
            None
        };
        if complaint.is_some() {
            // A run that broke down counts as one failure: the last line of a
            // failed whole must not read "0 failed".
            tally.failed = tally.failed.max(1);
        }
        self.complaints.extend(complaint);
        self.total += tally;
    }

    /// What is wrong, one sentence each.
    fn complaints(&self) -> Vec<String> {
        let mut all = self.complaints.clone();
        // A filter may leave a run empty, but not all of them.
        if all.is_empty() && self.total.passed == 0 {
            all.push("no test has a name that contains the filter".to_owned());
        }
        all
    }

    fn is_good(&self) -> bool {
        self.complaints().is_empty()
    }
}

fn new_seed() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: Run = Run {
        name: "these",
        selection: &[],
        may_be_empty: false,
    };

    fn report(outcomes: &[(u64, u64, bool)], filtered: bool) -> Report {
        let mut report = Report::default();
        for &(passed, failed, success) in outcomes {
            let tally = Tally {
                passed,
                failed,
                ..Tally::default()
            };
            report.add(&FULL, Outcome { tally, success }, filtered);
        }
        report
    }

    #[test]
    fn all_passed_is_good() {
        let report = report(&[(5, 0, true), (2, 0, true)], false);
        assert!(report.is_good());
        assert_eq!(report.total.to_string(), "7 passed, 0 failed");
    }

    #[test]
    fn an_early_failure_is_not_hidden_by_a_later_success() {
        let report = report(&[(5, 1, false), (2, 0, true)], false);
        assert!(!report.is_good());
        assert_eq!(report.total.to_string(), "7 passed, 1 failed");
    }

    #[test]
    fn a_run_that_died_is_no_success() {
        let report = report(&[(5, 0, true), (0, 0, false)], false);
        assert!(
            report.complaints()[0].contains("did not compile"),
            "{report:?}"
        );
    }

    #[test]
    fn no_test_at_all_is_no_success() {
        assert!(!report(&[(5, 0, true), (0, 0, true)], false).is_good());
        assert!(report(&[(5, 0, true), (0, 0, true)], true).is_good());
        assert!(!report(&[(0, 0, true), (0, 0, true)], true).is_good());
    }

    #[test]
    fn tests_that_did_not_run_are_no_success() {
        let judged = |ignored, filtered, asked: bool| {
            let mut report = Report::default();
            let tally = Tally {
                passed: 5,
                failed: 0,
                ignored,
                filtered,
            };
            let outcome = Outcome {
                tally,
                success: true,
            };
            report.add(&FULL, outcome, asked);
            (report.is_good(), report.total.to_string())
        };
        let bad = (false, "5 passed, 1 failed".to_owned());
        assert_eq!(judged(1, 0, false), bad);
        assert_eq!(judged(1, 0, true), bad);
        assert_eq!(judged(0, 3, false), bad);
        assert!(judged(0, 3, true).0);
    }

    #[test]
    fn the_integration_tests_close() {
        let last = RUNS.last().expect("there are runs");
        assert!(last.selection.contains(&"integration"));
    }
}
