//! Processes that run beside a test: agent, proxy, server.

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::process::CommandExt,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::{
    sys::{
        signal::{Signal, kill},
        wait::{Id, WaitPidFlag, waitid},
    },
    unistd::Pid,
};

use crate::command::line_of;

/// How long a process may take to end after SIGTERM.
const STOP_DEADLINE: Duration = Duration::from_secs(60);

/// A child process whose output is kept. On drop it is told to end (SIGTERM)
/// and waited for; when the test panics its output is printed.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    watched: Arc<Watched>,
    watchers: Vec<JoinHandle<()>>,
}

/// What the threads that watch a process know of it.
#[derive(Debug, Default)]
struct Watched {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    lines: Vec<String>,
    exited: bool,
}

impl Watched {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn update(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// Waits until `found` gives something, or `deadline` is over.
    fn wait_for<T>(
        &self,
        deadline: Duration,
        mut found: impl FnMut(&State) -> Option<T>,
    ) -> Option<T> {
        let end = Instant::now() + deadline;
        let mut state = self.lock();
        loop {
            if let Some(found) = found(&state) {
                return Some(found);
            }
            let left = end.checked_duration_since(Instant::now())?;
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

impl Process {
    /// Starts `command`; `name` is what messages call it.
    ///
    /// # Panics
    ///
    /// When it cannot be started.
    pub fn spawn(name: &str, command: &mut Command) -> Self {
        let line = line_of(command);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // Ctrl-C is for us, who then end it in our own order.
            .process_group(0)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {name} (`{line}`): {error}"));
        let watched = Arc::new(Watched::default());
        let watchers = vec![
            keep_lines(&watched, child.stdout.take().expect("it was asked for")),
            keep_lines(&watched, child.stderr.take().expect("it was asked for")),
            watch_for_exit(&watched, pid_of(&child)),
        ];
        Self {
            name: name.to_owned(),
            child,
            watched,
            watchers,
        }
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        pid_of(&self.child)
    }

    /// Waits until it has written a line that contains `needle`, to standard
    /// output or standard error, and returns the line.
    ///
    /// # Panics
    ///
    /// When it ends first, or `deadline` is over.
    pub fn wait_for_line(&self, needle: &str, deadline: Duration) -> String {
        self.wait_for_line_that(&format!("{needle:?}"), deadline, |line| {
            line.contains(needle).then(|| line.to_owned())
        })
    }

    /// Waits until it has written a line in which `find` finds something; the
    /// message calls it `what`.
    ///
    /// # Panics
    ///
    /// When it ends first, or `deadline` is over.
    pub fn wait_for_line_that<T>(
        &self,
        what: &str,
        deadline: Duration,
        find: impl Fn(&str) -> Option<T>,
    ) -> T {
        let found = self.watched.wait_for(deadline, |state| {
            let found = state.lines.iter().find_map(|line| find(line));
            match found {
                Some(found) => Some(Some(found)),
                None => state.exited.then_some(None),
            }
        });
        match found {
            Some(Some(found)) => found,
            Some(None) => panic!("{} ended before it wrote {what}", self.name),
            None => panic!("{} did not write {what} within {deadline:?}", self.name),
        }
    }

    /// Writes a line to its standard input.
    ///
    /// # Panics
    ///
    /// When it does not read any more.
    pub fn tell(&mut self, line: &str) {
        let stdin = self.child.stdin.as_mut().expect("it was asked for");
        writeln!(stdin, "{line}")
            .unwrap_or_else(|error| panic!("{} does not listen: {error}", self.name));
    }

    /// Whether it has ended by itself.
    pub fn has_exited(&self) -> bool {
        self.watched.lock().exited
    }

    /// What it has written so far, to standard output and standard error.
    pub fn output(&self) -> String {
        self.watched.lock().lines.join("\n")
    }

    /// Tells it to end and waits until it has.
    ///
    /// # Panics
    ///
    /// When it does not end in time; it is killed then.
    pub fn stop(mut self) -> ExitStatus {
        let (status, obeyed) = self.end(Signal::SIGTERM);
        assert!(
            obeyed,
            "{} did not end within {STOP_DEADLINE:?} of SIGTERM and was killed",
            self.name
        );
        status
    }

    /// Kills it without a warning, as the kernel does when memory is short.
    pub fn kill(mut self) {
        self.end(Signal::SIGKILL);
    }

    /// Ends and reaps it; also tells whether `signal` was enough.
    fn end(&mut self, signal: Signal) -> (ExitStatus, bool) {
        let exited = |state: &State| state.exited.then_some(());
        // It stays a zombie until `wait` below, so the id is still its own.
        let _ = kill(self.pid(), signal);
        let obeyed = self.watched.wait_for(STOP_DEADLINE, exited).is_some();
        if !obeyed {
            let _ = kill(self.pid(), Signal::SIGKILL);
        }
        let status = self.child.wait().expect("a child can be waited for");
        // A child that inherited the pipes may keep them open: not waited for.
        self.watchers.clear();
        (status, obeyed)
    }

    fn print_output(&self) {
        #[expect(clippy::print_stderr, reason = "evidence of a failed test")]
        {
            eprintln!("--- output of {}\n{}\n---", self.name, self.output());
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.watchers.is_empty() {
            self.end(Signal::SIGTERM);
        }
        if thread::panicking() {
            self.print_output();
        }
    }
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).expect("process ids are small"))
}

fn keep_lines(watched: &Arc<Watched>, stream: impl Read + Send + 'static) -> JoinHandle<()> {
    let watched = Arc::clone(watched);
    thread::spawn(move || {
        let mut stream = BufReader::new(stream);
        let mut line = Vec::new();
        // Not `lines()`: one byte that is no UTF-8 must not end the watch.
        while stream
            .read_until(b'\n', &mut line)
            .is_ok_and(|read| read > 0)
        {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            watched.update(|state| state.lines.push(text));
            line.clear();
        }
    })
}

fn watch_for_exit(watched: &Arc<Watched>, pid: Pid) -> JoinHandle<()> {
    let watched = Arc::clone(watched);
    thread::spawn(move || {
        // WNOWAIT leaves a zombie behind, so that the process id cannot become
        // another process's before this one is reaped.
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
        while waitid(Id::Pid(pid), flags) == Err(nix::errno::Errno::EINTR) {}
        watched.update(|state| state.exited = true);
    })
}
