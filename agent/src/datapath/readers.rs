//! Programs that look at an element of a map while the agent replaces it.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::unistd::{SysconfVar, sysconf};
use rustix::thread::{MembarrierCommand, membarrier};

/// The kernel may give the memory of a replaced or removed element to the next one
/// that is inserted, at once (`bpf_mem_cache_free`, Linux 6.1), while a program that
/// found the old one still reads it. It would then see another pod's settings.
/// Programs run inside an RCU read-side section, so the next insertion waits until
/// those that had begun are done.
///
/// That takes the kernel some ten milliseconds, in which a pod would wait for its
/// enrolment. So a thread of its own begins to wait as soon as something is freed; as a
/// rule it is over long before the next insertion.
#[derive(Debug)]
pub(super) struct Readers(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    counts: Mutex<Counts>,
    changed: Condvar,
}

/// How often an element was freed.
#[derive(Debug, Default)]
struct Counts {
    all: u64,
    /// Those that no program reads any more.
    unread: u64,
    /// Nobody will ask again.
    ended: bool,
}

/// What a program takes at most, with very much to spare: they run for
/// microseconds.
const LONGEST_RUN: Duration = Duration::from_millis(20);

impl Readers {
    /// Starts the thread.
    ///
    /// # Errors
    ///
    /// When the system has none left.
    pub(super) fn new() -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let waiter = Arc::clone(&shared);
        thread::Builder::new()
            .name("readers".to_owned())
            .spawn(move || waiter.wait_for_each())
            .context("cannot start a thread that waits for the programs")?;
        Ok(Self(shared))
    }

    /// An element was replaced or removed.
    pub(super) fn note_freed(&self) {
        self.0.lock().all += 1;
        self.0.changed.notify_all();
    }

    /// Waits for those who may still read one, if there are any.
    pub(super) fn wait_for_readers(&self) {
        let mut counts = self.0.lock();
        let all = counts.all;
        while counts.unread < all {
            counts = self.0.wait(counts);
        }
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.0.lock().ended = true;
        self.0.changed.notify_all();
    }
}

impl Shared {
    /// Waits for the readers of whatever is freed, until nobody asks any more.
    fn wait_for_each(&self) {
        let mut counts = self.lock();
        while !counts.ended {
            let all = counts.all;
            if counts.unread == all {
                counts = self.wait(counts);
                continue;
            }
            drop(counts);
            wait_for_programs();
            counts = self.lock();
            counts.unread = all;
            self.changed.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, counts: MutexGuard<'a, Counts>) -> MutexGuard<'a, Counts> {
        self.changed
            .wait(counts)
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits until every program that has begun is done.
fn wait_for_programs() {
    // This command is `synchronize_rcu()`, but for a kernel that keeps timer
    // ticks off some processors (nohz_full), which does not have it, and one
    // with a single processor, where it does nothing.
    if is_alone() || membarrier(MembarrierCommand::Global).is_err() {
        thread::sleep(LONGEST_RUN);
    }
}

/// Whether there is but one processor.
fn is_alone() -> bool {
    matches!(sysconf(SysconfVar::_NPROCESSORS_ONLN), Ok(Some(1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_was_freed_before_is_waited_for() {
        let readers = Readers::new().expect("a thread");
        readers.wait_for_readers();
        for freed in 1..=3 {
            readers.note_freed();
            readers.wait_for_readers();
            assert_eq!(readers.0.lock().unread, freed);
        }
    }

    #[test]
    fn the_thread_ends_when_nobody_asks_any_more() {
        let readers = Readers::new().expect("a thread");
        readers.note_freed();
        let shared = Arc::downgrade(&readers.0);
        drop(readers);
        while shared.upgrade().is_some() {
            thread::yield_now();
        }
    }
}
