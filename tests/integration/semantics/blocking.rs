//! Calls that wait in the kernel while something else happens to the socket.

use std::{net::Shutdown, sync::Once};

use nix::{
    errno::Errno,
    libc,
    poll::PollFlags,
    sys::{
        signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction},
        socket::MsgFlags,
    },
};
use shunt_tests::{
    Blocked, End, Pattern,
    deadline::wait_until,
    end::{Text, Waiting, nothing, text},
};

use super::{Ends, Manner, PLENTY, compare};

/// A thread that waits in recv().
fn reader(end: &End) -> Waiting<Text> {
    end.waits_for_bytes(100, MsgFlags::empty())
}

/// A thread that waits in send(), because nobody reads what it sends.
fn writer(end: &End) -> Blocked<(usize, Result<(), Errno>)> {
    let end = end.unnoticed();
    Blocked::in_call(libc::SYS_sendto, move || end.sends_pattern(PATTERN, PLENTY))
}

const PATTERN: Pattern = Pattern::new(1);

#[test]
fn a_reset_ends_a_read() {
    compare(&Manner::BLOCKING, |Ends { app, peer, .. }| {
        let waiting = reader(&app);
        peer.reset();
        assert_eq!(waiting.answer(), Err(Errno::ECONNRESET));
        assert_eq!(app.recv(10), nothing());
        assert_eq!(app.error(), None);
    });
}

/// As above, by a socket that has sent something since it is blocking.
#[test]
fn a_reset_ends_the_read_of_an_answer() {
    compare(&Manner::BLOCKING, |Ends { app, peer, .. }| {
        assert_eq!(app.send("question"), Ok(8));
        let waiting = reader(&app);
        peer.gets("question");
        peer.reset();
        assert_eq!(waiting.answer(), Err(Errno::ECONNRESET));
    });
}

#[test]
fn a_reset_ends_a_write() {
    compare(&Manner::BLOCKING, |Ends { app, peer, .. }| {
        let waiting = writer(&app);
        peer.reset();
        let (_, result) = waiting.answer();
        assert_eq!(result, Err(Errno::ECONNRESET));
        assert_eq!(app.send("more"), Err(Errno::EPIPE));
    });
}

#[test]
fn a_shutdown_by_another_thread_ends_a_read() {
    compare(&Manner::BLOCKING, |Ends { app, peer, .. }| {
        let waiting = reader(&app);
        assert_eq!(app.shutdown(Shutdown::Read), Ok(()));
        assert_eq!(waiting.answer(), nothing());
        assert_eq!(app.send("abc"), Ok(3));
        peer.gets("abc");
    });
    compare(&Manner::BLOCKING, |Ends { app, peer, .. }| {
        let waiting = reader(&app);
        assert_eq!(app.shutdown(Shutdown::Both), Ok(()));
        assert_eq!(waiting.answer(), nothing());
        assert_eq!(peer.gets_end(), nothing());
    });
}

/// It has nothing to do with the half that is read.
#[test]
fn a_half_close_by_another_thread_does_not_end_a_read() {
    compare(&Manner::BLOCKING, |Ends { app, peer, .. }| {
        let waiting = reader(&app);
        assert_eq!(app.shutdown(Shutdown::Write), Ok(()));
        assert_eq!(peer.gets_end(), nothing());
        assert_eq!(peer.send("abc"), Ok(3));
        assert_eq!(waiting.answer(), text("abc"));
        let waiting = reader(&app);
        peer.close();
        assert_eq!(waiting.answer(), nothing());
    });
}

#[test]
fn a_shutdown_by_another_thread_ends_a_write() {
    compare(&Manner::BLOCKING, |Ends { app, peer, .. }| {
        let waiting = writer(&app);
        assert_eq!(app.shutdown(Shutdown::Write), Ok(()));
        let (sent, result) = waiting.answer();
        assert_eq!(result, Err(Errno::EPIPE));
        peer.gets_pattern_off_record(sent);
        assert_eq!(peer.gets_end(), nothing());
    });
}

trait OffRecord {
    /// Takes bytes whose number depends on the moment.
    fn gets_pattern_off_record(&self, length: usize);
}

impl OffRecord for End {
    fn gets_pattern_off_record(&self, length: usize) {
        self.unnoticed().gets_pattern(PATTERN, length);
    }
}

/// One thread waits for bytes, and another sends more than there is room for.
/// When there is room again the kernel wakes both, and only the second may
/// notice.
#[test]
fn a_reader_is_not_disturbed_by_a_writer() {
    compare(&Manner::BLOCKING, |Ends { app, peer, .. }| {
        let reading = reader(&app);
        let writing = writer(&app);
        peer.gets_pattern(PATTERN, PLENTY);
        assert_eq!(writing.answer(), (PLENTY, Ok(())));
        assert_eq!(peer.send("abc"), Ok(3));
        assert_eq!(reading.answer(), text("abc"));
    });
}

/// The writer does not wait in the kernel: it asks poll() for room.
#[test]
fn a_reader_is_not_disturbed_by_a_writer_that_polls() {
    compare(&Manner::BLOCKING, |Ends { app, peer, .. }| {
        let reading = reader(&app);
        let sent = app.sends_until_full(PATTERN, 0);
        peer.gets_pattern_off_record(sent);
        app.has(PollFlags::POLLOUT);
        assert_eq!(peer.send("abc"), Ok(3));
        assert_eq!(reading.answer(), text("abc"));
    });
}

