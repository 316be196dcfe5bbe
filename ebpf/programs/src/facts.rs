//! What is known of a packet that a socket of a pod is about to send, and what
//! the rules make of it.

use shunt_abi::{
    Addr, Decided, Endpoint, ErrorCode, INTERFACE_EXCLUDED, NO_OWNER, NetnsCookie, PodSettings,
    ROUTE_LOCAL, ROUTE_UNREACHABLE, Route,
};
use shunt_decide::{Decision, Outbound, Protocol, outbound};

use crate::{
    counters,
    ctx::{AddressCall, EINVAL, ENETUNREACH},
    kernel,
    lists::{self, PodLists},
    log,
};

/// Decides over a call that sends to `asked`.
#[inline(always)]
pub fn decide(
    call: AddressCall,
    netns: NetnsCookie,
    settings: &PodSettings,
    protocol: Protocol,
    path: &Path,
    port: u16,
) -> Decision {
    let (uid, gid) = kernel::owner(call.socket().socket()).unwrap_or_else(|| {
        counters::failed(netns, ErrorCode::OwnerUnknown);
        (NO_OWNER, NO_OWNER)
    });
    let interface = lists::interface(settings, path.ifindex);
    let facts = kernel::forget(Outbound {
        protocol,
        source: path.source,
        destination: path.destination,
        port,
        uid,
        gid,
        to_self: path.route.flags & ROUTE_LOCAL != 0,
        interface_excluded: interface & INTERFACE_EXCLUDED != 0,
    });
    let lists = PodLists {
        list_set: settings.list_set,
    };
    let decision = outbound(settings, &facts, &lists);
    counters::decided(netns, decision.rule);
    log::decided(|| Decided {
        netns,
        source: path.source,
        destination: path.destination,
        source_port: call.socket().source_port(),
        destination_port: port,
        uid,
        gid,
        rule: decision.rule as u32,
    });
    decision
}

/// How a packet would go without redirection.
pub struct Path {
    /// The source address it has or would get.
    pub source: Addr,
    /// Whether the socket has it already.
    pub bound: bool,
    /// Where it goes: what was asked for, or what the kernel takes it for.
    pub destination: Addr,
    /// The route there; unreachable where there is none.
    pub route: Route,
    /// The interface: the one that the socket is bound to, or the route's.
    ifindex: u32,
}

impl Path {
    /// The way of a packet that `call` sends to `asked`. With `disregard_source`
    /// the address that the socket is bound to is not the application's choice.
    #[inline(always)]
    pub fn of(
        call: AddressCall,
        netns: NetnsCookie,
        asked: Endpoint,
        disregard_source: bool,
    ) -> Self {
        let own = call.socket().source();
        let bound = !own.is_unspecified() && !disregard_source;
        let destination = match (asked.addr.is_unspecified(), bound) {
            (false, _) => asked.addr,
            // 0.0.0.0 is the own address (`ip_route_output_key`); `::` is loopback,
            // whatever the socket is bound to (`tcp_v6_connect`).
            (true, true) if asked.addr.is_v4() => own,
            (true, true) => loopback_like(&own),
            (true, false) => loopback_like(&asked.addr),
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

    /// The error that the kernel has for this way, before any rule is asked:
    /// there is no route, or none from the IPv4 loopback address that the socket
    /// is bound to (`__mkroute_output`). Redirected it would find one.
    #[inline(always)]
    pub const fn dead_end(&self) -> Option<i32> {
        if self.route.flags & ROUTE_UNREACHABLE != 0 {
            return Some(ENETUNREACH);
        }
        let to_self = self.route.flags & ROUTE_LOCAL != 0;
        if self.bound && !to_self && self.source.is_v4() && self.source.is_loopback() {
            return Some(EINVAL);
        }
        None
    }
}

/// The loopback address of the family of another.
#[inline(always)]
pub const fn loopback_like(addr: &Addr) -> Addr {
    if addr.is_v4() {
        Addr::LOOPBACK4
    } else {
        Addr::LOOPBACK6
    }
}
