//! Agents and enrolments come and go in the middle of a transfer.

use std::{
    fs,
    net::{Shutdown, TcpStream},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use nix::libc;
use shunt_tests::{
    Agent,
    agent::{Place, binary, other_binary},
    blocked::Blocked,
    deadline::wait_until,
    held::Held,
    mesh::ISTIO_DEFAULTS,
};

use super::pair::{Hop, Lab, Pair, Random, fill, pattern, receive, send};

/// Sends and reads while `meanwhile` runs, and compares everything.
fn transfer(pair: &Pair, meanwhile: impl FnOnce()) {
    let bytes = pattern(1 << 20);
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let forth = scope.spawn(|| rounds(&pair.client, &bytes, &over));
        let back = scope.spawn(|| rounds(&pair.server, &bytes, &over));
        let read_forth = scope.spawn(|| compare(&pair.server, &bytes));
        let read_back = scope.spawn(|| compare(&pair.client, &bytes));
        {
            // Also when it fails: the others would go on for ever.
            let _over = OverOnDrop(&over);
            meanwhile();
        }
        let (forth, back) = (forth.join(), back.join());
        assert_eq!(
            read_forth.join().expect("it is the same"),
            forth.expect("it is sent")
        );
        assert_eq!(
            read_back.join().expect("it is the same"),
            back.expect("it is sent")
        );
    });
}

/// Says that it is over.
struct OverOnDrop<'a>(&'a AtomicBool);

impl Drop for OverOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Sends the bytes again and again, until it is over; how often.
fn rounds(end: &TcpStream, bytes: &[u8], over: &AtomicBool) -> u64 {
    let mut random = Random(7);
    let mut rounds = 0;
    while !over.load(Ordering::Relaxed) {
        let mut rest = bytes;
        while !rest.is_empty() {
            let piece = random.length(200_000).min(rest.len());
            send(end, &rest[..piece]);
            rest = &rest[piece..];
        }
        rounds += 1;
    }
    end.shutdown(Shutdown::Write).expect("it is open");
    rounds
}

/// Reads to the end; how often the bytes came.
fn compare(end: &TcpStream, bytes: &[u8]) -> u64 {
    let mut rounds = 0;
    loop {
        let read = receive(end, bytes.len());
        if read.is_empty() {
            return rounds;
        }
        assert!(
            read == bytes,
            "round {rounds} was another one ({} bytes)",
            read.len()
        );
        rounds += 1;
    }
}

/// How an agent ends, and leaves its place.
type End = fn(Agent) -> Place;

/// An agent ends in the middle of a transfer and another starts, again and again.
fn end_and_start(lab: &mut Lab, end: End) {
    let pair = lab.spliced();
    transfer(&pair, || {
        for _ in 0..3 {
            let place = end(lab.take_agent());
            lab.start_agent(place);
        }
    });
}

/// An application that sends more than its proxy reads is taken out of the map for a while.
#[test]
fn an_application_may_come_and_go() {
    let lab = Lab::on(Hop::IntoProxy);
    let pair = lab.spliced();
    transfer(&pair, || {
        for _ in 0..4 {
            lab.splices_more();
            lab.splices_nothing();
        }
    });
}

#[test]
fn an_agent_may_end_and_another_start() {
    for hop in Hop::BOTH {
        end_and_start(&mut Lab::on(hop), Agent::stop);
    }
}

#[test]
fn an_agent_may_be_killed_and_another_start() {
    for hop in Hop::BOTH {
        end_and_start(&mut Lab::on(hop), Agent::kill);
    }
}

#[test]
fn a_pod_may_be_unenrolled_and_enrolled_again() {
    for hop in Hop::BOTH {
        let lab = Lab::on(hop);
        let pair = lab.spliced();
        transfer(&pair, || {
            for _ in 0..5 {
                lab.splices_more();
                lab.unenroll();
                lab.enroll(&ISTIO_DEFAULTS);
            }
        });
        let pair = lab.spliced();
        let off = [&ISTIO_DEFAULTS[..], &["--splice", "off"]].concat();
        transfer(&pair, || {
            for _ in 0..2 {
                lab.splices_more();
                lab.enroll(&off);
                lab.enroll(&ISTIO_DEFAULTS);
            }
        });
    }
}

/// What was spliced and not read is still there when the agent has ended, however
/// it ended, and when the next one has started.
#[test]
fn what_a_sleeping_reader_has_not_read_outlives_the_agent() {
    for hop in Hop::BOTH {
        let mut lab = Lab::on(hop);
        for end in [Agent::stop as End, Agent::kill] {
            let pair = lab.spliced();
            lab.send_spliced(&pair, b"read this later");
            let place = end(lab.take_agent());
            lab.start_agent(place);
            send(&pair.client, b", and this");
            assert_eq!(receive(&pair.server, 25), b"read this later, and this");
        }
    }
}

