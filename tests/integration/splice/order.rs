//! Every byte arrives once and in order.

use std::{
    io::Write as _,
    net::{SocketAddr, TcpStream},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use shunt_tests::{Node, deadline::wait_until};
use socket2::{Domain, Socket, Type};

use super::{
    INTO_PROXY,
    pair::{Hop, Lab, Pair, Random, fill, pattern, receive, receive_some, send},
};
use crate::lab::PORT;

/// The agent also splices what a proxy sends to its application.
const ALL: &[&str] = &["--splice", "all"];

/// Reads everything that comes, in pieces of any length, with rests in between in
/// which the other end gets ahead.
fn read_unevenly(end: &TcpStream, count: usize, seed: u64, progress: &AtomicUsize) -> Vec<u8> {
    let mut random = Random(seed);
    let mut read = Vec::new();
    while read.len() < count {
        progress.store(read.len(), Ordering::Release);
        if random.next().is_multiple_of(16) {
            thread::yield_now();
        }
        let more = random.length(1 << 20).min(count - read.len());
        read.extend(receive_some(end, more));
    }
    progress.store(read.len(), Ordering::Release);
    read
}

/// Writes in messages of any length, and lets the reader catch up now and then.
fn write_unevenly(end: &TcpStream, bytes: &[u8], seed: u64, progress: &AtomicUsize) {
    let mut random = Random(seed);
    let mut sent = 0;
    while sent < bytes.len() {
        let piece = random.length(1 << 20).min(bytes.len() - sent);
        send(end, &bytes[sent..sent + piece]);
        sent += piece;
        if random.next().is_multiple_of(16) {
            wait_until("the reader to catch up", || {
                let read = progress.load(Ordering::Acquire);
                (read == sent)
                    .then_some(())
                    .ok_or_else(|| format!("{read} of {sent}"))
            });
        }
    }
}

#[test]
fn both_directions_at_once_with_messages_of_all_lengths() {
    let hops = Hop::BOTH.map(|hop| (hop, hop.arguments()));
    for (hop, mode) in hops.into_iter().chain([(Hop::IntoProxy, ALL)]) {
        let lab = Lab::with(hop, mode);
        let pair = &lab.spliced();
        both_directions_at_once(pair);
        // It went both ways and changed between them. How much was spliced depends on the
        // readers: who sends more than is read leaves the map for a while.
        let counters = lab.counters();
        assert!(lab.spliced_bytes() > PLENTY as u64 / 100, "{counters}");
        assert!(lab.fallbacks("receiver_full") > 0, "{counters}");
        // Between proxies also on the way back.
        let back = lab.agent().spliced_bytes(lab.server_pod().netns());
        assert!(back > PLENTY as u64 / 100, "{back} bytes of the answers");
    }
}

/// How much is sent each way.
const PLENTY: usize = 48 << 20;

fn both_directions_at_once(pair: &Pair) {
    let bytes = pattern(PLENTY);
    let (forth, back) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let (forth, back, all) = (&forth, &back, &bytes[..]);
    thread::scope(|scope| {
        scope.spawn(move || write_unevenly(&pair.client, all, 2, forth));
        scope.spawn(move || write_unevenly(&pair.server, all, 3, back));
        let answers = scope.spawn(move || read_unevenly(&pair.client, all.len(), 4, back) == all);
        assert!(read_unevenly(&pair.server, all.len(), 5, forth) == all);
        assert!(answers.join().expect("a reader"));
    });
}

#[test]
fn what_was_sent_before_the_connection_is_spliced_comes_first() {
    for hop in Hop::BOTH {
        let lab = Lab::on(hop);
        let pair = lab.connect();
        unread_while_it_comes_to_be_spliced(&lab, &pair);
        lab.splice(&pair);
        let bytes = pattern(4096);
        send(&pair.client, &bytes);
        assert!(receive(&pair.server, 4096) == bytes);
    }
}

fn unread_while_it_comes_to_be_spliced(lab: &Lab, pair: &Pair) {
    let bytes = pattern(8 << 20);
    // By TCP, and nobody reads it while the connection comes to be spliced.
    let mut early = fill(&pair.client, &bytes[..16 * 1024], 1000);
    wait_until("a message that could have been spliced", || {
        // Each acknowledgement is a reason to splice, for either side.
        send(&pair.server, b"go on");
        receive(&pair.client, 5);
        early += fill(&pair.client, &bytes[early..early + 10], 10);
        match lab.fallbacks("not_drained") {
            0 => Err(lab.counters().to_string()),
            _ => Ok(()),
        }
    });
    let late = early + fill(&pair.client, &bytes[early..], 1000);
    assert!(receive(&pair.server, late) == bytes[..late]);
}

#[test]
fn early_writes_of_a_connection_that_is_not_made_yet_come_first() {
    let lab = Lab::new(INTO_PROXY);
    for _ in 0..50 {
        let pair = lab.connect_with(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
            socket.set_nonblocking(true).expect("it is open");
            let server = SocketAddr::from((Node::OUTSIDE, PORT));
            // In progress, or done already.
            let _ = socket.connect(&server.into());
            let mut stream = TcpStream::from(socket);
            let _ = stream.write(b"");
            stream
        });
        let sent = fill(&pair.client, &pattern(1000), 10);
        send(&pair.client, &pattern(1000)[sent..]);
        lab.splice_unread(&pair, &pattern(1000));
    }
}

#[test]
fn the_bytes_of_a_fast_open_come_first() {
    let lab = Lab::new(INTO_PROXY);
    lab.server_pod().sysctl("net.ipv4.tcp_fastopen", "1539");
    for _ in 0..3 {
        let pair = lab.connect_with(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
            let server = SocketAddr::from((Node::OUTSIDE, PORT));
            let sent = socket
                .send_to_with_flags(&pattern(1000), &server.into(), nix::libc::MSG_FASTOPEN)
                .expect("the proxy accepts");
            assert_eq!(sent, 1000);
            TcpStream::from(socket)
        });
        lab.splice_unread(&pair, &pattern(1000));
    }
}

impl Lab {
    /// Reads what has been sent before; whether the connection comes to be spliced
    /// or not, what is sent then follows it.
    fn splice_unread(&self, pair: &Pair, first: &[u8]) {
        assert_eq!(receive(&pair.server, first.len()), first);
        for _ in 0..20 {
            pair.ask(first, b"answer");
        }
    }
}
