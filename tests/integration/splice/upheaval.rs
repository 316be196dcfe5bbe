//! Agents and enrolments come and go in the middle of a transfer.

use std::{
    net::TcpStream,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use shunt_tests::mesh::ISTIO_DEFAULTS;

use super::{
    INTO_PROXY,
    pair::{Lab, Pair, Random, pattern, receive, send},
};

/// Sends and reads while `meanwhile` runs, and compares everything.
fn transfer(pair: &Pair, meanwhile: impl FnOnce()) {
    let bytes = pattern(1 << 20);
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let forth = scope.spawn(|| rounds(&pair.application, &bytes, &over));
        let back = scope.spawn(|| rounds(&pair.proxy, &bytes, &over));
        let read_forth = scope.spawn(|| compare(&pair.proxy, &bytes));
        let read_back = scope.spawn(|| compare(&pair.application, &bytes));
        meanwhile();
        over.store(true, Ordering::Relaxed);
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
    end.shutdown(std::net::Shutdown::Write).expect("it is open");
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

#[test]
fn an_agent_may_end_and_another_start() {
    let mut lab = Lab::new(INTO_PROXY);
    let pair = lab.spliced();
    transfer(&pair, || {
        for _ in 0..3 {
            let place = lab.take_agent().stop();
            lab.start_agent(place, INTO_PROXY);
        }
    });
}

#[test]
fn an_agent_may_be_killed_and_another_start() {
    let mut lab = Lab::new(INTO_PROXY);
    let pair = lab.spliced();
    transfer(&pair, || {
        for _ in 0..3 {
            let place = lab.take_agent().kill();
            lab.start_agent(place, INTO_PROXY);
        }
    });
}

#[test]
fn a_pod_may_be_unenrolled_and_enrolled_again() {
    let lab = Lab::new(INTO_PROXY);
    let pair = lab.spliced();
    transfer(&pair, || {
        for _ in 0..5 {
            lab.agent().unenroll(lab.pod.netns());
            lab.agent().enroll(lab.pod.netns(), &ISTIO_DEFAULTS);
        }
    });
    let pair = lab.spliced();
    transfer(&pair, || {
        let off: Vec<&str> = ISTIO_DEFAULTS
            .into_iter()
            .chain(["--splice", "off"])
            .collect();
        for flags in [&off[..], &ISTIO_DEFAULTS, &off, &ISTIO_DEFAULTS] {
            lab.agent().enroll(lab.pod.netns(), flags);
        }
    });
}

/// What was spliced and not read is still there when the agent has ended, however
/// it ended, and when the next one has started.
#[test]
fn what_a_sleeping_reader_has_not_read_outlives_the_agent() {
    let mut lab = Lab::new(INTO_PROXY);
    for kill in [false, true] {
        let pair = lab.spliced();
        send(&pair.application, b"read this later");
        let agent = lab.take_agent();
        let place = if kill { agent.kill() } else { agent.stop() };
        lab.start_agent(place, INTO_PROXY);
        send(&pair.application, b", and this");
        assert_eq!(receive(&pair.proxy, 25), b"read this later, and this");
    }
}
