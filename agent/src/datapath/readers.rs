//! Programs that look at an element of a map while the agent replaces it.

use std::{thread, time::Duration};

use rustix::thread::{MembarrierCommand, membarrier};

/// The kernel may give the memory of a replaced or removed element to the next one
/// that is inserted, at once (`bpf_mem_cache_free`, Linux 6.1), while a program that
/// found the old one still reads it. It would then see another pod's settings.
/// Programs run inside an RCU read-side section, so the next insertion waits until
/// those that had begun are done.
#[derive(Debug, Default)]
pub(super) struct Readers {
    hold_freed: bool,
}

/// What a program takes at most, with much to spare.
const LONGEST_RUN: Duration = Duration::from_millis(20);

impl Readers {
    /// An element was replaced or removed.
    pub(super) fn may_hold_freed(&mut self) {
        self.hold_freed = true;
    }

    /// Waits for those who may still read one, if there are any.
    pub(super) fn wait(&mut self) {
        if !self.hold_freed {
            return;
        }
        // This command is `synchronize_rcu()`. Kernels that keep timer ticks off
        // some processors (nohz_full) do not have it.
        if membarrier(MembarrierCommand::Global).is_err() {
            thread::sleep(LONGEST_RUN);
        }
        self.hold_freed = false;
    }
}
