//! connect(): decide, remember what was asked for, rewrite.

use shunt_abi::{ASKED_BOUND, ASKED_REDIRECTED, Addr, Asked, Endpoint, ErrorCode, NetnsCookie};
use shunt_decide::{Protocol, may_capture};

use crate::{
    counters,
    ctx::{AF_INET, AddressCall, EADDRNOTAVAIL, ENETUNREACH, ENOMEM},
    facts::{self, Path, loopback_like},
    maps::ASKED,
    pods,
};

/// What becomes of a call to connect().
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It goes on as it is.
    Untouched,
    /// It goes on to this address instead.
    Redirected(Endpoint),
    /// It fails with this error number: it has to be redirected and cannot be.
    Refused(i32),
}

/// Decides over a call to connect() that asks for `asked`.
#[inline(always)]
pub fn connect(call: AddressCall, asked: Endpoint) -> Outcome {
    let socket = call.socket().socket();
    let netns = call.netns();
    let (Some(settings), Some(protocol)) = (pods::settings(netns), call.protocol()) else {
        // Redirected while its namespace was enrolled, connected again after.
        ASKED.remove(socket);
        return Outcome::Untouched;
    };
    let bound_before = ASKED
        .get(socket)
        .is_some_and(|before| before.flags & ASKED_BOUND != 0);
    let capturable = may_capture(settings, protocol, asked.port);
    if !capturable && !bound_before {
        ASKED.remove(socket);
        return Outcome::Untouched;
    }
    let path = Path::of(call, netns, asked, bound_before);
    if capturable {
        let decision = facts::decide(call, netns, settings, protocol, &path, asked.port);
        if let Some(port) = decision.verdict.port(settings) {
            let redirection = Redirection {
                call,
                netns,
                path: &path,
                asked: Endpoint::new(path.destination, asked.port),
                protocol,
                bound_before,
            };
            return redirection.to(port);
        }
    }
    leave(call, &path, bound_before)
}

/// Lets a connect() go where it asks to, from where it would.
#[inline(always)]
fn leave(call: AddressCall, path: &Path, bound_before: bool) -> Outcome {
    let socket = call.socket().socket();
    if bound_before {
        // The source of a connection that was redirected is not this one's. Where
        // it cannot be bound, connect() fails or finds its own.
        let _ = call.bind(&path.source);
        let only_bound = Asked {
            flags: ASKED_BOUND,
            ..Asked::default()
        };
        let _ = ASKED.set(socket, only_bound);
    } else {
        ASKED.remove(socket);
    }
    Outcome::Untouched
}

/// A connection that has to go to the proxy.
struct Redirection<'a> {
    call: AddressCall,
    netns: NetnsCookie,
    path: &'a Path,
    asked: Endpoint,
    protocol: Protocol,
    /// An earlier redirection bound the socket.
    bound_before: bool,
}

impl Redirection<'_> {
    /// Points the connection at the proxy's `port`, and leaves everything else
    /// that either side can see as it would have been.
    #[inline(always)]
    fn to(&self, port: u16) -> Outcome {
        if let Some(errno) = self.path.dead_end() {
            return self.refuse(ErrorCode::NoRoute, errno);
        }
        let loopback = loopback_like(&self.path.destination);
        let mut to = loopback;
        let mut flags = ASKED_REDIRECTED;
        if self.bound_before {
            flags |= ASKED_BOUND;
        }
        if self.must_bind(&loopback) {
            if self.call.socket().source_port() == 0 {
                if self.call.bind(&self.path.source).is_err() {
                    return self.refuse(ErrorCode::BindFailed, self.unbindable());
                }
                flags |= ASKED_BOUND;
            } else if matches!(self.protocol, Protocol::Tcp) {
                // Bound to a port and no address, a socket cannot be bound again.
                // Sent to the source address itself it gets just that; sk_lookup
                // helps it to a listener on loopback. A datagram would find
                // nobody there, and goes from 127.0.0.1.
                to = self.path.source;
            }
        }
        let asked = Asked {
            destination: self.asked,
            flags,
        };
        if ASKED.set(self.call.socket().socket(), asked).is_err() {
            return self.refuse(ErrorCode::RememberFailed, ENOMEM);
        }
        Outcome::Redirected(Endpoint::new(to, port))
    }

    /// On its way to loopback an unbound socket would get loopback's address.
    #[inline(always)]
    fn must_bind(&self, loopback: &Addr) -> bool {
        !self.path.bound && (self.bound_before || !self.path.source.same(loopback))
    }

    /// What connect() says when the source cannot be bound: the address is gone;
    /// or, for an IPv4 destination of an `AF_INET6` socket, most likely the socket
    /// is `IPV6_V6ONLY`, of which the kernel says that the network is unreachable
    /// (`tcp_v6_connect`).
    #[inline(always)]
    fn unbindable(&self) -> i32 {
        if self.call.family() != AF_INET && self.path.destination.is_v4() {
            ENETUNREACH
        } else {
            EADDRNOTAVAIL
        }
    }

    #[inline(always)]
    fn refuse(&self, error: ErrorCode, errno: i32) -> Outcome {
        counters::failed(self.netns, error);
        Outcome::Refused(errno)
    }
}
