//! Ways to read.

use std::{os::fd::AsRawFd, time::Duration};

use nix::{errno::Errno, libc, poll::PollFlags, sys::socket::MsgFlags};
use shunt_tests::end::{ENDED, nothing, text};

use super::{Ends, Manner, at_least, compare};

#[test]
fn reads_that_do_not_wait() {
    compare(&Manner::NON_BLOCKING, |Ends { app, peer, .. }| {
        assert_eq!(app.recv(10), Err(Errno::EAGAIN));
        assert_eq!(peer.send("abc"), Ok(3));
        app.has_queued(3);
        assert_eq!(app.recv(2), text("ab"));
        assert_eq!(app.recv(10), text("c"));
        assert_eq!(app.recv(10), Err(Errno::EAGAIN));
        assert_eq!(app.recv(0), Err(Errno::EAGAIN));
        drop(peer);
        assert_eq!(app.gets_end(), nothing());
        assert_eq!(app.recv(10), nothing());
    });
}

#[test]
fn reads_that_may_wait() {
    compare(&Manner::BLOCKING, |Ends { app, peer, .. }| {
        let flags = MsgFlags::MSG_DONTWAIT;
        assert_eq!(app.recv_with(10, flags), Err(Errno::EAGAIN));
        let waiting = app.waits_for_bytes(10, MsgFlags::empty());
        assert_eq!(peer.send("abc"), Ok(3));
        assert_eq!(waiting.answer(), text("abc"));
        // And once more after it has answered.
        assert_eq!(app.send("def"), Ok(3));
        peer.gets("def");
        let waiting = app.waits_for_bytes(10, MsgFlags::empty());
        assert_eq!(peer.send("ghi"), Ok(3));
        assert_eq!(waiting.answer(), text("ghi"));
        let waiting = app.waits_for_bytes(10, MsgFlags::empty());
        peer.close();
        assert_eq!(waiting.answer(), nothing());
    });
}

#[test]
fn reads_that_leave_the_bytes_there() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        let peek = MsgFlags::MSG_PEEK;
        assert_eq!(peer.send("abcdef"), Ok(6));
        app.has_queued(6);
        assert_eq!(app.recv_with(3, peek), text("abc"));
        assert_eq!(app.recv_with(10, peek), text("abcdef"));
        assert_eq!(app.queued(), 6);
        assert_eq!(app.recv(4), text("abcd"));
        assert_eq!(app.recv_with(10, peek), text("ef"));
        assert_eq!(app.recv(10), text("ef"));
        let flags = peek | MsgFlags::MSG_DONTWAIT;
        assert_eq!(app.recv_with(10, flags), Err(Errno::EAGAIN));
        peer.close();
        app.has(ENDED | PollFlags::POLLIN);
        assert_eq!(app.recv_with(10, peek), nothing());
        assert_eq!(app.recv(10), nothing());
    });
}

#[test]
fn reads_that_throw_bytes_away() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        assert_eq!(peer.send("abcdef"), Ok(6));
        app.has_queued(6);
        // The kernel counts them and copies none.
        let flags = MsgFlags::MSG_TRUNC;
        assert_eq!(app.recv_with(4, flags), text("\0\0\0\0"));
        assert_eq!(app.recv(10), text("ef"));
    });
}

#[test]
fn reads_that_want_all() {
    compare(&Manner::BLOCKING, |Ends { app, peer, .. }| {
        let all = MsgFlags::MSG_WAITALL;
        let waiting = app.waits_for_bytes(6, all);
        assert_eq!(peer.send("ab"), Ok(2));
        // It does not have enough with these.
        wait_for_empty_queue(&app.unnoticed());
        assert_eq!(peer.send("cd"), Ok(2));
        wait_for_empty_queue(&app.unnoticed());
        assert_eq!(peer.send("efgh"), Ok(4));
        assert_eq!(waiting.answer(), text("abcdef"));
        assert_eq!(app.recv(10), text("gh"));
        let waiting = app.waits_for_bytes(6, all);
        assert_eq!(peer.send("ij"), Ok(2));
        peer.close();
        assert_eq!(waiting.answer(), text("ij"));
        assert_eq!(app.recv_with(6, all), nothing());
    });
}