/// Both at once, for some time: every byte of both.
#[test]
fn two_threads_use_one_socket() {
    compare(&Manner::BLOCKING, |Ends { app, peer, .. }| {
        let writing = {
            let app = app.unnoticed();
            Blocked::start(move || app.sends_pattern(PATTERN, PLENTY))
        };
        let answering = {
            let peer = peer.unnoticed();
            Blocked::start(move || {
                for _ in 0..100 {
                    peer.gets_pattern_in_turn();
                }
            })
        };
        let mut seen = String::new();
        while seen.len() < 100 {
            let more = app.unnoticed().recv(100);
            seen += &more.expect("a blocking socket has bytes, or waits for them");
        }
        assert_eq!(app.note("has read", seen), "y".repeat(100));
        answering.answer();
        assert_eq!(writing.answer(), (PLENTY, Ok(())));
    });
}

trait InTurn {
    /// Throws a part of what comes away, and answers with a byte.
    fn gets_pattern_in_turn(&self);
}

impl InTurn for End {
    fn gets_pattern_in_turn(&self) {
        let mut left = PLENTY / 100;
        while left > 0 {
            self.poll(PollFlags::POLLIN);
            let flags = MsgFlags::MSG_TRUNC;
            match self.recv_with(left.min(65536), flags) {
                Ok(read) if !read.is_empty() => left -= read.len(),
                Err(Errno::EAGAIN) => {}
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(self.send("y"), Ok(1));
    }
}

extern "C" fn ignore(_: libc::c_int) {}

/// A handler for each: system calls end for the first, and go on for the second.
const ENDS_CALLS: Signal = Signal::SIGUSR1;
const RESTARTS_CALLS: Signal = Signal::SIGUSR2;

fn install_handlers() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for (signal, flags) in [
            (ENDS_CALLS, SaFlags::empty()),
            (RESTARTS_CALLS, SaFlags::SA_RESTART),
        ] {
            let action = SigAction::new(SigHandler::Handler(ignore), flags, SigSet::empty());
            // SAFETY: the handler does nothing.
            unsafe { sigaction(signal, &action) }.expect("a signal can be handled");
        }
    });
}

#[test]
fn a_signal_ends_a_read() {
    install_handlers();
    compare(&Manner::BLOCKING, |Ends { app, peer, .. }| {
        let waiting = reader(&app);
        waiting.signal(ENDS_CALLS);
        assert_eq!(waiting.answer(), Err(Errno::EINTR));
        assert_eq!(peer.send("abc"), Ok(3));
        app.has_queued(3);
        assert_eq!(app.recv(10), text("abc"));
    });
}

/// The thread is seen to be in the call again before bytes come.
#[test]
fn a_signal_does_not_end_a_read_that_is_to_be_restarted() {
    install_handlers();
    compare(&Manner::BLOCKING, |Ends { app, peer, .. }| {
        let waiting = reader(&app);
        waiting.signal(RESTARTS_CALLS);
        assert_eq!(peer.send("abc"), Ok(3));
        assert_eq!(waiting.answer(), text("abc"));
    });
}

/// With a time limit there is no restart.
#[test]
fn a_signal_ends_a_read_with_a_time_limit() {
    install_handlers();
    compare(&Manner::BLOCKING, |Ends { app, .. }| {
        let patience = Some(shunt_tests::deadline::DEADLINE);
        app.socket().set_read_timeout(patience).expect("open");
        let waiting = reader(&app);
        waiting.signal(RESTARTS_CALLS);
        assert_eq!(waiting.answer(), Err(Errno::EINTR));
    });
}

#[test]
fn a_signal_ends_a_write() {
    install_handlers();
    compare(&Manner::BLOCKING, |Ends { app, peer, .. }| {
        let writing = {
            let app = app.unnoticed();
            Blocked::in_call(libc::SYS_sendto, move || app.sends_pattern(PATTERN, PLENTY))
        };
        // Until one meets the last call, which has sent nothing yet: those
        // before have sent a part.
        wait_until("a signal to end a call", || {
            if writing.has_ended() {
                return Ok(());
            }
            writing.signal(ENDS_CALLS);
            Err("it goes on".to_owned())
        });
        let (sent, result) = writing.answer();
        assert_eq!(app.note("is told", result), Err(Errno::EINTR));
        peer.gets_pattern_off_record(sent);
    });
}

/// O_NONBLOCK is cleared while bytes are on their way, and set again.
#[test]
fn waiting_is_switched_on_and_off() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        for round in 0..3 {
            app.set_nonblocking(false);
            let waiting = reader(&app);
            assert_eq!(peer.send("abc"), Ok(3));
            assert_eq!(waiting.answer(), text("abc"));
            app.set_nonblocking(true);
            assert_eq!(app.recv(10), Err(Errno::EAGAIN));
            let answer = format!("answer {round}");
            assert_eq!(app.send(&answer), Ok(answer.len()));
            peer.gets(&answer);
        }
        app.set_nonblocking(false);
        let waiting = reader(&app);
        peer.reset();
        assert_eq!(waiting.answer(), Err(Errno::ECONNRESET));
    });
}