/// A sender that has decided to splice has to wait for its reader's lock, for longer than an
/// agent takes to end. What it sends comes, although nothing of it is there any more when it is
/// read: the map of a reader lives as long as an agent, a pin, or a sender. Nor does the next agent
/// take it away, which finds nothing unread in it.
#[test]
fn what_is_about_to_be_given_outlives_the_agent() {
    let bytes = b"this takes a while";
    for hop in Hop::BOTH {
        let mut lab = Lab::on(hop);
        let pair = lab.spliced();
        let before = lab.spliced_bytes();
        let held = Held::new(&pair.server);
        let client = pair.client.try_clone().expect("it is open");
        let sending = Blocked::in_call(libc::SYS_sendto, move || send(&client, bytes));
        assert_eq!(lab.spliced_bytes() - before, bytes.len() as u64);
        let place = lab.take_agent().stop();
        let bpffs = place.bpffs();
        assert!(has_left(&bpffs), "{hop:?}: the agent has left nothing");
        let next = Agent::start_with(place, hop.arguments());
        wait_until("the next agent to have looked at what was left", || {
            let waits = next.waits_of("left").unwrap_or(u64::MAX);
            (waits >= 8).then_some(()).ok_or(format!("{waits} pauses"))
        });
        assert!(
            has_left(&bpffs),
            "{hop:?}: the next agent has taken it away"
        );
        assert!(!sending.has_ended(), "the reader's lock was not held");
        held.release();
        sending.answer();
        drop(pair.client);
        assert_eq!(receive(&pair.server, bytes.len() + 1), bytes);
        wait_until("what was left to go", || {
            (!has_left(&bpffs))
                .then_some(())
                .ok_or("it is there".to_owned())
        });
        next.stop();
    }
}

/// Whether an agent that has ended has left maps there.
fn has_left(bpffs: &Path) -> bool {
    let mut pins = fs::read_dir(bpffs).expect("an agent's place").flatten();
    pins.any(|pin| pin.file_name().to_string_lossy().starts_with("LEFT_"))
}

/// How many rounds a test of replacements makes.
const ROUNDS: usize = 2;

/// A connection whose reader sleeps while agents come and go.
struct Sleeper<'a> {
    pair: Pair,
    bytes: &'a [u8],
    sent: usize,
}

impl<'a> Sleeper<'a> {
    /// One with bytes that were spliced and are unread.
    fn new(lab: &Lab, bytes: &'a [u8]) -> Self {
        let pair = lab.spliced();
        let sent = 1000;
        lab.send_spliced(&pair, &bytes[..sent]);
        Self { pair, bytes, sent }
    }

    /// Sends more in small messages, as far as somebody takes them.
    fn send(&mut self, most: usize) {
        let upto = self.bytes.len().min(self.sent.saturating_add(most));
        self.sent += fill(&self.pair.client, &self.bytes[self.sent..upto], 1000);
    }

    /// The rest is sent, and everything is read: each byte once, and in order.
    fn wakes_up(self) {
        let Self { pair, bytes, sent } = self;
        thread::scope(|scope| {
            let reader = scope.spawn(|| receive(&pair.server, bytes.len()));
            send(&pair.client, &bytes[sent..]);
            let read = reader.join().expect("a reader");
            let same = read.iter().zip(bytes).take_while(|(a, b)| a == b).count();
            assert_eq!(same, bytes.len(), "so many bytes were right");
        });
        pair.client.shutdown(Shutdown::Write).expect("it is open");
        assert_eq!(receive(&pair.server, 1), b"", "more than was sent");
    }
}

/// An agent that leaves everything in force ends, and another takes its place, while one
/// connection is busy in both directions, somebody has a few bytes that are unread, and
/// somebody has as many as fit. All of them were spliced just before.
fn replace(lab: &mut Lab, end: End, next: &Path, bytes: &[u8]) {
    let busy = lab.spliced();
    let mut few = Sleeper::new(lab, &bytes[..100_000]);
    let mut many = Sleeper::new(lab, bytes);
    many.send(usize::MAX);
    assert!(
        many.sent < bytes.len(),
        "everything was taken, and nobody reads"
    );
    transfer(&busy, || {
        lab.splices_more();
        few.send(5000);
        let place = end(lab.take_agent());
        few.send(5000);
        many.send(usize::MAX);
        let arguments = lab.hop().arguments();
        lab.set_agent(Agent::start_persistent(place, next, arguments));
        few.send(5000);
        many.send(usize::MAX);
    });
    few.wakes_up();
    many.wakes_up();
}

/// Replaces agents in this way, by each of these again and again.
fn replacements(end: End, next: &[PathBuf]) {
    let bytes = pattern(64 << 20);
    for hop in Hop::BOTH {
        let mut lab = Lab::without_agent(hop);
        let place = Place::new(lab.cgroup());
        lab.set_agent(Agent::start_persistent(place, &binary(), hop.arguments()));
        lab.enroll(&ISTIO_DEFAULTS);
        for next in next.iter().cycle().take(ROUNDS) {
            replace(&mut lab, end, next, &bytes);
        }
        // The last of them splices, too.
        lab.spliced();
    }
}

#[test]
fn an_agent_that_leaves_everything_in_force_may_end_and_another_start() {
    replacements(Agent::stop, &[binary()]);
}

#[test]
fn an_agent_that_leaves_everything_in_force_may_be_killed_and_another_start() {
    replacements(Agent::kill, &[binary()]);
}

/// Whose maps of connections and of settings are others.
#[test]
fn an_agent_may_end_and_one_of_another_build_start() {
    replacements(Agent::stop, &[other_binary(), binary()]);
}

#[test]
fn an_agent_may_be_killed_and_one_of_another_build_start() {
    replacements(Agent::kill, &[other_binary(), binary()]);
}
