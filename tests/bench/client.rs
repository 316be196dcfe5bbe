//! The application that calls, as whoever measures has it.

use std::time::Duration;

use serde::de::DeserializeOwned;
use shunt_tests::{Netns, Owner, Process, deadline::DEADLINE};

use crate::{
    load::Job,
    role::{Role, on_core},
    scheduling::with_precedence,
};

/// A process that works when it is told to, and rests in between. So many can take turns
/// of a few milliseconds: what disturbs the machine for a second disturbs all of them.
#[derive(Debug)]
pub(crate) struct Client {
    process: Process,
    turns: u32,
}

impl Client {
    /// Starts it, as an application that keeps to one processor.
    ///
    /// # Panics
    ///
    /// When it cannot be started, or cannot connect.
    pub(crate) fn start(netns: &Netns, core: usize, job: Job) -> Self {
        let wants_precedence = job.wants_precedence();
        let role = Role::Client(job);
        let start = || role.start(netns, Owner::APP);
        let process = on_core(core, || {
            if wants_precedence {
                with_precedence(start)
            } else {
                start()
            }
        });
        Self { process, turns: 0 }
    }

    /// Lets it work for `time`, and returns what it measured.
    ///
    /// # Panics
    ///
    /// When it fails.
    pub(crate) fn work<T: DeserializeOwned>(&mut self, time: Duration) -> T {
        let number = format!("{} ", self.turns);
        self.turns += 1;
        self.process.tell(&time.as_nanos().to_string());
        let measured = |line: &str| line.strip_prefix(&number).map(str::to_owned);
        let json = self
            .process
            .wait_for_line_that("what it measured", time + DEADLINE, measured);
        serde_json::from_str(&json).unwrap_or_else(|error| panic!("{error}: {json}"))
    }
}
