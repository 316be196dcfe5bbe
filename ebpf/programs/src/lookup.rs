//! A packet from outside the pod looks for a listener.

use aya_ebpf::programs::SkLookupContext;
use shunt_abi::{
    Decided, Endpoint, ErrorCode, Event, INTERFACE_EXCLUDED, INTERFACE_VIRTUAL, LISTENER_SLOTS,
    ListenerKey, ListenerKind, NO_OWNER, NetnsCookie, PodSettings, ROUTE_LOCAL, flags,
};
use shunt_decide::{Inbound, inbound};

use crate::{
    counters,
    ctx::{AF_INET, Arrival, TCP},
    forward, handshake,
    lists::{self, PodLists},
    log,
    maps::{EVENTS, LISTENERS},
    pods,
};

/// What becomes of a packet that looks for a listener.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The kernel looks for one as ever.
    Untouched,
    /// It was given one of the proxy's.
    Assigned,
    /// It is refused: the proxy has to take it, and does not listen.
    Refused,
}

/// Decides over a packet.
#[inline(always)]
pub fn lookup(arrival: Arrival) -> Outcome {
    if arrival.protocol() != TCP {
        return Outcome::Untouched;
    }
    let netns = pods::here();
    let Some(settings) = pods::settings(netns) else {
        return Outcome::Untouched;
    };
    let local = arrival.local();
    let remote = arrival.remote();
    if settings.has(flags::INTERFACES) && forward::is_look(&remote) {
        return Outcome::Untouched;
    }
    // The interface does not tell: for the pod's own address it is eth0's. An
    // own source can only come from inside; from outside it is a martian.
    let from_self =
        lists::route(netns, &remote.addr).is_some_and(|route| route.flags & ROUTE_LOCAL != 0);
    if from_self && is_redirected(netns, settings, &remote, &local) {
        return assign(arrival, netns, local.port, &INSIDE);
    }
    let interface = lists::interface(settings, arrival.ifindex());
    let facts = Inbound {
        destination: local.addr,
        port: local.port,
        from_self,
        interface_excluded: interface & INTERFACE_EXCLUDED != 0,
        interface_virtual: interface & INTERFACE_VIRTUAL != 0,
    };
    let lists = PodLists {
        list_set: settings.list_set,
    };
    let decision = inbound(settings, &facts, &lists);
    counters::decided(netns, decision.rule);
    log::decided(|| Decided {
        netns,
        source: remote.addr,
        destination: local.addr,
        source_port: remote.port,
        destination_port: local.port,
        uid: NO_OWNER,
        gid: NO_OWNER,
        rule: decision.rule as u32,
    });
    match decision.verdict.port(settings) {
        None => Outcome::Untouched,
        Some(port) => assign(arrival, netns, port, &OUTSIDE),
    }
}

/// Whether this is a connection that `connect` sent to the proxy's port at the
/// pod's own address, because its socket had a port already. The proxy may
/// listen on loopback only. On its way to loopback it needs no help.
#[inline(always)]
fn is_redirected(
    netns: NetnsCookie,
    settings: &PodSettings,
    client: &Endpoint,
    server: &Endpoint,
) -> bool {
    settings.is_proxy_port(server.port)
        && !server.addr.is_loopback()
        && handshake::is_published(netns, client, server)
}

/// The kinds of listeners that a packet can be given to, by its family: those
/// for IPv4 in the order in which the kernel prefers them, then those for IPv6.
struct Kinds {
    v4: &'static [ListenerKind],
    v6: &'static [ListenerKind],
    /// Whether a packet that finds none is to be counted: of one from inside the pod
    /// `sock_ops` sees the client, and counts it there.
    counted: bool,
}

/// For a packet from outside the pod.
const OUTSIDE: Kinds = Kinds {
    v4: &[ListenerKind::V4, ListenerKind::V6],
    v6: &[ListenerKind::V6],
    counted: true,
};

/// For a packet from inside the pod.
const INSIDE: Kinds = Kinds {
    v4: &[
        ListenerKind::V4,
        ListenerKind::V6,
        ListenerKind::Loopback4,
        ListenerKind::Loopback6,
    ],
    v6: &[ListenerKind::V6, ListenerKind::Loopback6],
    counted: false,
};

/// Gives the packet to a listener of the proxy.
#[inline(always)]
fn assign(arrival: Arrival, netns: NetnsCookie, port: u16, wanted: &'static Kinds) -> Outcome {
    let kinds = if arrival.family() == AF_INET {
        wanted.v4
    } else {
        wanted.v6
    };
    let mut error = ErrorCode::ProxyAway;
    for kind in kinds {
        match assign_kind(arrival, netns, port, *kind) {
            Found::Assigned => return Outcome::Assigned,
            Found::NotTaken => error = ErrorCode::AssignFailed,
            Found::Nobody => {}
        }
    }
    if wanted.counted || !matches!(error, ErrorCode::ProxyAway) {
        counters::failed(netns, error);
    }
    ask_for_listeners(netns, port);
    Outcome::Refused
}

/// What trying the listeners of one kind came to.
enum Found {
    Assigned,
    NotTaken,
    Nobody,
}

#[inline(always)]
fn assign_kind(arrival: Arrival, netns: NetnsCookie, port: u16, kind: ListenerKind) -> Found {
    let mut found = Found::Nobody;
    for slot in 0..LISTENER_SLOTS {
        let key = ListenerKey::new(netns, port, kind, slot);
        // Without NO_REUSEPORT the kernel spreads over the listener's group.
        match LISTENERS.redirect_sk_lookup(SkLookupContext::new(arrival.as_ptr()), key, 0) {
            Ok(()) => {
                if slot > 0 {
                    ask_for_listeners(netns, port);
                }
                return Found::Assigned;
            }
            Err(NO_ENTRY) => {}
            Err(_) => found = Found::NotTaken,
        }
    }
    found
}

/// `-ENOENT`, aya's answer for a key that is not in the map.
const NO_ENTRY: i32 = -2;

/// Has the agent look for listeners that are in no slot. A full ring buffer
/// means that it was asked often enough.
#[inline(always)]
fn ask_for_listeners(cookie: NetnsCookie, port: u16) {
    let event = Event {
        cookie,
        port,
        pad: [0; 3],
    };
    let _ = EVENTS.output(event, 0);
}
