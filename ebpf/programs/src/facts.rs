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

/// Decides over a call that sends a packet this way.
#[inline(always)]
pub fn decide(
    call: AddressCall,
    netns: NetnsCookie,
    settings: &PodSettings,
    path: &mut Path,
) -> Decision {
    let owner = kernel::owner(call.socket().socket());
    if owner.is_none() {
        counters::failed(netns, ErrorCode::OwnerUnknown);
    }
    (path.facts.uid, path.facts.gid) = owner.unwrap_or((NO_OWNER, NO_OWNER));
    let interface = lists::interface(settings, path.ifindex);
    path.facts.interface_excluded = interface & INTERFACE_EXCLUDED != 0;
    kernel::forget(path);
    let facts = &path.facts;
    let lists = PodLists {
        list_set: settings.list_set,
    };
    let decision = outbound(settings, facts, &lists);
    counters::decided(netns, decision.rule);
    log::decided(|| Decided {
        netns,
        source: facts.source,
        destination: facts.destination,
        source_port: call.socket().source_port(),
        destination_port: facts.port,
        uid: facts.uid,
        gid: facts.gid,
        rule: decision.rule as u32,
    });
    decision
}

/// How a packet would go without redirection.
#[derive(Clone, Copy)]
pub struct Path {
    /// What the rules ask. The destination is what was asked for, or what the kernel takes
    /// it for; the source is the address that the socket has or would get.
    pub facts: Outbound,
    /// The interface: the one that the socket is bound to, or the route's.
    ifindex: u32,
    /// Whether the socket has its source address already.
    pub bound: bool,
    /// Whether there is no route.
    unreachable: bool,
}

impl Path {
    /// The way of a packet that `call` sends to `asked`. With `disregard_source`
    /// the address that the socket is bound to is not the application's choice.
    #[inline(always)]
    pub fn of(
        call: AddressCall,
        netns: NetnsCookie,
        protocol: Protocol,
        asked: &Endpoint,
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
        let route = lists::route(netns, &destination).copied().unwrap_or(Route {
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
            facts: Outbound {
                protocol,
                source,
                destination,
                port: asked.port,
                uid: NO_OWNER,
                gid: NO_OWNER,
                to_self: route.flags & ROUTE_LOCAL != 0,
                interface_excluded: false,
            },
            ifindex: if device == 0 { route.ifindex } else { device },
            bound,
            unreachable: route.flags & ROUTE_UNREACHABLE != 0,
        }
    }

    /// Where it goes.
    #[inline(always)]
    pub const fn asked(&self) -> Endpoint {
        Endpoint::new(self.facts.destination, self.facts.port)
    }

    /// The error that the kernel has for this way, before any rule is asked:
    /// there is no route, or none from the IPv4 loopback address that the socket
    /// is bound to (`__mkroute_output`). Redirected it would find one.
    #[inline(always)]
    pub const fn dead_end(&self) -> Option<i32> {
        if self.unreachable {
            return Some(ENETUNREACH);
        }
        let Outbound {
            source, to_self, ..
        } = &self.facts;
        if self.bound && !*to_self && source.is_v4() && source.is_loopback() {
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
