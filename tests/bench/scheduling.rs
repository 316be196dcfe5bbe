//! Who runs when two want the same processor.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use nix::{errno::Errno, libc};

use crate::role::{Cores, on_core};

/// How the kernel chooses among processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Policy {
    /// By turns.
    Usual,
    /// Before all the usual ones: what a `connect()` wakes up runs after it, not in
    /// the middle of it.
    First,
    /// Only where nobody else wants to.
    Last,
}

impl Policy {
    fn code(self) -> (i32, i32) {
        match self {
            Self::Usual => (libc::SCHED_OTHER, 0),
            Self::First => (libc::SCHED_FIFO, 1),
            Self::Last => (libc::SCHED_IDLE, 0),
        }
    }
}

/// Runs `work`, whose child processes have this policy.
///
/// # Panics
///
/// When the kernel refuses.
pub(crate) fn with_policy<T>(policy: Policy, work: impl FnOnce() -> T) -> T {
    set(policy);
    let done = work();
    set(Policy::Usual);
    done
}

/// Sets it for this thread.
fn set(policy: Policy) {
    let (policy, priority) = policy.code();
    let parameters = libc::sched_param {
        sched_priority: priority,
    };
    // SAFETY: the kernel reads the parameters, which outlive the call.
    let done = unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) };
    Errno::result(done).unwrap_or_else(|error| {
        panic!("cannot change the scheduling policy to {policy}: {error}; this needs root")
    });
}

/// Keeps processors from sleeping, by threads that run where nobody else wants to. A
/// virtual processor that sleeps is woken by its host, which takes tens of microseconds,
/// never the same, in each of the four changes between processes of a request.
#[derive(Debug)]
pub(crate) struct Awake {
    enough: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Awake {
    /// Until the result is dropped.
    pub(crate) fn keep(cores: Cores) -> Self {
        let enough = Arc::new(AtomicBool::new(false));
        let start = |core| {
            let enough = Arc::clone(&enough);
            thread::spawn(move || on_core(core, || run_last(&enough)))
        };
        let threads = vec![start(cores.client), start(cores.server)];
        Self { enough, threads }
    }
}

fn run_last(enough: &AtomicBool) {
    set(Policy::Last);
    while !enough.load(Ordering::Relaxed) {
        std::hint::spin_loop();
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        self.enough.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // One that has panicked has said so.
            let _ = thread.join();
        }
    }
}
