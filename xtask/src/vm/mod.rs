//! Virtual machines with other kernels: `cargo xtask vm-test`, and what else is done in one.

mod apt;
mod cpio;
pub(crate) mod dev;
mod image;
mod kernel;
mod machine;
mod session;
pub(crate) mod verifier;

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use self::{
    image::Packed,
    kernel::{KERNELS, Kernel},
    machine::End,
    session::Session,
};
use crate::{
    build, complain,
    exec::Step,
    paths, say,
    setup::{self, Use},
    tally::Tally,
};

/// What `cargo xtask vm-test` takes.
#[derive(clap::Args, Debug)]
pub(crate) struct Arguments {
    /// The kernel: 6.1, 6.12, 6.18, 7.2, or all of them
    #[arg(long, value_name = "SERIES", default_value = "all", value_parser = which)]
    kernel: Which,
    /// How many VMs run side by side; each has two processors
    #[arg(long, value_name = "N", default_value_t = 2)]
    jobs: usize,
    /// How long a VM may take, in minutes
    #[arg(long, value_name = "MINUTES", default_value_t = 60)]
    limit: u64,
    /// Run only the tests whose name contains one of these; else all but those with real
    /// programs, which a VM does not have
    filter: Vec<String>,
}

/// The kernels that are asked for.
#[derive(Clone, Debug)]
struct Which(Vec<&'static str>);

fn which(text: &str) -> Result<Which, String> {
    if text == "all" {
        return Ok(Which(KERNELS.to_vec()));
    }
    text.split(',')
        .map(|wanted| {
            let known = KERNELS.iter().find(|known| **known == wanted);
            known
                .copied()
                .ok_or_else(|| format!("there is {}, and all; not {wanted}", KERNELS.join(", ")))
        })
        .collect::<Result<_, _>>()
        .map(Which)
}

/// The tests with real programs.
const WITHOUT: &str = "programs::";

pub(crate) fn test(arguments: &Arguments) -> Result<ExitCode> {
    paths::require_root(
        "vm-test",
        "the test VMs need root because what they pack may be readable by root alone",
    )?;
    setup::ensure(&[Use::Build, Use::Tests, Use::Vm])?;
    build::agent()?;
    let files = [
        packed(paths::release("shunt"), image::AGENT),
        packed(stripped(&integration_tests()?)?, image::TESTS),
        packed(setup::envoy()?, image::ENVOY),
    ];
    let kernels = kernel::ready(&arguments.kernel.0)?;
    let run = script(&arguments.filter);
    let limit = Duration::from_secs(arguments.limit * 60);
    let results = side_by_side(&kernels, arguments.jobs, |kernel| {
        in_vm(kernel, &files, &run, limit, |line| {
            say(format!("[{}] {line}", kernel.series));
        })
    });
    let mut total = Tally::default();
    let mut good = true;
    for (kernel, result) in kernels.iter().zip(results) {
        let Ran {
            mut tally,
            complaint,
            took,
        } = result?;
        say(format!(
            "Linux {}: {tally}, in {} s",
            kernel.release(),
            took.as_secs()
        ));
        if let Some(complaint) = complaint {
            complain(format!("Linux {}: {complaint}", kernel.release()));
            tally.failed = tally.failed.max(1);
            good = false;
        }
        total += tally;
    }
    say(total);
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn packed(from: PathBuf, to: &str) -> Packed {
    Packed {
        from,
        to: PathBuf::from(to),
    }
}

/// The binary of the integration tests, the one that runs on this machine.
fn integration_tests() -> Result<PathBuf> {
    let messages = Step::new("cargo", "building the integration tests")
        .args([
            "test",
            "--locked",
            "--no-run",
            "--message-format",
            "json-render-diagnostics",
        ])
        .args(["--package", "shunt-tests", "--test", "integration"])
        .dir(&paths::root())
        .remedy("Read the compiler's first error: `cargo test --no-run -p shunt-tests`.")
        .output()?;
    let mut executable = messages.lines().filter_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        (message["target"]["name"] == "integration")
            .then(|| Some(PathBuf::from(message["executable"].as_str()?)))?
    });
    executable
        .next_back()
        .context("cargo did not say where the integration tests are")
}

/// The same without what only a debugger reads, nine tenths of it.
fn stripped(binary: &Path) -> Result<PathBuf> {
    let directory = directory()?;
    let to = directory.join("integration");
    Step::new("strip", "making the test binary smaller")
        .arg("--strip-debug")
        .arg("-o")
        .arg(&to)
        .arg(binary)
        .remedy("Install Debian's binutils.")
        .output()?;
    Ok(to)
}

