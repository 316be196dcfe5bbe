//! Ways to write.

use std::{
    io::{self, IoSlice},
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    libc,
    poll::PollFlags,
    sys::socket::{ControlMessageOwned, MsgFlags, recvmsg},
};
use shunt_tests::{Blocked, End, Pattern};

use super::{Ends, Manner, PLENTY, compare};

const PATTERN: Pattern = Pattern::new(4);

#[test]
fn writes_that_do_not_wait() {
    compare(&Manner::NON_BLOCKING, |Ends { app, peer, .. }| {
        let sent = app.sends_until_full(PATTERN, 0);
        peer.unnoticed().gets_pattern(PATTERN, sent);
        app.has(PollFlags::POLLOUT);
        assert_eq!(app.send("more"), Ok(4));
        peer.gets("more");
    });
}

#[test]
fn a_write_that_may_wait_sends_all() {
    compare(&Manner::BLOCKING, |Ends { app, peer, .. }| {
        let text = "0123456789abcdef".repeat(PLENTY / 16);
        let writer = app.unnoticed();
        let whole = text.clone();
        let writing = Blocked::in_call(libc::SYS_sendto, move || writer.send(&whole));
        peer.unnoticed().gets(&text);
        assert_eq!(app.note("has sent", writing.answer()), Ok(PLENTY));
    });
}

#[test]
fn a_write_waits_so_long() {
    compare(&Manner::BLOCKING, |Ends { app, peer, .. }| {
        let patience = Duration::from_millis(50);
        let timeout = app.socket().set_write_timeout(Some(patience));
        timeout.expect("open");
        let sent = sends_until_it_gives_up(&app, patience);
        app.note("gives up", ());
        peer.unnoticed().gets_pattern(PATTERN, sent);
        app.has(PollFlags::POLLOUT);
        assert_eq!(app.send("more"), Ok(4));
        peer.gets("more");
    });
}

/// Sends until a call waits so long for room and gets none; how much was sent.
fn sends_until_it_gives_up(app: &End, patience: Duration) -> usize {
    let bytes = PATTERN.bytes(0, PLENTY);
    let mut sent = 0;
    loop {
        assert!(sent < PLENTY, "everything was taken, and nobody reads");
        let began = Instant::now();
        match app.socket().send(&bytes[sent..]) {
            Ok(more) => sent += more,
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                let took = began.elapsed();
                // As for `at_least`.
                assert!(
                    took >= patience / 2,
                    "it waited {took:?} in place of {patience:?}"
                );
                return sent;
            }
        }
    }
}

#[test]
fn writes_of_pieces() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        assert_eq!(app.writev(&["a", "", "bc"]), Ok(3));
        peer.gets("abc");
        assert_eq!(app.send(""), Ok(0));
        let large = "z".repeat(10_000);
        assert_eq!(app.writev(&[&large, "end"]), Ok(10_003));
        peer.gets(&large);
        peer.gets("end");
    });
}

const MORE: MsgFlags = MsgFlags::from_bits_retain(libc::MSG_MORE);

/// With MSG_MORE or TCP_CORK a part waits until the rest has come.
#[test]
fn writes_that_wait_for_more() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        assert_eq!(app.send_with("ab", MORE), Ok(2));
        assert_eq!(app.send("cd"), Ok(2));
        peer.gets("abcd");
        app.socket().set_tcp_cork(true).expect("an open socket");
        assert_eq!(app.send("ef"), Ok(2));
        assert_eq!(app.send("gh"), Ok(2));
        app.socket().set_tcp_cork(false).expect("an open socket");
        peer.gets("efgh");
    });
}

/// The kernel tells when it does not need the caller's bytes any more.
#[test]
fn writes_without_a_copy() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        let large = "z".repeat(20_000);
        set_zerocopy(&app);
        for round in 0..3 {
            let sent = send_without_copy(&app, large.as_bytes());
            assert_eq!(app.note("sends without a copy", sent), Ok(20_000));
            peer.gets(&large);
            app.has(PollFlags::POLLERR);
            let done = completions(&app);
            assert_eq!(app.note("is told of", done), Ok((round, round)));
            // It is no error of the connection.
            assert_eq!(app.has_now(PollFlags::POLLIN), PollFlags::empty());
            assert_eq!(app.error(), None);
        }
        assert_eq!(app.send("by copy"), Ok(7));
        peer.gets("by copy");
        assert_eq!(peer.send("answer"), Ok(6));
        app.gets("answer");
        assert_eq!(
            app.note("is told of", completions(&app)),
            Err(Errno::EAGAIN)
        );
    });
}

/// Several, one of which is not told of before the next is sent; and the flag
/// on a socket that has not asked for it.
#[test]
fn many_writes_without_a_copy() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        let large = "z".repeat(20_000);
        let sent = send_without_copy(&app, large.as_bytes());
        assert_eq!(app.note("sends without a copy", sent), Ok(20_000));
        peer.gets(&large);
        assert_eq!(app.has_now(PollFlags::POLLIN), PollFlags::empty());
        set_zerocopy(&app);
        for _ in 0..10 {
            let sent = send_without_copy(&app, large.as_bytes());
            assert_eq!(app.note("sends without a copy", sent), Ok(20_000));
            peer.gets(&large);
        }
        let mut told = 0;
        while told < 10 {
            app.poll(PollFlags::POLLERR);
            let (first, last) = completions(&app).expect("it was announced");
            assert_eq!(first, told);
            told = last + 1;
        }
        app.note("is told of so many", told);
    });
}

fn set_zerocopy(end: &End) {
    let on: libc::c_int = 1;
    // SAFETY: the option is one int.
    let done = unsafe {
        libc::setsockopt(
            end.socket().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ZEROCOPY,
            (&raw const on).cast(),
            4,
        )
    };
    assert_eq!(done, 0, "SO_ZEROCOPY");
}

fn send_without_copy(end: &End, bytes: &[u8]) -> Result<usize, Errno> {
    let flags = MsgFlags::from_bits_retain(libc::MSG_ZEROCOPY);
    let slices = [IoSlice::new(bytes)];
    nix::sys::socket::sendmsg::<()>(end.socket().as_raw_fd(), &slices, &[], flags, None)
}

/// Which sends the next message of the error queue says are done: the first and
/// the last, counted from 0.
fn completions(end: &End) -> Result<(u32, u32), Errno> {
    let mut space = nix::cmsg_space!(libc::sock_extended_err, libc::sockaddr_in);
    let flags = MsgFlags::MSG_ERRQUEUE;
    let message = recvmsg::<()>(end.socket().as_raw_fd(), &mut [], Some(&mut space), flags)?;
    let Some(ControlMessageOwned::Ipv4RecvErr(told, _)) = message.cmsgs()?.next() else {
        panic!("a message of the error queue says why it is there");
    };
    // SO_EE_ORIGIN_ZEROCOPY
    assert_eq!(told.ee_origin, 5);
    assert_eq!(told.ee_errno, 0);
    Ok((told.ee_info, told.ee_data))
}
