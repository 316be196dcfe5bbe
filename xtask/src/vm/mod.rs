//! Virtual machines with other kernels: `cargo xtask vm-test`, and what else is done in one.

mod core_set;
mod cpio;
pub(crate) mod dev;
mod emulator;
mod image;
mod kernel;
mod machine;
mod mirror;
mod session;
mod unpacked;
mod userland;
pub(crate) mod verifier;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{self, ExitCode},
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use self::{
    image::{Packed, RESULTS},
    kernel::{KERNELS, Kernel},
    machine::End,
    session::Session,
    userland::Userland,
};
use crate::{
    arch::Arch,
    build, complain, paths, say,
    setup::{self, Use},
    tally::Tally,
    target::Target,
    test,
};

/// What `cargo xtask vm-test` takes.
#[derive(clap::Args, Debug)]
pub(crate) struct Arguments {
    /// The kernel: 6.1, 6.12, 6.18, 7.2, several with commas between them, all, or ci: the
    /// oldest and the newest, and those that are in the cache already
    #[arg(long, value_name = "SERIES", default_value = "all", value_parser = which)]
    kernel: Which,
    /// The kind of machine. For aarch64 the tests are cross-compiled, and their programs are
    /// Debian's for arm64
    #[arg(long, value_enum, default_value_t = Arch::X86_64)]
    arch: Arch,
    /// How many VMs run side by side; each has two processors
    #[arg(long, value_name = "N", default_value_t = 2)]
    jobs: usize,
    /// How long a VM may take, in minutes
    #[arg(long, value_name = "MINUTES", default_value_t = 120)]
    limit: u64,
    /// Run the core set: the tests that tell most about a kernel, in minutes
    #[arg(long, conflicts_with = "filter")]
    core: bool,
    /// Which mode of splicing is compared with none, in place of the one that the agent
    /// picks; what was seen is printed
    #[arg(long, value_name = "MODE", value_parser = test::SPLICE_MODES)]
    splice: Option<String>,
    /// Run only the tests whose name contains one of these; else all but those with real
    /// programs, which a VM does not have
    filter: Vec<String>,
}

impl Arguments {
    fn selection(&self) -> Selection {
        if self.core {
            Selection::named(core_set::TESTS)
        } else if self.filter.is_empty() {
            Selection::All
        } else {
            Selection::named(&self.filter)
        }
    }
}

/// The kernels that are asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Which {
    Named(Vec<&'static str>),
    /// Those of [`kernel::in_ci`].
    Ci,
}

impl Which {
    fn series(&self, arch: Arch) -> Result<Vec<&'static str>> {
        match self {
            Self::Named(series) => Ok(series.clone()),
            Self::Ci => kernel::in_ci(arch),
        }
    }
}

fn which(text: &str) -> Result<Which, String> {
    match text {
        "all" => return Ok(Which::Named(KERNELS.to_vec())),
        "ci" => return Ok(Which::Ci),
        _ => {}
    }
    text.split(',')
        .map(|wanted| {
            let known = KERNELS.iter().find(|known| **known == wanted);
            known.copied().ok_or_else(|| {
                format!("there is {}, all, and ci; not {wanted}", KERNELS.join(", "))
            })
        })
        .collect::<Result<_, _>>()
        .map(Which::Named)
}

