//! `cargo xtask vm`: a virtual machine to play with.

use std::{
    fs,
    io::{self, IsTerminal as _, Read as _},
    process::{self, ExitCode},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use super::{
    directory,
    image::{self, RESULTS},
    kernel::{self, KERNELS, Kernel},
    machine::End,
    packed,
    session::{Session, with_image},
};
use crate::{
    arch::Arch,
    build,
    exec::Step,
    paths, say,
    setup::{self, Use},
};

/// What `cargo xtask vm` takes.
#[derive(clap::Args, Debug)]
pub(crate) struct Arguments {
    /// The kernel: 6.1, 6.12, 6.18 or 7.2
    #[arg(long, value_name = "SERIES", default_value = "6.12", value_parser = KERNELS)]
    kernel: String,
    /// Run these commands instead of a shell, as a shell would; so are commands on standard
    /// input run, where that is no terminal
    #[arg(long, value_name = "COMMANDS")]
    run: Option<String>,
    /// How long it may take, in minutes: 10 for commands unless this says otherwise, and
    /// 720 for a shell
    #[arg(long, value_name = "MINUTES")]
    limit: Option<u64>,
}

/// The default of how long commands may take, and a shell; in minutes.
const FOR_COMMANDS: u64 = 10;
const FOR_A_SHELL: u64 = 12 * 60;

impl Arguments {
    /// The commands; nothing where somebody is there to type them.
    fn commands(&self) -> Result<Option<String>> {
        let mut input = io::stdin();
        if self.run.is_some() || input.is_terminal() {
            return Ok(self.run.clone());
        }
        let mut commands = String::new();
        input
            .read_to_string(&mut commands)
            .context("reading the commands from standard input")?;
        Ok(Some(commands))
    }
}

/// The demo, where it is in the VM.
const DEMO: &str = "/usr/local/bin/demo";

/// Where the work tree is in the VM, whose shell starts there.
const WORK_TREE: &str = "/root/shunt";

/// Where the commands are in the VM.
const COMMANDS: &str = "/vm/commands";

/// What comes before the exit code of the commands.
const ENDED: &str = "the commands ended with ";

pub(crate) fn command(arguments: &Arguments) -> Result<ExitCode> {
    paths::require_root(
        "vm",
        "the VM needs root because what is packed into it may be readable by root alone",
    )?;
    let commands = arguments.commands()?;
    setup::ensure(&[Use::Build, Use::Tests, Use::Vm])?;
    build::agent_and("demo")?;
    let kernels = kernel::ready(Arch::X86_64, &[&arguments.kernel])?;
    let kernel = kernels.first().context("one was asked for")?;
    let limit = |minutes| Duration::from_secs(arguments.limit.unwrap_or(minutes) * 60);
    match commands {
        Some(commands) => run(kernel, &commands, limit(FOR_COMMANDS)),
        None => shell(kernel, limit(FOR_A_SHELL)),
    }
}

/// The script of a VM: the demo, whose pods stay, with these arguments.
fn script(demo: &str) -> String {
    format!(
        "export SHUNT_BIN={} SHUNT_ENVOY={}\ncd {WORK_TREE}\n{demo}\n",
        image::AGENT,
        image::ENVOY
    )
}

fn files() -> Result<Vec<image::Packed>> {
    let mut files = vec![
        packed(paths::release("shunt"), image::AGENT),
        packed(paths::release("demo"), DEMO),
        packed(setup::envoy()?, image::ENVOY),
    ];
    files.extend(work_tree()?);
    Ok(files)
}

/// The files of the work tree as they are now, changes that are not committed included. What
/// git ignores, such as what was built, stays here.
fn work_tree() -> Result<Vec<image::Packed>> {
    let names = Step::new("git", "listing the work tree")
        .args([
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ])
        .dir(&paths::root())
        .remedy("Install git, and make the work tree by `git clone`.")
        .output()?;
    let names = names.split('\0').filter(|name| !name.is_empty());
    let files = names.map(|name| packed(paths::root().join(name), &format!("{WORK_TREE}/{name}")));
    // One that was deleted is still listed.
    Ok(files.filter(|file| file.from.is_file()).collect())
}

/// A shell on the console, which is this terminal. It is a success when the demo ended well
/// in which it was, or somebody ended the VM.
fn shell(kernel: &Kernel, limit: Duration) -> Result<ExitCode> {
    say(format!(
        "Linux {}: a shell comes when the pods are there; `exit` ends the VM, and so does Ctrl-A X",
        kernel.release()
    ));
    // With a terminal of its own, or Ctrl-C would be for the VM's first process.
    let run = script(&format!(
        "setsid cttyhack {DEMO} --stay\necho \"{LEFT}$?\" >/dev/console"
    ));
    let console = directory()?.join(format!("dev-{}.console", process::id()));
    let end = with_image("dev", kernel, &files()?, &run, |machine| {
        machine.attached(&console, limit)
    })?;
    let text = fs::read(&console).with_context(|| format!("reading {}", console.display()))?;
    let code = code_of(&String::from_utf8_lossy(&text));
    match (end, code) {
        (End::TimeLimit, _) => bail!(
            "its {} minutes were over; `--limit` says how many there are; its console: {}",
            limit.as_secs() / 60,
            console.display()
        ),
        (End::Itself, Some(0)) => {
            fs::remove_file(&console).with_context(|| format!("removing {}", console.display()))?;
            Ok(ExitCode::SUCCESS)
        }
        (End::Itself, Some(code)) => bail!(
            "the demo in the VM failed with {code}; its console: {}",
            console.display()
        ),
        (End::Itself, None) => bail!(
            "the VM ended before the shell did; its console: {}",
            console.display()
        ),
    }
}

/// What comes before the exit code of the demo in which the shell was.
const LEFT: &str = "the shell was left, and the demo ended with ";

/// What QEMU writes when somebody has ended it with Ctrl-A X.
const ENDED_BY_HAND: &str = "QEMU: Terminated";

/// The exit code that the VM says on its console; 0 when somebody ended it.
fn code_of(console: &str) -> Option<u8> {
    if console.trim_end().ends_with(ENDED_BY_HAND) {
        return Some(0);
    }
    let said = console
        .lines()
        .rev()
        .find_map(|line| line.trim().strip_prefix(LEFT));
    said?.parse().ok()
}

/// The commands, and what they write. The exit code is theirs.
fn run(kernel: &Kernel, commands: &str, limit: Duration) -> Result<ExitCode> {
    let run = script(&format!(
        "cat >{COMMANDS} <<'{END}'\n{commands}\n{END}\n\
         {DEMO} --stay --run {COMMANDS} >{RESULTS} 2>&1 </dev/null\n\
         echo \"{ENDED}$?\" >{RESULTS}"
    ));
    let mut code: Option<u8> = None;
    let session = Session::run("dev", kernel, &files()?, &run, limit, |line| {
        match line.strip_prefix(ENDED) {
            Some(number) => code = number.parse().ok(),
            None => say(line),
        }
    })?;
    let Some(code) = code else {
        bail!(
            "the VM ended before the commands did, or its time was over; its console: {}",
            session.console().display()
        );
    };
    session.forget()?;
    Ok(ExitCode::from(code))
}

/// A line that ends the commands, and that nobody writes.
const END: &str = "end of the commands of xtask vm";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_console_says_how_the_demo_ended() {
        let console = format!("# exit\r\n{LEFT}3\r\nreboot: Restarting system\r\n");
        assert_eq!(code_of(&console), Some(3));
        assert_eq!(code_of("Kernel panic - not syncing\r\n"), None);
        assert_eq!(code_of("shunt# QEMU: Terminated\r\n"), Some(0));
    }

    #[test]
    fn commands_may_be_an_argument() {
        let arguments = Arguments {
            kernel: "6.12".to_owned(),
            run: Some("shunt status".to_owned()),
            limit: None,
        };
        let commands = arguments.commands().expect("no input is read");
        assert_eq!(commands.as_deref(), Some("shunt status"));
    }
}
