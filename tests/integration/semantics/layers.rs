//! What is built on top of sockets: TLS in the kernel, and io_uring.

use std::{mem::MaybeUninit, os::fd::AsRawFd};

use nix::{errno::Errno, libc, poll::PollFlags, sys::socket::MsgFlags};
use shunt_tests::{
    Blocked, End,
    deadline::wait_until,
    end::{ENDED, Text, nothing, text},
    uring,
};

use super::{Ends, Manner, compare};

fn option(end: &End, level: libc::c_int, name: libc::c_int, value: &[u8]) -> Result<(), Errno> {
    let length = libc::socklen_t::try_from(value.len()).expect("short");
    // SAFETY: the kernel reads the bytes of the slice.
    let done = unsafe {
        libc::setsockopt(
            end.socket().as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            length,
        )
    };
    Errno::result(done).map(drop)
}

/// The keys of one direction, as a handshake would have given them: TLS 1.2 with
/// AES-128 in Galois/Counter Mode.
fn keys(direction: u8) -> Vec<u8> {
    let mut bytes = libc::TLS_1_2_VERSION.to_ne_bytes().to_vec();
    bytes.extend(libc::TLS_CIPHER_AES_GCM_128.to_ne_bytes());
    // The explicit part of the nonce, the key, the salt, the record's number.
    bytes.extend([0; 8]);
    bytes.extend([direction; 16]);
    bytes.extend([7; 4]);
    bytes.extend([0; 8]);
    bytes
}

/// Whether somebody who has no right to load modules can start TLS in this kernel.
fn kernel_has_tls() -> bool {
    let layers = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_available_ulp");
    layers.is_ok_and(|names| names.split_whitespace().any(|name| name == "tls"))
}

/// TLS in the kernel, in both directions. ENOENT where it has none.
fn start_tls(end: &End, sends: u8, reads: u8) -> Result<(), Errno> {
    option(end, libc::SOL_TCP, libc::TCP_ULP, b"tls")?;
    option(end, libc::SOL_TLS, libc::TLS_TX, &keys(sends))?;
    option(end, libc::SOL_TLS, libc::TLS_RX, &keys(reads))
}

/// Where the kernel has no TLS, the refusal is what is compared. A VM has the module:
/// `cargo xtask vm-test semantics::layers`.
#[test]
fn tls_in_the_kernel() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        let started = app.note("starts TLS", start_tls(&app, 1, 2));
        if !kernel_has_tls() {
            assert_eq!(started, Err(Errno::ENOENT));
            return still_works(&app, &peer);
        }
        assert_eq!(started, Ok(()));
        assert_eq!(peer.note("starts TLS", start_tls(&peer, 2, 1)), Ok(()));
        still_works(&app, &peer);
        let large = "t".repeat(100_000);
        let reading = {
            let (peer, large) = (peer.unnoticed(), large.clone());
            Blocked::start(move || peer.gets(&large))
        };
        sends_all(&app, &large);
        reading.answer();
        app.note("has sent so many", large.len());
        peer.close();
        assert_eq!(app.gets_end(), nothing());
    });
}

/// Only what is sent is TLS, and the peer reads records: plain text must not
/// come.
#[test]
fn tls_in_the_kernel_for_what_is_sent() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        let started = option(&app, libc::SOL_TCP, libc::TCP_ULP, b"tls")
            .and_then(|()| option(&app, libc::SOL_TLS, libc::TLS_TX, &keys(1)));
        let started = app.note("starts TLS", started);
        if !kernel_has_tls() {
            assert_eq!(started, Err(Errno::ENOENT));
            return still_works(&app, &peer);
        }
        assert_eq!(started, Ok(()));
        assert_eq!(app.send("secret"), Ok(6));
        // A header, a nonce, the cipher text and its tag: 5 + 8 + 6 + 16.
        let mut room = [MaybeUninit::uninit(); 100];
        wait_until("a record", || match peer.socket().peek(&mut room) {
            Ok(35) => Ok(()),
            other => Err(format!("{other:?}")),
        });
        let record = peer.unnoticed().recv(100).expect("a record");
        assert!(!record.contains("secret"), "in the clear: {record:?}");
    });
}

fn sends_all(end: &End, text: &str) {
    let mut sent = 0;
    while sent < text.len() {
        end.poll(PollFlags::POLLOUT);
        match end.unnoticed().send(&text[sent..]) {
            Ok(more) => sent += more,
            Err(Errno::EAGAIN) => {}
            Err(error) => panic!("cannot send: {error}"),
        }
    }
}

fn still_works(app: &End, peer: &End) {
    for _ in 0..3 {
        assert_eq!(app.send("question"), Ok(8));
        peer.gets("question");
        assert_eq!(peer.send("answer"), Ok(6));
        app.gets("answer");
    }
}

/// IORING_OP_RECV.
fn receives(end: &End, flags: MsgFlags) -> Text {
    let seen = uring::recv(end.socket(), 100, flags);
    let seen = seen.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    end.note("reads by io_uring", seen)
}

/// IORING_OP_SEND.
fn sends(end: &End, text: &str) -> Result<usize, Errno> {
    let sent = uring::send(end.socket(), text.as_bytes());
    end.note(&format!("sends {text:?} by io_uring"), sent)
}

#[test]
fn io_uring_reads_and_writes() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        for _ in 0..3 {
            assert_eq!(sends(&app, "question"), Ok(8));
            peer.gets("question");
            assert_eq!(peer.send("answer"), Ok(6));
            app.has_queued(6);
            assert_eq!(receives(&app, MsgFlags::empty()), text("answer"));
        }
        assert_eq!(receives(&app, MsgFlags::MSG_DONTWAIT), Err(Errno::EAGAIN));
        let large = "u".repeat(50_000);
        assert_eq!(sends(&app, &large), Ok(50_000));
        peer.gets(&large);
        peer.close();
        app.has(ENDED);
        assert_eq!(receives(&app, MsgFlags::empty()), nothing());
    });
}

#[test]
fn io_uring_waits_for_bytes() {
    compare(&Manner::BLOCKING, |Ends { app, peer, .. }| {
        let waits = |app: &End| {
            app.waits_in(libc::SYS_io_uring_enter, |app| {
                receives(app, MsgFlags::empty())
            })
        };
        let waiting = waits(&app);
        assert_eq!(peer.send("abc"), Ok(3));
        assert_eq!(waiting.answer(), text("abc"));
        let waiting = waits(&app);
        assert_eq!(sends(&app, "while it waits"), Ok(14));
        peer.gets("while it waits");
        peer.reset();
        assert_eq!(waiting.answer(), Err(Errno::ECONNRESET));
    });
}
