//! Who runs when two want the same processor.

use nix::{errno::Errno, libc};

/// Runs `work`, whose child processes are not interrupted by ordinary ones: what
/// a connect() wakes up runs after it, not in the middle of it.
///
/// # Panics
///
/// When the kernel refuses.
pub(crate) fn with_precedence<T>(work: impl FnOnce() -> T) -> T {
    set_policy(libc::SCHED_FIFO, 1);
    let done = work();
    set_policy(libc::SCHED_OTHER, 0);
    done
}

fn set_policy(policy: i32, priority: i32) {
    let parameters = libc::sched_param {
        sched_priority: priority,
    };
    // SAFETY: the kernel reads the parameters, which outlive the call.
    let done = unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) };
    Errno::result(done).unwrap_or_else(|error| {
        panic!("cannot change the scheduling policy to {policy}: {error}; this needs root")
    });
}
