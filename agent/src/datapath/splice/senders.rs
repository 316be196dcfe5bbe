//! Who may still be about to give a reader what he has decided to splice, when maps of sockets
//! are to go.
//!
//! Between the decision and the reader's queue the kernel lets go of the sender's lock. There it
//! may have to wait for the reader's, for memory or for a processor, and a map that goes away
//! meanwhile takes the bytes with it. All that time the call is counted as a user of what makes
//! the sender a member. So a sender that was once seen without a call, after the programs were
//! told to splice nothing more, has given all that it ever will.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use shunt_abi::Unfinished;

/// For how long senders are waited for at least: one that has been taken out of the map in the
/// middle of a call, as an application may be, is not seen by a look at the members.
const QUIET: Duration = Duration::from_millis(200);

/// The senders that may still give something, since nobody begins to.
pub(super) struct Senders {
    /// Since when none is known of.
    since: Instant,
    /// The cookies of those that were in the middle of a call at every look; `None` before the
    /// first one.
    under_way: Option<BTreeSet<u64>>,
}

impl Senders {
    /// To be made when everything goes by TCP.
    pub(super) fn new() -> Self {
        Self {
            since: Instant::now(),
            under_way: None,
        }
    }

    /// Takes in what a look at all members has shown.
    pub(super) fn look(&mut self, members: &[Unfinished]) {
        let calls = members.iter().filter(|member| member.under_way != 0);
        let mut calls: BTreeSet<u64> = calls.map(|member| member.cookie).collect();
        if let Some(before) = &self.under_way {
            calls.retain(|cookie| before.contains(cookie));
        }
        if !calls.is_empty() {
            // Whoever is not there any more has given it, or was taken out.
            self.since = Instant::now();
        }
        self.under_way = Some(calls);
    }

    /// Whether all have given what they had decided to.
    pub(super) fn are_through(&self) -> bool {
        self.since.elapsed() >= QUIET && self.under_way.as_ref().is_some_and(BTreeSet::is_empty)
    }
}

/// Whether something that was spliced waits to be read.
pub(super) fn has_unread(members: &[Unfinished]) -> bool {
    members.iter().any(|member| member.unread != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_a_call(cookie: u64) -> Unfinished {
        Unfinished {
            cookie,
            unread: 0,
            under_way: 1,
        }
    }

    /// The same after [`QUIET`].
    fn later(mut senders: Senders) -> Senders {
        let since = senders.since.checked_sub(QUIET);
        senders.since = since.expect("the machine is up for longer");
        senders
    }

    #[test]
    fn whoever_was_seen_without_a_call_once_is_through() {
        let mut senders = later(Senders::new());
        assert!(!senders.are_through(), "nobody has looked");
        senders.look(&[in_a_call(1), in_a_call(2)]);
        senders.look(&[in_a_call(1)]);
        senders = later(senders);
        assert!(!senders.are_through());
        // Others send by TCP, and so does the second one by now.
        senders.look(&[in_a_call(2), in_a_call(3)]);
        assert!(senders.are_through());
        senders.look(&[in_a_call(1)]);
        assert!(senders.are_through());
    }

    #[test]
    fn one_that_is_no_member_any_more_is_waited_for() {
        let mut senders = Senders::new();
        senders.look(&[]);
        assert!(!senders.are_through());
        senders = later(senders);
        assert!(senders.are_through());
    }

    #[test]
    fn one_that_is_taken_out_late_is_waited_for_as_long() {
        let mut senders = later(Senders::new());
        senders.look(&[in_a_call(1)]);
        senders.look(&[]);
        assert!(!senders.are_through());
        assert!(later(senders).are_through());
    }

    #[test]
    fn what_waits_is_no_call() {
        let unread = Unfinished {
            cookie: 1,
            unread: 1,
            under_way: 0,
        };
        let mut senders = later(Senders::new());
        senders.look(&[unread]);
        assert!(senders.are_through());
        assert!(has_unread(&[in_a_call(2), unread]));
        assert!(!has_unread(&[in_a_call(2)]));
    }
}
