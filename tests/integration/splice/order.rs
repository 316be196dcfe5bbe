//! Every byte arrives once and in order.

use std::{
    io::Write as _,
    net::{SocketAddr, TcpStream},
    thread,
};

use nix::sys::socket::MsgFlags;
use shunt_tests::Node;
use socket2::{Domain, Socket, Type};

use super::{
    INTO_PROXY,
    pair::{Lab, Random, fill, pattern, receive, send},
};
use crate::lab::PORT;

/// Reads everything that comes, in pieces of any length, with rests in between in
/// which the other end gets ahead.
fn read_unevenly(end: &TcpStream, count: usize, seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut read = Vec::new();
    while read.len() < count {
        if random.next() % 16 == 0 {
            thread::yield_now();
        }
        let more = random.length(1 << 20).min(count - read.len());
        read.extend(receive(end, more));
    }
    read
}

fn write_unevenly(end: &TcpStream, mut bytes: &[u8], seed: u64) {
    let mut random = Random(seed);
    while !bytes.is_empty() {
        let piece = random.length(1 << 20).min(bytes.len());
        send(end, &bytes[..piece]);
        bytes = &bytes[piece..];
    }
}

#[test]
fn both_directions_at_once_with_messages_of_all_lengths() {
    for mode in [INTO_PROXY, &["--splice", "all"]] {
        let lab = Lab::new(mode);
        let pair = lab.spliced();
        let bytes = pattern(48 << 20);
        thread::scope(|scope| {
            scope.spawn(|| write_unevenly(&pair.application, &bytes, 2));
            scope.spawn(|| write_unevenly(&pair.proxy, &bytes, 3));
            let answers =
                scope.spawn(|| read_unevenly(&pair.application, bytes.len(), 4) == bytes);
            assert!(read_unevenly(&pair.proxy, bytes.len(), 5) == bytes);
            assert!(answers.join().expect("a reader"));
        });
        // It went both ways and changed between them.
        let counters = lab.counters();
        assert!(lab.spliced_bytes() > 1 << 20, "{counters}");
        assert!(lab.fallbacks("receiver_full") > 0, "{counters}");
    }
}

#[test]
fn what_was_sent_before_the_connection_is_spliced_comes_first() {
    let lab = Lab::new(INTO_PROXY);
    let pair = lab.connect();
    let bytes = pattern(8 << 20);
    // By TCP, and nobody reads it while the connection comes to be spliced.
    let early = fill(&pair.application, &bytes[..64 * 1024], 1000);
    wait_until_member(&lab, &pair);
    let late = early + fill(&pair.application, &bytes[early..], 1000);
    assert!(receive(&pair.proxy, late) == bytes[..late]);
    lab.splice(&pair);
    send(&pair.application, &bytes[..4096]);
    assert!(receive(&pair.proxy, 4096) == bytes[..4096]);
}

/// The proxy sends, and each acknowledgement is a reason to splice.
fn wait_until_member(lab: &Lab, pair: &super::pair::Pair) {
    shunt_tests::deadline::wait_until("a message that could have been spliced", || {
        send(&pair.proxy, b"go on");
        receive(&pair.application, 5);
        send(&pair.application, b"");
        let counters = lab.counters();
        (counters["fallbacks"].as_object().is_some_and(|why| !why.is_empty()))
            .then_some(())
            .ok_or_else(|| counters.to_string())
    });
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
        let sent = fill(&pair.application, &pattern(1000), 10);
        send(&pair.application, &pattern(1000)[sent..]);
        lab.splice_unread(&pair, &pattern(1000));
    }
}

#[test]
fn the_bytes_of_a_fast_open_come_first() {
    let lab = Lab::new(INTO_PROXY);
    lab.pod.sysctl("net.ipv4.tcp_fastopen", "1539");
    for _ in 0..3 {
        let pair = lab.connect_with(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
            let server = SocketAddr::from((Node::OUTSIDE, PORT));
            let sent = socket
                .send_to_with_flags(
                    &pattern(1000),
                    &server.into(),
                    MsgFlags::MSG_FASTOPEN.bits(),
                )
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
    fn splice_unread(&self, pair: &super::pair::Pair, first: &[u8]) {
        assert_eq!(receive(&pair.proxy, first.len()), first);
        for _ in 0..20 {
            pair.ask(first, b"answer");
        }
    }
}