pub(crate) fn test(arguments: &Arguments) -> Result<ExitCode> {
    paths::require_root(
        "vm-test",
        "the test VMs need root because what they pack may be readable by root alone",
    )?;
    let arch = arguments.arch;
    let mut uses = vec![Use::Build, Use::Tests, Use::Vm];
    if arch == Arch::Aarch64 {
        uses.push(Use::Aarch64);
    }
    let ready = setup::ensure(&uses)?;
    let target = Target::new(arch, &ready.toolchain);
    let series = arguments.kernel.series(arch)?;
    let kernels = kernel::ready(arch, &series)?;
    Userland::ready(arch)?;
    let tests = integration_tests(&target)?;
    let selection = arguments.selection();
    let chosen = selection.of(listed(&target, &tests)?)?;
    let (mut files, variables) = programs(&target, &chosen, arguments.core)?;
    let binary = stripped(&target, &tests)?;
    files.push(packed(binary.clone(), image::TESTS));
    if chosen.iter().any(|name| name.starts_with(WITH_PLUGIN)) {
        files.push(packed(target.release("shunt-cni"), image::PLUGIN));
    }
    files.extend(READ.map(|file| Packed {
        from: paths::root().join(file),
        to: paths::root().join(file),
    }));
    say(format!(
        "{} tests on Linux {} for {}, {} at a time",
        chosen.len(),
        series.join(", "),
        arch.debian(),
        arguments.jobs
    ));
    let run = script(&variables, &selection, arguments.splice.as_deref());
    let limit = Duration::from_secs(arguments.limit * 60);
    let results = side_by_side(&kernels, arguments.jobs, |kernel| {
        in_vm(kernel, &files, &run, (chosen.len() as u64, limit), |line| {
            say(format!("[{}] {line}", kernel.series));
        })
    });
    fs::remove_file(&binary).with_context(|| format!("removing {}", binary.display()))?;
    let mut total = Tally::default();
    let mut good = true;
    for (kernel, result) in kernels.iter().zip(results) {
        let (tally, complaint) = match result {
            Ok(ran) => {
                let (tally, took) = (ran.tally, ran.took.as_secs());
                say(format!("Linux {}: {tally}, in {took} s", kernel.release()));
                (tally, ran.complaint)
            }
            // What the other VMs have found is said as well.
            Err(error) => (Tally::default(), Some(format!("{error:#}"))),
        };
        total += tally;
        if let Some(complaint) = complaint {
            complain(format!("Linux {}: {complaint}", kernel.release()));
            total.failed += u64::from(tally.failed == 0);
            good = false;
        }
    }
    say(total);
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// What tests read of the repository, where it was when they were built: documentation, and
/// something in the directory from which they look for it.
const READ: [&str; 3] = ["docs/splicing.md", "docs/verified.md", "tests/Cargo.toml"];

/// A variable of the tests, and the file that it names.
type Variable = (&'static str, &'static str);

/// The tests that need an agent with another layout of maps, which takes as long to build
/// as the agent.
const WITH_OTHER_AGENT: [&str; 2] = ["another_layout", "another_build"];

/// The tests that start the CNI plugin, which no variable names: it is beside the agent.
const WITH_PLUGIN: &str = "cni::";

/// The programs that these tests start, and the variables that say where they are. The core
/// set has no Envoy: what is not packed is not unpacked.
fn programs(target: &Target, tests: &[String], core: bool) -> Result<(Vec<Packed>, Vec<Variable>)> {
    let mut programs = vec![("SHUNT_BIN", target.release("shunt"), image::AGENT)];
    let needs_other = |name: &String| WITH_OTHER_AGENT.iter().any(|with| name.contains(with));
    if tests.iter().any(needs_other) {
        let other = build::other_agent(target)?;
        programs.push(("SHUNT_OTHER_BIN", other, image::OTHER_AGENT));
    }
    if !core {
        programs.push((
            setup::ENVOY_VARIABLE,
            setup::envoy_for(target.arch())?,
            image::ENVOY,
        ));
    }
    match target {
        Target::Native => build::agent(target)?,
        // It is there, or the one with another layout is in its place.
        Target::Aarch64(_) => drop(integration_tests(target)?),
    }
    Ok(programs
        .into_iter()
        .map(|(variable, from, to)| (packed(from, to), (variable, to)))
        .unzip())
}

fn packed(from: PathBuf, to: &str) -> Packed {
    Packed {
        from,
        to: PathBuf::from(to),
    }
}

/// The binary of the integration tests; for this machine the one that runs here. For arm64
/// it is built with the agent and as that is, so that every crate is compiled once.
fn integration_tests(target: &Target) -> Result<PathBuf> {
    let (subcommand, selection): (_, &[&str]) = match target {
        Target::Native => ("test", &["--no-run"]),
        Target::Aarch64(_) => (
            "build",
            &["--release", "--package", "shunt", "--bin", "shunt"],
        ),
    };
    let messages = target
        .cargo(subcommand, "building the integration tests")
        .args(["--locked", "--message-format", "json-render-diagnostics"])
        .args(selection)
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

/// The same without what only a debugger reads, nine tenths of it; for this run alone.
fn stripped(target: &Target, binary: &Path) -> Result<PathBuf> {
    let to = directory()?.join(format!(
        "integration-{}.{}",
        process::id(),
        session::STRIPPED
    ));
    target
        .strip("making the test binary smaller")
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

/// The names of the integration tests.
fn listed(target: &Target, tests: &Path) -> Result<Vec<String>> {
    let list = target
        .program(tests, "listing the integration tests")
        .args(["--list", "--format", "terse"])
        .output()?;
    let names = list.lines().filter_map(|line| line.strip_suffix(": test"));
    Ok(names.map(str::to_owned).collect())
}

/// The tests with real programs.
const WITHOUT: &str = "programs::";

/// Which tests run.
#[derive(Clone, Debug)]
enum Selection {
    /// All but those of [`WITHOUT`].
    All,
    /// Those whose name contains one of these words.
    Named(Vec<String>),
}

impl Selection {
    fn named(words: &[impl AsRef<str>]) -> Self {
        Self::Named(words.iter().map(|word| word.as_ref().to_owned()).collect())
    }

    /// Those of the tests with these names that it selects; an error if a word of it is in
    /// none of them.
    fn of(&self, mut names: Vec<String>) -> Result<Vec<String>> {
        let Self::Named(words) = self else {
            names.retain(|name| !name.contains(WITHOUT));
            return Ok(names);
        };
        for word in words {
            ensure!(
                names.iter().any(|name| name.contains(word)),
                "no test has a name that contains {word}; `cargo test -p shunt-tests --test \
                 integration -- --list` shows them all"
            );
        }
        names.retain(|name| words.iter().any(|word| name.contains(word)));
        Ok(names)
    }

    /// As arguments of the test runner, in a script.
    fn arguments(&self) -> String {
        match self {
            Self::All => format!("--skip {WITHOUT}"),
            Self::Named(words) => words
                .iter()
                .map(|word| format!("'{}'", word.replace('\'', r"'\''")))
                .collect::<Vec<_>>()
                .join(" "),
        }
    }
}

/// What a VM does: the tests, as on this machine.
fn script(variables: &[Variable], selection: &Selection, splice: Option<&str>) -> String {
    let mode = splice.map(|mode| (test::SPLICE, mode));
    let set: Vec<_> = variables
        .iter()
        .copied()
        .chain(mode)
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    let show = if splice.is_some() { test::SHOW } else { "" };
    format!(
        "export {}\n{} {show} {} >{RESULTS} 2>&1 </dev/null\n",
        set.join(" "),
        image::TESTS,
        selection.arguments()
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
/// `expected` is how many tests there have to be.
fn in_vm(
    kernel: &Kernel,
    files: &[Packed],
    run: &str,
    (expected, limit): (u64, Duration),
    mut see: impl FnMut(&str),
) -> Result<Ran> {
    let start = Instant::now();
    let mut counted = None;
    let session = Session::run(&kernel.series, kernel, files, run, limit, |line| {
        see(line);
        counted = Tally::from_line(line).or(counted);
    })?;
    let complaint = match complaint(session.end, counted, (expected, limit)) {
        None => kernels_own(session.console())?,
        some => some,
    };
    let complaint = match complaint {
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

/// What its kernel says of itself, on its console, when something is wrong with it.
fn kernels_own(console: &Path) -> Result<Option<String>> {
    /// What the lines begin with, after the time. (That a processor was busy for long says
    /// nothing in an emulated machine.)
    const WRONG: [&str; 5] = ["WARNING: ", "BUG: ", "Oops: ", "KASAN: ", "UBSAN: "];
    let text = fs::read(console).with_context(|| format!("reading {}", console.display()))?;
    let text = String::from_utf8_lossy(&text);
    let mut messages = text.lines().filter_map(|line| {
        let (time, message) = line.trim_start().strip_prefix('[')?.split_once("] ")?;
        time.trim().parse::<f64>().ok().map(|_seconds| message)
    });
    let wrong = messages.find(|message| WRONG.iter().any(|wrong| message.starts_with(wrong)));
    Ok(wrong.map(|message| format!("its kernel says: {message}")))
}

/// Why a VM that ended like this and whose tests counted that is no success: only
/// what the tests say is one, and only if it was said of all of them.
fn complaint(
    end: End,
    counted: Option<Tally>,
    (expected, limit): (u64, Duration),
) -> Option<String> {
    match (counted, end) {
        (None, End::TimeLimit) => Some(format!(
            "it was not done after {} minutes",
            limit.as_secs() / 60
        )),
        (None, End::Itself) => Some("it ended before the tests did".to_owned()),
        (Some(tally), _) if tally.failed > 0 => Some(format!("{} failed", tally.failed)),
        (Some(tally), _) if tally.ignored > 0 => Some(format!("{} ignored", tally.ignored)),
        (Some(tally), _) if tally.passed != expected => {
            Some(format!("{} ran of {expected}", tally.passed))
        }
        (Some(_), _) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_tests_say_is_a_success() {
        let asked = (3, Duration::from_secs(60));
        let tally = |passed, failed, ignored| Tally {
            passed,
            failed,
            ignored,
            ..Tally::default()
        };
        assert_eq!(complaint(End::Itself, Some(tally(3, 0, 0)), asked), None);
        for (end, counted) in [
            (End::Itself, None),
            (End::TimeLimit, None),
            (End::Itself, Some(tally(2, 1, 0))),
            (End::Itself, Some(tally(3, 0, 1))),
            (End::Itself, Some(tally(2, 0, 0))),
            (End::Itself, Some(tally(0, 0, 0))),
        ] {
            assert!(complaint(end, counted, asked).is_some(), "{counted:?}");
        }
    }

    #[test]
    fn kernels_are_chosen_by_their_series() {
        let chosen = |text| which(text).ok();
        assert_eq!(chosen("all"), Some(Which::Named(KERNELS.to_vec())));
        assert_eq!(chosen("6.1,7.2"), Some(Which::Named(vec!["6.1", "7.2"])));
        assert_eq!(chosen("ci"), Some(Which::Ci));
        assert_eq!(chosen("5.15"), None);
    }

    #[test]
    fn a_filter_is_one_word_for_the_shell() {
        assert_eq!(Selection::All.arguments(), "--skip programs::");
        let filters = Selection::named(&["check::", "it's"]);
        assert_eq!(filters.arguments(), r"'check::' 'it'\''s'");
        let set = [("A", "/a"), ("B", "/b")];
        let plain = script(&set, &filters, None);
        assert!(plain.starts_with("export A=/a B=/b\n"), "{plain}");
        let forced = script(&set, &filters, Some("all"));
        let wanted = "export A=/a B=/b SHUNT_TEST_SPLICE=all\n";
        assert!(forced.starts_with(wanted), "{forced}");
        assert!(forced.contains(" --show-output "), "{forced}");
    }

    #[test]
    fn a_word_that_selects_nothing_is_an_error() {
        let names = ["check::a", "check::b", "programs::c"].map(str::to_owned);
        let of = |selection: &Selection| selection.of(names.to_vec()).ok();
        let count = |words: &[&str]| of(&Selection::named(words)).map(|names| names.len());
        assert_eq!(of(&Selection::All), Some(names[..2].to_vec()));
        assert_eq!(count(&["check::", "a"]), Some(3));
        assert_eq!(count(&["check::b"]), Some(1));
        assert_eq!(count(&["check::", "no such"]), None);
    }
}
