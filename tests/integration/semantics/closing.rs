//! Ways to end a connection, or half of it.

use std::{net::Shutdown, time::Duration};

use nix::{errno::Errno, libc, poll::PollFlags, sys::socket::MsgFlags};
use shunt_tests::{
    End, Pattern,
    deadline::wait_until,
    end::{ENDED, nothing, text},
};

use super::{Ends, Manner, compare};

#[test]
fn the_application_has_said_all_and_listens() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        assert_eq!(app.send("question"), Ok(8));
        assert_eq!(app.shutdown(Shutdown::Write), Ok(()));
        peer.gets("question");
        assert_eq!(peer.gets_end(), nothing());
        assert_eq!(app.send("more"), Err(Errno::EPIPE));
        for answer in ["first", "second"] {
            assert_eq!(peer.send(answer), Ok(answer.len()));
            app.gets(answer);
        }
        peer.close();
        assert_eq!(app.gets_end(), nothing());
        app.close();
    });
}

/// By one call each that waits in the kernel, where the socket is blocking.
#[test]
fn the_application_waits_for_the_answer_to_all_it_has_said() {
    compare(&Manner::BLOCKING, |Ends { app, peer, .. }| {
        assert_eq!(app.send("question"), Ok(8));
        assert_eq!(app.shutdown(Shutdown::Write), Ok(()));
        let reads = |app: &End| [app.recv(6), app.recv(10)];
        let waiting = app.waits_in(libc::SYS_recvfrom, reads);
        peer.gets("question");
        assert_eq!(peer.gets_end(), nothing());
        assert_eq!(peer.send("answer"), Ok(6));
        assert_eq!(peer.shutdown(Shutdown::Write), Ok(()));
        assert_eq!(waiting.answer(), [text("answer"), nothing()]);
    });
}

#[test]
fn the_peer_has_said_all_and_listens() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        assert_eq!(peer.send("question"), Ok(8));
        assert_eq!(peer.shutdown(Shutdown::Write), Ok(()));
        app.has(PollFlags::POLLIN | ENDED);
        assert_eq!(app.recv(100), text("question"));
        assert_eq!(app.recv(100), nothing());
        for answer in ["first", "second"] {
            assert_eq!(app.send(answer), Ok(answer.len()));
            peer.gets(answer);
        }
        assert_eq!(app.shutdown(Shutdown::Write), Ok(()));
        assert_eq!(peer.gets_end(), nothing());
        app.has(PollFlags::POLLHUP);
        assert_eq!(app.error(), None);
    });
}

#[test]
fn nothing_is_read_any_more() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        assert_eq!(app.shutdown(Shutdown::Read), Ok(()));
        app.has(PollFlags::POLLIN | ENDED);
        assert_eq!(app.recv(10), nothing());
        assert_eq!(app.send("still"), Ok(5));
        peer.gets("still");
        // TCP has no way to tell the peer: what it sends is there all the same.
        assert_eq!(peer.send("abc"), Ok(3));
        app.has_queued(3);
        assert_eq!(app.recv(10), text("abc"));
        assert_eq!(app.recv(10), nothing());
    });
}

#[test]
fn both_halves_are_closed_at_once() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        assert_eq!(app.send("last"), Ok(4));
        assert_eq!(app.shutdown(Shutdown::Both), Ok(()));
        assert_eq!(app.recv(10), nothing());
        assert_eq!(app.send("more"), Err(Errno::EPIPE));
        peer.gets("last");
        assert_eq!(peer.gets_end(), nothing());
        peer.close();
        app.has(PollFlags::POLLHUP);
        // The end of what the peer sends is no event any more.
        wait_until("the connection to be over", || {
            match app.unnoticed().shutdown(Shutdown::Both) {
                Err(Errno::ENOTCONN) => Ok(()),
                other => Err(format!("{other:?}")),
            }
        });
    });
}

#[test]
fn the_application_closes() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        assert_eq!(app.send("farewell"), Ok(8));
        app.close();
        peer.gets("farewell");
        assert_eq!(peer.gets_end(), nothing());
    });
}

