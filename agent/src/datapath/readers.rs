//! Programs that look at an element of a map while the agent replaces it.

use std::{thread, time::Duration};

use nix::unistd::{SysconfVar, sysconf};
use rustix::thread::{MembarrierCommand, membarrier};

/// The kernel may give the memory of a replaced or removed element to the next one
/// that is inserted, at once (`bpf_mem_cache_free`, Linux 6.1), while a program that
/// found the old one still reads it. It would then see another pod's settings.
/// Programs run inside an RCU read-side section, so the next insertion waits until
/// those that had begun are done.
#[derive(Debug, Default)]
pub(super) struct Readers {
    freed: bool,
}

/// What a program takes at most, with very much to spare: they run for
/// microseconds.
const LONGEST_RUN: Duration = Duration::from_millis(20);

impl Readers {
    /// An element was replaced or removed.
    pub(super) fn note_freed(&mut self) {
        self.freed = true;
    }

    /// Waits for those who may still read one, if there are any.
    pub(super) fn wait_for_readers(&mut self) {
        if !self.freed {
            return;
        }
        // This command is `synchronize_rcu()`, but for a kernel that keeps timer
        // ticks off some processors (nohz_full), which does not have it, and one
        // with a single processor, where it does nothing.
        if is_alone() || membarrier(MembarrierCommand::Global).is_err() {
            thread::sleep(LONGEST_RUN);
        }
        self.freed = false;
    }
}

/// Whether there is but one processor.
fn is_alone() -> bool {
    matches!(sysconf(SysconfVar::_NPROCESSORS_ONLN), Ok(Some(1)))
}