/// Where images and consoles are.
fn directory() -> Result<PathBuf> {
    let directory = paths::target().join("vm");
    fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
    Ok(directory)
}

/// What a VM does: the tests, as on this machine.
fn script(filter: &[String]) -> String {
    let selection = if filter.is_empty() {
        format!("--skip {WITHOUT}")
    } else {
        filter
            .iter()
            .map(|word| format!("'{}'", word.replace('\'', r"'\''")))
            .collect::<Vec<_>>()
            .join(" ")
    };
    format!(
        "export SHUNT_BIN={} SHUNT_ENVOY={}\n{} {selection} >/dev/ttyS1 2>&1 </dev/null\n",
        image::AGENT,
        image::ENVOY,
        image::TESTS
    )
}

/// How the tests of one VM went.
struct Ran {
    tally: Tally,
    /// Why it is no success.
    complaint: Option<String>,
    took: Duration,
}

/// Runs `each` for every kernel, `jobs` at a time; the results are in the order
/// of the kernels.
fn side_by_side<T: Send>(
    kernels: &[Kernel],
    jobs: usize,
    each: impl Fn(&Kernel) -> Result<T> + Sync,
) -> Vec<Result<T>> {
    let next = Mutex::new(kernels.iter().enumerate());
    let done = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..jobs.clamp(1, kernels.len().max(1)) {
            scope.spawn(|| {
                loop {
                    let taken = lock(&next).next();
                    let Some((place, kernel)) = taken else {
                        return;
                    };
                    let result = each(kernel);
                    lock(&done).push((place, result));
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_by_key(|(place, _)| *place);
    done.into_iter().map(|(_, result)| result).collect()
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `run` in a VM and counts what the tests there say; hands every line to `see`.
fn in_vm(
    kernel: &Kernel,
    files: &[Packed],
    run: &str,
    limit: Duration,
    mut see: impl FnMut(&str),
) -> Result<Ran> {
    let start = Instant::now();
    let mut counted = None;
    let session = Session::run(&kernel.series, kernel, files, run, limit, |line| {
        see(line);
        counted = Tally::from_line(line).or(counted);
    })?;
    let complaint = match complaint(session.end, counted, limit) {
        Some(complaint) => Some(format!(
            "{complaint}; its console: {}",
            session.console().display()
        )),
        None => {
            session.forget()?;
            None
        }
    };
    Ok(Ran {
        tally: counted.unwrap_or_default(),
        complaint,
        took: start.elapsed(),
    })
}

/// Why a VM that ended like this and whose tests counted that is no success: only
/// what the tests say is one.
fn complaint(end: End, counted: Option<Tally>, limit: Duration) -> Option<String> {
    match (counted, end) {
        (None, End::TimeLimit) => Some(format!(
            "it was not done after {} minutes",
            limit.as_secs() / 60
        )),
        (None, End::Itself) => Some("it ended before the tests did".to_owned()),
        (Some(tally), _) if tally.failed > 0 => Some(format!("{} failed", tally.failed)),
        (Some(tally), _) if tally.ignored > 0 => Some(format!("{} ignored", tally.ignored)),
        (Some(tally), _) if tally.passed == 0 => {
            Some("no test has a name that contains the filter".to_owned())
        }
        (Some(_), _) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_tests_say_is_a_success() {
        let limit = Duration::from_secs(60);
        let tally = |passed, failed, ignored| Tally {
            passed,
            failed,
            ignored,
            ..Tally::default()
        };
        assert_eq!(complaint(End::Itself, Some(tally(3, 0, 0)), limit), None);
        for (end, counted) in [
            (End::Itself, None),
            (End::TimeLimit, None),
            (End::Itself, Some(tally(3, 1, 0))),
            (End::Itself, Some(tally(3, 0, 1))),
            (End::Itself, Some(tally(0, 0, 0))),
        ] {
            assert!(complaint(end, counted, limit).is_some(), "{counted:?}");
        }
    }

    #[test]
    fn kernels_are_chosen_by_their_series() {
        let chosen = |text| which(text).ok().map(|which| which.0);
        assert_eq!(chosen("all"), Some(KERNELS.to_vec()));
        assert_eq!(chosen("6.1,7.2"), Some(vec!["6.1", "7.2"]));
        assert_eq!(chosen("5.15"), None);
    }

    #[test]
    fn a_filter_is_one_word_for_the_shell() {
        assert!(script(&[]).contains(" --skip programs:: "));
        let filters = ["check::".to_owned(), "it's".to_owned()];
        assert!(script(&filters).contains(r" 'check::' 'it'\''s' >"));
    }
}