/// The first send after the peer has closed is answered by a reset.
#[test]
fn the_peer_closes() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        peer.close();
        assert_eq!(app.gets_end(), nothing());
        assert_eq!(app.send("too late"), Ok(8));
        app.has(PollFlags::POLLERR | PollFlags::POLLHUP);
        // It has read the end of the stream already.
        assert_eq!(app.error(), Some(Errno::EPIPE));
        assert_eq!(app.send("again"), Err(Errno::EPIPE));
        assert_eq!(app.recv(10), nothing());
    });
}

#[test]
fn the_peer_resets() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        assert_eq!(peer.send("abc"), Ok(3));
        app.has_queued(3);
        peer.reset();
        app.has(PollFlags::POLLERR | PollFlags::POLLHUP);
        assert_eq!(app.recv(10), text("abc"));
        assert_eq!(app.recv(10), Err(Errno::ECONNRESET));
        assert_eq!(app.recv(10), nothing());
        assert_eq!(app.send("more"), Err(Errno::EPIPE));
    });
}

#[test]
fn a_reset_is_told_to_the_next_send() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        peer.reset();
        app.has(PollFlags::POLLERR);
        assert_eq!(app.send("more"), Err(Errno::ECONNRESET));
        assert_eq!(app.send("more"), Err(Errno::EPIPE));
        assert_eq!(app.recv(10), nothing());
    });
}

#[test]
fn a_reset_is_told_by_so_error() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        peer.reset();
        app.has(PollFlags::POLLERR);
        assert_eq!(app.error(), Some(Errno::ECONNRESET));
        assert_eq!(app.error(), None);
        assert_eq!(app.recv(10), nothing());
    });
}

#[test]
fn the_application_resets() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        app.reset();
        assert_eq!(peer.gets_end(), Err(Errno::ECONNRESET));
        assert_eq!(peer.send("too late"), Err(Errno::EPIPE));
    });
}

#[test]
fn what_was_not_read_is_a_reset() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        assert_eq!(peer.send("unread"), Ok(6));
        app.has_queued(6);
        app.close();
        assert_eq!(peer.gets_end(), Err(Errno::ECONNRESET));
    });
}

/// With time to linger, close() of a blocking socket waits until everything is
/// acknowledged.
#[test]
fn the_application_closes_with_patience() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        assert_eq!(app.send("farewell"), Ok(8));
        app.lingers(Duration::from_secs(100));
        app.close();
        peer.gets("farewell");
        assert_eq!(peer.gets_end(), nothing());
    });
}

/// And no longer than it was told to: what is left then arrives all the same. How long it
/// waited is not asserted. The last close() waits, and that may be another's: a program that
/// another test starts has every file of this process between fork() and exec().
#[test]
fn the_application_closes_and_its_patience_ends() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        const PATTERN: Pattern = Pattern::new(8);
        let sent = app.sends_until_full(PATTERN, 0);
        // Nobody reads meanwhile, so that it is not acknowledged.
        app.lingers(Duration::from_secs(1));
        app.close();
        peer.unnoticed().gets_pattern(PATTERN, sent);
        assert_eq!(peer.gets_end(), nothing());
    });
}

/// As a program may be that turns around: the end comes while there is more to
/// read, in both directions.
#[test]
fn both_have_said_all_before_anybody_reads() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        assert_eq!(app.send("there"), Ok(5));
        assert_eq!(peer.send("back"), Ok(4));
        assert_eq!(app.shutdown(Shutdown::Write), Ok(()));
        assert_eq!(peer.shutdown(Shutdown::Write), Ok(()));
        for (end, expected) in [(&app, "back"), (&peer, "there")] {
            end.gets(expected);
            assert_eq!(end.gets_end(), nothing());
            let flags = MsgFlags::MSG_DONTWAIT;
            assert_eq!(end.recv_with(10, flags), nothing());
        }
        app.has(PollFlags::POLLHUP);
    });
}
