//! The programs that stand in the pods: this binary, started once more in a
//! role, so that each has CPU time of its own.

use std::{fs, io::Write, os::unix::process::CommandExt, process::Command, time::Duration};

use nix::{
    errno::Errno,
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    time::clock_getcpuclockid,
    unistd::Pid,
};
use serde::{Deserialize, Serialize};
use shunt_tests::{Netns, Owner, Process, deadline::DEADLINE};

use crate::{
    load::{self, Job},
    proxy::{self, Routes},
    server,
};

/// The first argument of a process that has a role; the second is the role.
pub(crate) const ARGUMENT: &str = "role";

/// What a process that has listened or connected says.
pub(crate) const READY: &str = "ready";

/// What such a process is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Role {
    /// The sidecar.
    Proxy(Routes),
    /// The application that is called, on this port.
    Server(u16),
    /// The application that calls.
    Client(Job),
}

/// Plays the role that `json` describes.
pub(crate) fn play(json: &str) -> anyhow::Result<()> {
    match serde_json::from_str(json)? {
        Role::Proxy(routes) => proxy::run(&routes)?,
        Role::Server(port) => server::run(port)?,
        Role::Client(job) => load::run(&job)?,
    }
    Ok(())
}

/// Tells whoever started this process something.
#[expect(clippy::print_stdout, reason = "the other end of a pipe reads it")]
pub(crate) fn tell(line: &str) {
    println!("{line}");
    // A reader that is gone ends this process by a signal anyway.
    let _ = std::io::stdout().flush();
}

impl Role {
    /// Starts a process in this role; it is ready when this returns.
    ///
    /// # Panics
    ///
    /// When it does not become ready.
    pub(crate) fn start(&self, netns: &Netns, owner: Owner) -> Process {
        let process = self.spawn(netns, owner);
        process.wait_for_line(READY, DEADLINE);
        process
    }

    /// The same without waiting until it says that it is [`READY`].
    ///
    /// # Panics
    ///
    /// When it cannot be started.
    pub(crate) fn spawn(&self, netns: &Netns, owner: Owner) -> Process {
        let name = format!("{} of {}", self.name(), netns.purpose());
        Process::spawn(&name, &mut self.command(netns, owner))
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Proxy(_) => "the proxy",
            Self::Server(_) => "the server",
            Self::Client(_) => "the client",
        }
    }

    fn command(&self, netns: &Netns, owner: Owner) -> Command {
        let json = serde_json::to_string(self).expect("plain data");
        // Not by its path: the owner need not be able to enter the directory.
        let mut command = netns.command("/proc/self/exe", owner);
        // Ctrl-C is for the process that started this one.
        command.args([ARGUMENT, &json]).process_group(0);
        command
    }
}

/// CPU time that a process has used, in user mode and in the kernel.
///
/// # Panics
///
/// When it has ended.
pub(crate) fn cpu_time(pid: Pid) -> Duration {
    clock_getcpuclockid(pid)
        .and_then(nix::time::ClockId::now)
        .map_or_else(
            |error| panic!("process {pid} has no clock: {error}"),
            Duration::from,
        )
}

/// Two processors that the benchmark runs on. The same one twice where there are no two.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cores {
    /// For the pod that calls.
    pub(crate) client: usize,
    /// For the pod that is called, when it has one of its own.
    pub(crate) server: usize,
}

/// How the pods share the processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Placement {
    /// Both have the same one. A request is then as long as all the work for it.
    Together,
    /// Each has one of its own. Pods work at the same time, and wait for each other's
    /// processor to wake up.
    Apart,
}

impl Cores {
    /// The one of the pod that is called.
    pub(crate) fn of_server(self, placement: Placement) -> usize {
        match placement {
            Placement::Together => self.client,
            Placement::Apart => self.server,
        }
    }

    /// The first two that this process may use.
    ///
    /// # Panics
    ///
    /// When the kernel does not say which it may use.
    pub(crate) fn choose() -> Self {
        let allowed = sched_getaffinity(Pid::from_raw(0)).expect("this process has processors");
        let mut numbers = (0..CpuSet::count()).filter(|&number| allowed.is_set(number) == Ok(true));
        let client = numbers.next().unwrap_or(0);
        Self {
            client,
            server: numbers.next().unwrap_or(client),
        }
    }
}

/// Runs `work`, whose child processes keep to processor `core`.
///
/// # Panics
///
/// When the kernel refuses.
pub(crate) fn on_core<T>(core: usize, work: impl FnOnce() -> T) -> T {
    let this_thread = Pid::from_raw(0);
    let before = sched_getaffinity(this_thread).expect("this process has processors");
    keep(this_thread, core).unwrap_or_else(|error| not_kept(core, error));
    let done = work();
    sched_setaffinity(this_thread, &before).expect("it could before");
    done
}

/// Has every thread of a process keep to processor `core`.
///
/// # Panics
///
/// When the kernel refuses, or the process has ended.
pub(crate) fn keep_process(pid: Pid, core: usize) {
    let threads = fs::read_dir(format!("/proc/{pid}/task"))
        .unwrap_or_else(|error| panic!("process {pid} has no threads: {error}"));
    for thread in threads.flatten() {
        let number = thread.file_name().to_string_lossy().parse();
        match keep(Pid::from_raw(number.expect("threads are numbers")), core) {
            // It has ended since they were listed.
            Err(Errno::ESRCH) => {}
            kept => kept.unwrap_or_else(|error| not_kept(core, error)),
        }
    }
}

/// Has a thread keep to processor `core`.
fn keep(thread: Pid, core: usize) -> Result<(), Errno> {
    let mut only = CpuSet::new();
    only.set(core)?;
    sched_setaffinity(thread, &only)
}

fn not_kept(core: usize, error: Errno) -> ! {
    panic!("cannot keep to processor {core}: {error}")
}
