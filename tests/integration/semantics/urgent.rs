//! Urgent data: a byte beside the stream. The proxies of these tests pass it on.

use std::os::fd::AsRawFd;

use nix::{errno::Errno, libc, poll::PollFlags, sys::socket::MsgFlags};
use shunt_tests::{End, end::text};

use super::{Ends, Manner, compare};

const URGENT: MsgFlags = MsgFlags::MSG_OOB;

/// SIOCATMARK: whether the stream is read up to the urgent byte.
fn is_at_mark(end: &End) -> bool {
    let mut at_mark: libc::c_int = 0;
    // SAFETY: the kernel writes one int.
    let done = unsafe { libc::ioctl(end.socket().as_raw_fd(), 0x8905, &raw mut at_mark) };
    assert_eq!(done, 0, "SIOCATMARK");
    end.note("is at the mark", at_mark != 0)
}

#[test]
fn an_urgent_byte_is_read_beside_the_stream() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        for (from, to) in [(&app, &peer), (&peer, &app)] {
            assert_eq!(to.recv_with(1, URGENT), Err(Errno::EINVAL));
            assert_eq!(from.send("ab"), Ok(2));
            to.has_queued(2);
            // The last byte is the urgent one.
            assert_eq!(from.send_with("!", URGENT), Ok(1));
            to.has(PollFlags::POLLPRI);
            assert!(!is_at_mark(to));
            assert_eq!(to.recv_with(1, URGENT), text("!"));
            assert_eq!(to.recv_with(1, URGENT), Err(Errno::EINVAL));
            assert_eq!(from.send("cd"), Ok(2));
            // A read ends at the mark.
            assert_eq!(to.recv(100), text("ab"));
            to.gets("cd");
            assert!(!is_at_mark(to));
        }
        assert_eq!(app.send("ef"), Ok(2));
        peer.gets("ef");
    });
}

#[test]
fn an_urgent_byte_that_nobody_reads_is_left_out() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        for (from, to) in [(&app, &peer), (&peer, &app)] {
            assert_eq!(from.send("ab"), Ok(2));
            to.has_queued(2);
            assert_eq!(from.send_with("!", URGENT), Ok(1));
            to.has(PollFlags::POLLPRI);
            assert_eq!(from.send("cd"), Ok(2));
            to.gets("abcd");
        }
    });
}

#[test]
fn an_urgent_byte_is_read_in_the_stream() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        for (from, to) in [(&app, &peer), (&peer, &app)] {
            to.socket().set_out_of_band_inline(true).expect("open");
            assert_eq!(from.send("ab"), Ok(2));
            to.has_queued(2);
            assert_eq!(from.send_with("!", URGENT), Ok(1));
            to.has(PollFlags::POLLPRI);
            assert_eq!(to.recv(100), text("ab"));
            assert!(is_at_mark(to));
            assert_eq!(to.recv_with(1, URGENT), Err(Errno::EINVAL));
            assert_eq!(from.send("cd"), Ok(2));
            to.gets("!cd");
        }
    });
}

/// Also where it comes first, right behind bytes that were spliced.
#[test]
fn urgent_bytes_between_others() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        for round in 0..5 {
            let words = format!("round {round}");
            assert_eq!(app.send(&words), Ok(words.len()));
            peer.gets(&words);
            assert_eq!(app.send_with("!", URGENT), Ok(1));
            peer.has(PollFlags::POLLPRI);
            assert_eq!(peer.recv_with(1, URGENT), text("!"));
            assert_eq!(app.send(&words), Ok(words.len()));
            peer.gets(&words);
        }
    });
}
