//! Every byte arrives once and in order.

use std::{
    io::{self, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd as _,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use nix::libc;
use shunt_tests::{Blocked, deadline::wait_until};
use socket2::{Domain, SockRef, Socket, Type};

use super::pair::{Hop, Lab, Pair, Random, fill, pattern, receive, receive_some, send};

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

/// How often it is played at most.
const PLAYS: usize = 10;

#[test]
fn both_directions_at_once_with_messages_of_all_lengths() {
    let hops = Hop::BOTH.map(|hop| (hop, hop.arguments()));
    for (hop, mode) in hops.into_iter().chain([(Hop::IntoProxy, ALL)]) {
        let lab = Lab::with(hop, mode);
        let pair = &lab.spliced();
        let before = (lab.spliced_bytes(), not_ready(&lab));
        // Some of it is spliced and some goes by TCP, and so it changes between them. How much
        // is spliced depends on the readers: who sends more than is read leaves the map for a
        // while, on a busy machine before it is a hundredth.
        let changed = (0..PLAYS).any(|_| {
            both_directions_at_once(pair);
            let spliced = lab.spliced_bytes() - before.0;
            // Between proxies also on the way back.
            let back = lab.agent().spliced_bytes(lab.server_pod().netns());
            spliced.min(back) > PLENTY as u64 / 1000 && not_ready(&lab) > before.1
        });
        assert!(changed, "{before:?}, then {}", lab.counters());
    }
}

/// How many messages went by TCP because the other end had not read enough: for want of room,
/// or what TCP had brought before. Which of the two it is depends on how busy the machine is.
fn not_ready(lab: &Lab) -> u64 {
    lab.fallbacks("receiver_full") + lab.fallbacks("not_drained")
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

/// The server is not looked at any more by the time when its client sends again.
#[test]
fn a_connection_may_be_spliced_after_a_first_answer_that_is_long() {
    let lab = Lab::on(Hop::Between);
    let pair = lab.connect();
    let bytes = pattern(64 << 10);
    send(&pair.client, b"question");
    assert_eq!(receive(&pair.server, 8), b"question");
    for _ in 0..200 {
        send(&pair.server, &bytes);
        assert!(receive(&pair.client, bytes.len()) == bytes);
    }
    lab.splice(&pair);
    wait_until("an answer to be spliced", || {
        pair.ask(b"question", b"answer");
        let spliced = lab.agent().spliced_bytes(lab.server_pod().netns());
        (spliced > 0).then_some(()).ok_or(String::from("none"))
    });
}

/// How many connections are written to as early as that, because it depends on the moment
/// what they find.
const EARLY: usize = 20;

#[test]
fn early_writes_of_a_connection_that_is_not_made_yet_come_first() {
    for hop in Hop::BOTH {
        let lab = Lab::on(hop);
        let early = pattern(1000);
        // Nobody accepts before everything is written.
        let connect = || write_at_once(lab.destination(), &early);
        let pairs: Vec<_> = (0..EARLY).map(|_| lab.connect_with(connect)).collect();
        for pair in pairs {
            lab.comes_first_and_is_spliced(&pair, &early);
        }
    }
}

/// Connects and writes from the first moment on, in small pieces, until all is taken.
fn write_at_once(server: SocketAddr, bytes: &[u8]) -> TcpStream {
    let client = not_connected();
    // In progress, or done already.
    let _ = client.connect(&server.into());
    let client = TcpStream::from(client);
    for piece in bytes.chunks(10) {
        send(&client, piece);
    }
    client
}

/// A new socket in non-blocking mode.
fn not_connected() -> Socket {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    socket.set_nonblocking(true).expect("it is open");
    socket
}

/// The proxy has no room for another connection, so that this one is not made for a while.
#[test]
fn a_write_that_waits_for_the_connection_comes_first() {
    for hop in Hop::BOTH {
        let lab = Lab::on(hop);
        let to = lab.destination();
        listen(lab.listener(), 0);
        let other = lab.call(|| TcpStream::connect(to).expect("the only one that is let in"));
        let early = lab.call(|| connecting(to));
        let error = (&early).write(b"too early").map_err(|error| error.kind());
        assert_eq!(error, Err(io::ErrorKind::WouldBlock), "it is connected");
        early.set_nonblocking(false).expect("it is open");
        let mut writer = early.try_clone().expect("it is open");
        let writing = Blocked::in_call(libc::SYS_sendto, move || writer.write(&pattern(1000)));
        assert!(!writing.has_ended(), "it does not wait");
        // Room for those that come.
        listen(lab.listener(), 16);
        lab.accept(other);
        assert_eq!(writing.answer().expect("it is connected"), 1000);
        let pair = lab.accept(early);
        lab.comes_first_and_is_spliced(&pair, &pattern(1000));
    }
}

/// A socket that has begun to connect.
fn connecting(server: SocketAddr) -> TcpStream {
    let client = not_connected();
    let begun = client
        .connect(&server.into())
        .map_err(|error| error.raw_os_error());
    assert_eq!(begun, Err(Some(libc::EINPROGRESS)));
    TcpStream::from(client)
}

/// listen(), also of a socket that does already.
fn listen(listener: &TcpListener, backlog: i32) {
    SockRef::from(listener)
        .listen(backlog)
        .expect("it is bound");
}

#[test]
fn the_bytes_of_a_fast_open_come_first() {
    for hop in Hop::BOTH {
        let lab = Lab::on(hop);
        allow_fast_open(&lab);
        let early = pattern(1000);
        for number in 1..=3 {
            let pair = lab.connect_with(|| fast_open(lab.destination(), &early));
            // So many have come with bytes before they were made.
            assert_eq!(lab.netstat()["TCPFastOpenPassive"], number);
            lab.comes_first_and_is_spliced(&pair, &early);
        }
    }
}

/// Both ends do without a cookie.
fn allow_fast_open(lab: &Lab) {
    const CLIENT_AND_SERVER: u32 = 0x3;
    const WITHOUT_COOKIE: u32 = 0x204;
    for pod in &lab.pods {
        let flags = CLIENT_AND_SERVER | WITHOUT_COOKIE;
        pod.sysctl("net.ipv4.tcp_fastopen", &flags.to_string());
    }
    let queue: libc::c_int = 16;
    // SAFETY: the option is one int.
    let done = unsafe {
        libc::setsockopt(
            lab.listener().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_FASTOPEN,
            (&raw const queue).cast(),
            4,
        )
    };
    assert_eq!(done, 0, "TCP_FASTOPEN");
}

fn fast_open(server: SocketAddr, bytes: &[u8]) -> TcpStream {
    let client = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    let sent = client.send_to_with_flags(bytes, &server.into(), libc::MSG_FASTOPEN);
    assert_eq!(sent.expect("the proxy accepts"), bytes.len());
    TcpStream::from(client)
}

impl Lab {
    /// Reads what has been sent first; then the connection comes to be spliced, and what is
    /// sent follows it.
    fn comes_first_and_is_spliced(&self, pair: &Pair, first: &[u8]) {
        assert_eq!(receive(&pair.server, first.len()), first);
        self.splice(pair);
        for _ in 0..20 {
            pair.ask(first, b"answer");
        }
    }
}
