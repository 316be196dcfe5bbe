//! What a socket tells of itself: TCP_INFO, and what it has not sent yet.

use std::mem::offset_of;

use nix::{libc, poll::PollFlags};
use shunt_tests::{
    End,
    deadline::wait_until,
    end::ENDED,
    syscall::{option, send_queue},
};

use super::{Ends, Manner, compare};

/// Nothing that was sent stays on the way.
#[test]
fn what_is_acknowledged_has_left_the_socket() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        let bytes = "w".repeat(50_000);
        assert_eq!(app.send(&bytes), Ok(50_000));
        peer.gets(&bytes);
        settle(&app);
        app.note("has nothing to send", ());
    });
}

/// What TCP_INFO says of the state and of what is on the way.
#[test]
fn what_tcp_tells_of_itself() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        settle(&app);
        assert_eq!(told_of_itself(&app), (ESTABLISHED, 0, 0, 0));
        assert_eq!(peer.send("abc"), Ok(3));
        app.gets("abc");
        assert_eq!(app.send("def"), Ok(3));
        peer.gets("def");
        settle(&app);
        assert_eq!(told_of_itself(&app), (ESTABLISHED, 0, 0, 0));
        assert_eq!(peer.shutdown(std::net::Shutdown::Write), Ok(()));
        app.has(ENDED);
        settle(&app);
        assert_eq!(told_of_itself(&app).0, CLOSE_WAIT);
        assert_eq!(app.send("ghi"), Ok(3));
        peer.gets("ghi");
        assert_eq!(app.shutdown(std::net::Shutdown::Write), Ok(()));
        app.has(PollFlags::POLLHUP);
        wait_until("the last acknowledgement", || {
            match told_of_itself(&app.unnoticed()).0 {
                CLOSED => Ok(()),
                other => Err(other.to_string()),
            }
        });
    });
}

const ESTABLISHED: u8 = 1;
const CLOSED: u8 = 7;
const CLOSE_WAIT: u8 = 8;

/// Waits until everything that was sent is acknowledged.
fn settle(end: &End) {
    wait_until("acknowledgements", || match send_queue(end.socket()) {
        (0, _) => Ok(()),
        (left, _) => Err(format!("{left} bytes")),
    });
}

/// Its sums are of the bytes that TCP has carried, and not of those that were spliced.
#[test]
fn how_much_tcp_has_carried() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        settle(&app);
        let before = carried(&app);
        assert_eq!(app.send("some bytes"), Ok(10));
        peer.gets("some bytes");
        assert_eq!(peer.send("others"), Ok(6));
        app.gets("others");
        settle(&app);
        let after = carried(&app);
        let sums = (after.sent - before.sent, after.received - before.received);
        assert_eq!(app.note("has carried", sums), (10, 6));
    });
}

/// State, segments not acknowledged, segments lost, segments that are on their way again. How
/// many were sent again in all is not asked for: on a busy machine TCP does that by itself.
fn told_of_itself(end: &End) -> (u8, u32, u32, u32) {
    let info = Info::of(end);
    let told = (
        info.0[0],
        u32::from_ne_bytes(info.at(offset_of!(libc::tcp_info, tcpi_unacked))),
        u32::from_ne_bytes(info.at(offset_of!(libc::tcp_info, tcpi_lost))),
        u32::from_ne_bytes(info.at(offset_of!(libc::tcp_info, tcpi_retrans))),
    );
    end.note("is in the state, with segments on the way", told)
}

/// How many bytes TCP has carried since the connection began.
struct Carried {
    /// Those that were acknowledged.
    sent: u64,
    received: u64,
}

/// What TCP_INFO says of that (Linux 4.1). The C library's structure ends before.
fn carried(end: &End) -> Carried {
    const BYTES_ACKED: usize = 120;
    const BYTES_RECEIVED: usize = 128;
    let info = Info::of(end);
    Carried {
        sent: u64::from_ne_bytes(info.at(BYTES_ACKED)),
        received: u64::from_ne_bytes(info.at(BYTES_RECEIVED)),
    }
}

/// `struct tcp_info`, as far as this kernel fills it.
struct Info(Vec<u8>);

impl Info {
    fn of(end: &End) -> Self {
        const ROOM: usize = 512;
        let mut answer = option(end.socket(), libc::IPPROTO_TCP, libc::TCP_INFO, ROOM);
        assert_eq!(answer.result, Ok(()));
        answer.buffer.truncate(answer.length as usize);
        Self(answer.buffer)
    }

    /// A field. Older kernels tell less.
    fn at<const SIZE: usize>(&self, offset: usize) -> [u8; SIZE] {
        let bytes = self.0.get(offset..offset + SIZE);
        bytes
            .and_then(|bytes| bytes.try_into().ok())
            .unwrap_or_else(|| panic!("only {} bytes were told", self.0.len()))
    }
}
