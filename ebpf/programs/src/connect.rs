//! connect(): decide, remember what was asked for, rewrite.

use shunt_abi::{
    ASKED_BOUND, ASKED_REDIRECTED, Addr, Asked, Endpoint, ErrorCode, NetnsCookie, ROUTE_LOCAL,
};
use shunt_decide::{Protocol, may_capture};

use crate::{
    bind, counters,
    ctx::{AF_INET, AddressCall, EADDRNOTAVAIL, ENETUNREACH, ENOMEM},
    facts::{self, Path, loopback_like},
    lists,
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
pub fn connect(call: AddressCall, asked: impl FnOnce(AddressCall) -> Endpoint) -> Outcome {
    bind::connects(call);
    let socket = call.socket().socket();
    let netns = call.netns();
    let (Some(settings), Some(protocol)) = (pods::settings(netns), call.protocol()) else {
        // Redirected while its namespace was enrolled, connected again after.
        ASKED.remove(socket);
        return Outcome::Untouched;
    };
    let asked = asked(call);
    let bound_before = ASKED
        .get(socket)
        .is_some_and(|before| before.flags & ASKED_BOUND != 0);
    let capturable = may_capture(settings, protocol, asked.port);
    if !capturable && !bound_before {
        ASKED.remove(socket);
        return Outcome::Untouched;
    }
    let mut path = Path::of(call, netns, protocol, &asked, bound_before);
    if capturable {
        let decision = facts::decide(call, netns, settings, &mut path);
        if let Some(port) = decision.verdict.port(settings) {
            let redirection = Redirection {
                call,
                netns,
                path: &path,
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
        let _ = call.bind(&path.facts.source);
        if let Some(asked) = ASKED.get_mut(socket) {
            *asked = Asked {
                flags: ASKED_BOUND,
                ..Asked::default()
            };
        }
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
        let loopback = loopback_like(&self.path.facts.destination);
        let mut to = loopback;
        let mut flags = ASKED_REDIRECTED;
        if self.bound_before {
            flags |= ASKED_BOUND;
        }
        if self.goes_to_itself() {
            to = self.path.facts.source;
        } else if self.must_bind(&loopback) && self.call.socket().source_port() == 0 {
            if self.call.bind(&self.path.facts.source).is_err() {
                return self.refuse(ErrorCode::BindFailed, self.unbindable());
            }
            flags |= ASKED_BOUND;
        }
        let asked = Asked {
            destination: self.path.asked(),
            flags,
        };
        if ASKED.set(self.call.socket().socket(), &asked).is_err() {
            return self.refuse(ErrorCode::RememberFailed, ENOMEM);
        }
        Outcome::Redirected(Endpoint::new(to, port))
    }

    /// Whether the connection is sent to its own source address: then an unbound
    /// socket gets just that for its source, and sk_lookup helps it to a listener
    /// that is on loopback. For two kinds of TCP sockets (a datagram would find
    /// nobody there):
    ///
    /// - one that is bound to a port and no address: it cannot be bound again;
    /// - one of IPv6: what the kernel answers to a packet from fd00::2 to ::1
    ///   without a socket (of a connection in TIME-WAIT, a reset) it routes by the
    ///   interface of fd00::2 (`tcp_v6_iif`), out of the pod. Such an answer is
    ///   lost, and the connection that waits for it stands still for seconds.
    ///
    /// A source that is not the pod's own (`IP_TRANSPARENT`) is no place to go to.
    #[inline(always)]
    fn goes_to_itself(&self) -> bool {
        if !matches!(self.path.facts.protocol, Protocol::Tcp) {
            return false;
        }
        let port_only = !self.path.bound
            && !self.path.facts.source.is_loopback()
            && self.call.socket().source_port() != 0;
        port_only || (!self.path.facts.destination.is_v4() && self.source_is_own())
    }

    #[inline(always)]
    fn source_is_own(&self) -> bool {
        !self.path.bound
            || lists::route(self.netns, &self.path.facts.source)
                .is_some_and(|route| route.flags & ROUTE_LOCAL != 0)
    }

    /// On its way to loopback an unbound socket would get loopback's address.
    #[inline(always)]
    fn must_bind(&self, loopback: &Addr) -> bool {
        !self.path.bound && (self.bound_before || !self.path.facts.source.same(loopback))
    }

    /// What connect() says when the source cannot be bound: the address is gone;
    /// or, for an IPv4 destination of an `AF_INET6` socket, most likely the socket
    /// is `IPV6_V6ONLY`, of which the kernel says that the network is unreachable
    /// (`tcp_v6_connect`).
    #[inline(always)]
    fn unbindable(&self) -> i32 {
        if self.call.family() != AF_INET && self.path.facts.destination.is_v4() {
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
