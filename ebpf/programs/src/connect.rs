//! connect(): decide, remember what was asked for, rewrite.

use shunt_abi::{
    Addr, Endpoint, ErrorCode, INTERFACE_EXCLUDED, NO_OWNER, NetnsCookie, ROUTE_LOCAL,
    ROUTE_UNREACHABLE, Route,
};
use shunt_decide::{Outbound, Protocol, outbound};

use crate::{
    counters,
    ctx::{AF_INET, AddressCall, TCP},
    kernel,
    lists::{self, PodLists},
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

const ENOMEM: i32 = 12;
const EADDRNOTAVAIL: i32 = 99;
const ENETUNREACH: i32 = 101;

/// Decides over a call to connect() that asks for `asked`.
#[inline(always)]
pub fn connect(call: AddressCall, asked: Endpoint) -> Outcome {
    let netns = call.netns();
    let Some(settings) = pods::settings(netns) else {
        return Outcome::Untouched;
    };
    if call.protocol() != TCP {
        return Outcome::Untouched;
    }
    let path = Path::of(call, netns, asked);
    let (uid, gid) = kernel::owner(call.socket().socket()).unwrap_or_else(|| {
        counters::failed(netns, ErrorCode::OwnerUnknown);
        (NO_OWNER, NO_OWNER)
    });
    let facts = Outbound {
        protocol: Protocol::Tcp,
        source: path.source,
        destination: path.destination,
        port: asked.port,
        uid,
        gid,
        to_self: path.route.flags & ROUTE_LOCAL != 0,
        interface_excluded: lists::interface(netns, settings, path.ifindex) & INTERFACE_EXCLUDED
            != 0,
    };
    let lists = PodLists {
        list_set: settings.list_set,
    };
    let decision = outbound(settings, &facts, &lists);
    counters::decided(netns, decision.rule);
    match decision.verdict.port(settings) {
        // The socket may have been redirected by an earlier connect().
        None => {
            ASKED.remove(call.socket().socket());
            Outcome::Untouched
        }
        Some(port) => redirect(call, netns, &path, asked.port, port),
    }
}

/// How the connection would go without redirection.
struct Path {
    /// The source address it has or would get.
    source: Addr,
    /// Whether the socket has it already.
    bound: bool,
    /// Where it goes: what was asked for, or what the kernel takes it for.
    destination: Addr,
    /// The route there; unreachable where there is none.
    route: Route,
    /// The interface: the one that the socket is bound to, or the route's.
    ifindex: u32,
}

impl Path {
    #[inline(always)]
    fn of(call: AddressCall, netns: NetnsCookie, asked: Endpoint) -> Self {
        let own = call.socket().source();
        let bound = !own.is_unspecified();
        let destination = match (asked.addr.is_unspecified(), bound) {
            (false, _) => asked.addr,
            (true, true) => own,
            (true, false) => loopback_like(&asked.addr, call),
        };
        let route = lists::route(netns, &destination).unwrap_or(Route {
            source: Addr::default(),
            ifindex: 0,
            flags: ROUTE_UNREACHABLE,
        });
        let source = if bound {
            own
        } else if route.source.is_unspecified() {
            destination
        } else {
            route.source
        };
        let device = call.socket().device();
        Self {
            source,
            bound,
            destination,
            route,
            ifindex: if device == 0 { route.ifindex } else { device },
        }
    }
}

/// The loopback address of the family that a call speaks: a call for `::` is
/// one for `::1`, a call for `0.0.0.0` or `::ffff:0.0.0.0` one for `127.0.0.1`.
#[inline(always)]
fn loopback_like(addr: &Addr, call: AddressCall) -> Addr {
    if call.family() == AF_INET || addr.is_v4() {
        Addr::LOOPBACK4
    } else {
        Addr::LOOPBACK6
    }
}

/// Points the connection at the proxy's `port`, and leaves everything else that
/// either side can see as it would have been.
#[inline(always)]
fn redirect(
    call: AddressCall,
    netns: NetnsCookie,
    path: &Path,
    asked_port: u16,
    port: u16,
) -> Outcome {
    if path.route.flags & ROUTE_UNREACHABLE != 0 {
        counters::failed(netns, ErrorCode::NoRoute);
        return Outcome::Refused(ENETUNREACH);
    }
    let loopback = if path.destination.is_v4() {
        Addr::LOOPBACK4
    } else {
        Addr::LOOPBACK6
    };
    let mut to = loopback;
    // On its way to loopback an unbound socket would get loopback's address.
    if !path.bound && !path.source.same(&loopback) {
        if call.socket().source_port() == 0 {
            if call.bind(&path.source).is_err() {
                counters::failed(netns, ErrorCode::BindFailed);
                return Outcome::Refused(EADDRNOTAVAIL);
            }
        } else {
            // Bound to a port and no address, a socket cannot be bound again.
            // Sent to the source address itself it gets just that.
            to = path.source;
        }
    }
    let asked = Endpoint::new(path.destination, asked_port);
    if ASKED.set(call.socket().socket(), asked).is_err() {
        counters::failed(netns, ErrorCode::RememberFailed);
        return Outcome::Refused(ENOMEM);
    }
    Outcome::Redirected(Endpoint::new(to, port))
}