/// A reader that waits takes what comes at once.
fn wait_for_empty_queue(app: &shunt_tests::End) {
    app.has_queued(0);
}

#[test]
fn all_is_wanted_of_a_socket_that_does_not_wait() {
    compare(&Manner::NON_BLOCKING, |Ends { app, peer, .. }| {
        let all = MsgFlags::MSG_WAITALL;
        assert_eq!(app.recv_with(4, all), Err(Errno::EAGAIN));
        assert_eq!(peer.send("ab"), Ok(2));
        app.has_queued(2);
        assert_eq!(app.recv_with(4, all), text("ab"));
    });
}

#[test]
fn how_much_there_is_to_read() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        assert_eq!(app.queued(), 0);
        assert_eq!(peer.send("abc"), Ok(3));
        app.has_queued(3);
        assert_eq!(app.queued(), 3);
        assert_eq!(peer.send("defg"), Ok(4));
        app.has_queued(7);
        assert_eq!(app.queued(), 7);
        assert_eq!(app.recv(5), text("abcde"));
        assert_eq!(app.queued(), 2);
        peer.close();
        app.has(ENDED);
        assert_eq!(app.queued(), 2);
        assert_eq!(app.recv(5), text("fg"));
        assert_eq!(app.queued(), 0);
        assert_eq!(app.recv(5), nothing());
    });
}

#[test]
fn reads_into_pieces() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        assert_eq!(peer.writev(&["ab", "cde"]), Ok(5));
        app.has_queued(5);
        let pieces = ["abc", "de"].map(str::to_owned).to_vec();
        assert_eq!(app.readv(&[3, 4]), Ok(pieces));
    });
}

#[test]
fn a_read_waits_so_long() {
    compare(&Manner::BLOCKING, |Ends { app, peer, .. }| {
        let patience = Duration::from_millis(50);
        let timeout = app.socket().set_read_timeout(Some(patience));
        timeout.expect("open");
        let waits = || at_least(patience, || app.recv(10));
        assert_eq!(waits(), Err(Errno::EAGAIN));
        assert_eq!(app.send("a"), Ok(1));
        peer.gets("a");
        assert_eq!(waits(), Err(Errno::EAGAIN));
        assert_eq!(peer.send("abc"), Ok(3));
        app.has_queued(3);
        assert_eq!(app.recv(10), text("abc"));
        let all = MsgFlags::MSG_WAITALL;
        assert_eq!(peer.send("de"), Ok(2));
        app.has_queued(2);
        let part = at_least(patience, || app.recv_with(10, all));
        assert_eq!(part, text("de"));
        peer.close();
        let forever = app.socket().set_read_timeout(None);
        forever.expect("open");
        assert_eq!(app.recv(10), nothing());
    });
}

/// SO_RCVLOWAT: fewer bytes do not wake anybody.
#[test]
fn a_reader_may_want_some_bytes_at_least() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        set_low_water(&app, 4);
        assert_eq!(peer.send("ab"), Ok(2));
        app.has_queued(2);
        let readable = PollFlags::POLLIN;
        assert!(app.has_now(readable).is_empty());
        assert_eq!(peer.send("cd"), Ok(2));
        app.has(readable);
        assert_eq!(app.recv(10), text("abcd"));
        if app.has_now(readable).is_empty() {
            assert_eq!(peer.send("x"), Ok(1));
            app.has_queued(1);
            // What is there is given without waiting for more.
            let flags = MsgFlags::MSG_DONTWAIT;
            assert_eq!(app.recv_with(10, flags), text("x"));
        }
    });
}

fn set_low_water(end: &shunt_tests::End, bytes: libc::c_int) {
    // SAFETY: the option is one int.
    let done = unsafe {
        libc::setsockopt(
            end.socket().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            (&raw const bytes).cast(),
            4,
        )
    };
    assert_eq!(done, 0, "SO_RCVLOWAT");
}
