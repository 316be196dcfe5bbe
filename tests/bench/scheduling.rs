//! Who runs when two want the same processor.

use nix::{errno::Errno, libc};

/// How the kernel chooses among processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Policy {
    /// By turns.
    Usual,
    /// Before all the usual ones: what a `connect()` wakes up runs after it, not in
    /// the middle of it.
    First,
}

impl Policy {
    fn code(self) -> (i32, i32) {
        match self {
            Self::Usual => (libc::SCHED_OTHER, 0),
            Self::First => (libc::SCHED_FIFO, 1),
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
