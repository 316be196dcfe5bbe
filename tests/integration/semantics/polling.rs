//! Ways to be told what can be done.

use std::net::Shutdown;

use nix::{
    errno::Errno,
    poll::PollFlags,
    sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
};
use shunt_tests::{
    End, Pattern,
    deadline::wait_until,
    end::{ENDED, nothing, text},
};

use super::{Ends, Manner, compare};

/// An epoll instance that watches one end.
struct Watch {
    end: End,
    epoll: Epoll,
}

impl Watch {
    fn new(end: &End, events: EpollFlags) -> Self {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).expect("an epoll instance");
        epoll
            .add(end, EpollEvent::new(events, 0))
            .expect("an open socket");
        Self {
            end: end.clone(),
            epoll,
        }
    }

    /// Waits for events until all of `expected` have come.
    #[track_caller]
    fn tells(&self, expected: EpollFlags) {
        let mut seen = EpollFlags::empty();
        wait_until(&format!("{expected:?}"), || {
            seen |= self.wait();
            if seen.contains(expected) {
                Ok(())
            } else {
                Err(format!("{seen:?}"))
            }
        });
        assert_eq!(self.end.note("is told by epoll", seen), expected);
    }

    /// There is no event.
    #[track_caller]
    fn tells_nothing(&self) {
        let seen = self.end.note("is told by epoll", self.wait());
        assert_eq!(seen, EpollFlags::empty());
    }

    fn wait(&self) -> EpollFlags {
        let mut events = [EpollEvent::empty()];
        match self.epoll.wait(&mut events, EpollTimeout::ZERO) {
            Ok(1) => events[0].events(),
            _ => EpollFlags::empty(),
        }
    }

    fn change(&self, events: EpollFlags) {
        let mut event = EpollEvent::new(events, 0);
        self.epoll.modify(&self.end, &mut event).expect("watched");
    }
}

const IN: EpollFlags = EpollFlags::EPOLLIN;
const OUT: EpollFlags = EpollFlags::EPOLLOUT;
const END: EpollFlags = EpollFlags::EPOLLRDHUP;

#[test]
fn poll_tells_what_can_be_done() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        let all = PollFlags::POLLIN | PollFlags::POLLOUT | ENDED;
        assert_eq!(app.has_now(all), PollFlags::POLLOUT);
        assert_eq!(peer.send("abc"), Ok(3));
        app.has(PollFlags::POLLIN | PollFlags::POLLOUT);
        assert_eq!(app.recv(2), text("ab"));
        assert_eq!(app.has_now(all), PollFlags::POLLIN | PollFlags::POLLOUT);
        assert_eq!(app.recv(2), text("c"));
        assert_eq!(app.has_now(all), PollFlags::POLLOUT);
        assert_eq!(peer.shutdown(Shutdown::Write), Ok(()));
        app.has(all);
        assert_eq!(app.recv(2), nothing());
        assert_eq!(app.has_now(all), all);
        assert_eq!(app.shutdown(Shutdown::Write), Ok(()));
        app.has(all | PollFlags::POLLHUP);
        assert_eq!(peer.gets_end(), nothing());
    });
}

#[test]
fn poll_tells_when_there_is_room() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        let pattern = Pattern::new(2);
        let sent = app.sends_until_full(pattern, 0);
        peer.unnoticed().gets_pattern(pattern, sent);
        app.has(PollFlags::POLLOUT);
        assert_eq!(app.send("abc"), Ok(3));
        peer.gets("abc");
    });
}

#[test]
fn epoll_tells_by_level() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        let watch = Watch::new(&app, IN | END);
        watch.tells_nothing();
        assert_eq!(peer.send("abc"), Ok(3));
        app.has_queued(3);
        watch.tells(IN);
        watch.tells(IN);
        assert_eq!(app.recv(2), text("ab"));
        watch.tells(IN);
        assert_eq!(app.recv(2), text("c"));
        watch.tells_nothing();
        peer.close();
        watch.tells(IN | END);
        watch.tells(IN | END);
        assert_eq!(app.recv(2), nothing());
        watch.tells(IN | END);
    });
}

#[test]
fn epoll_tells_by_edge() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        let watch = Watch::new(&app, IN | OUT | END | EpollFlags::EPOLLET);
        watch.tells(OUT);
        watch.tells_nothing();
        assert_eq!(peer.send("abc"), Ok(3));
        watch.tells(IN | OUT);
        watch.tells_nothing();
        assert_eq!(app.recv(2), text("ab"));
        watch.tells_nothing();
        assert_eq!(peer.send("def"), Ok(3));
        watch.tells(IN | OUT);
        assert_eq!(app.recv(100), text("cdef"));
        assert_eq!(app.unnoticed().send("x"), Ok(1));
        peer.gets("x");
        assert_eq!(peer.send("ghi"), Ok(3));
        watch.tells(IN | OUT);
        assert_eq!(app.recv(100), text("ghi"));
        peer.close();
        watch.tells(IN | OUT | END);
        watch.tells_nothing();
        assert_eq!(app.recv(100), nothing());
        watch.tells_nothing();
    });
}

#[test]
fn epoll_tells_by_edge_when_there_is_room() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        let watch = Watch::new(&app, OUT | EpollFlags::EPOLLET);
        watch.tells(OUT);
        let pattern = Pattern::new(3);
        // Nobody knows when the proxies on the way hold all that they can: an edge
        // that has come before the last send had no room does not count.
        let mut sent = 0;
        loop {
            sent += app.unnoticed().sends_until_full(pattern, sent);
            if watch.wait().is_empty() {
                break;
            }
        }
        peer.unnoticed().gets_pattern(pattern, sent);
        watch.tells(OUT);
        assert_eq!(app.send("abc"), Ok(3));
        peer.gets("abc");
    });
}

#[test]
fn epoll_tells_once() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        let once = IN | EpollFlags::EPOLLONESHOT;
        let watch = Watch::new(&app, once);
        assert_eq!(peer.send("abc"), Ok(3));
        watch.tells(IN);
        watch.tells_nothing();
        assert_eq!(peer.send("def"), Ok(3));
        app.has_queued(6);
        watch.tells_nothing();
        watch.change(once);
        watch.tells(IN);
        assert_eq!(app.recv(100), text("abcdef"));
        watch.change(once);
        watch.tells_nothing();
    });
}

/// The events of a socket that was watched before anything was spliced are
/// those of one that is watched later.
#[test]
fn epoll_tells_of_a_reset() {
    compare(&Manner::ALL, |Ends { app, peer, .. }| {
        let level = Watch::new(&app, IN | END);
        let edge = Watch::new(&app, IN | END | EpollFlags::EPOLLET);
        peer.reset();
        let reset = IN | END | EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP;
        edge.tells(reset);
        edge.tells_nothing();
        level.tells(reset);
        level.tells(reset);
        assert_eq!(app.recv(10), Err(Errno::ECONNRESET));
        level.tells(IN | END | EpollFlags::EPOLLHUP);
    });
}
