//! `cargo xtask vm`: a virtual machine to play with.

use std::{
    io::{self, IsTerminal as _, Read as _},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use super::{
    image::{self, RESULTS},
    kernel::{self, KERNELS, Kernel},
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
    /// How long it may take where there are commands, in minutes
    #[arg(long, value_name = "MINUTES", default_value_t = 10)]
    limit: u64,
}

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
    match commands {
        Some(commands) => {
            let limit = Duration::from_secs(arguments.limit * 60);
            run(kernel, &commands, limit)
        }
        None => shell(kernel),
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

/// A shell on the console, which is this terminal.
fn shell(kernel: &Kernel) -> Result<ExitCode> {
    say(format!(
        "Linux {}: a shell comes when the pods are there; `exit` ends the VM, and so does Ctrl-A X",
        kernel.release()
    ));
    // With a terminal of its own, or Ctrl-C would be for the VM's first process.
    let run = script(&format!("setsid cttyhack {DEMO} --stay"));
    let status = with_image("dev", kernel, &files()?, &run, |machine| machine.attached())?;
    if !status.success() {
        bail!("QEMU failed: {status}");
    }
    Ok(ExitCode::SUCCESS)
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
    fn commands_may_be_an_argument() {
        let arguments = Arguments {
            kernel: "6.12".to_owned(),
            run: Some("shunt status".to_owned()),
            limit: 10,
        };
        let commands = arguments.commands().expect("no input is read");
        assert_eq!(commands.as_deref(), Some("shunt status"));
    }
}
