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
    forward, handshake, kernel,
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
    if arrival.protocol() != TCP || arrival.stays_at_loopback() {
        return Outcome::Untouched;
    }
    let netns = pods::here();
    let Some(settings) = pods::settings(netns) else {
        return Outcome::Untouched;
    };
    let mut ends = (arrival.local(), arrival.remote());
    let redirected = is_redirected(netns, settings, &ends.1, &ends.0);
    kernel::forget(&mut ends);
    let (local, remote) = &ends;
    if settings.has(flags::INTERFACES) && forward::is_look(remote) {
        return Outcome::Untouched;
    }
    let port = if redirected {
        // The proxy may listen at loopback only.
        Some(local.port)
    } else {
        decide(arrival, netns, settings, local, remote)
    };
    match port {
        None => Outcome::Untouched,
        Some(port) => assign(arrival, netns, port, redirected),
    }
}

/// Whether this is a connection that `connect` sent to the proxy's port, at loopback or at
/// its own source address.
#[inline(always)]
fn is_redirected(
    netns: NetnsCookie,
    settings: &PodSettings,
    client: &Endpoint,
    server: &Endpoint,
) -> bool {
    settings.is_proxy_port(server.port) && handshake::is_published(netns, client, server)
}

/// The proxy's port that takes a packet from outside, or from a socket of the pod that
/// was not redirected; `None` when it goes where it was going.
#[inline(always)]
fn decide(
    arrival: Arrival,
    netns: NetnsCookie,
    settings: &PodSettings,
    local: &Endpoint,
    remote: &Endpoint,
) -> Option<u16> {
    // The interface does not tell: for the pod's own address it is eth0's. An
    // own source can only come from inside; from outside it is a martian.
    let from_self =
        lists::route(netns, &remote.addr).is_some_and(|route| route.flags & ROUTE_LOCAL != 0);
    let interface = lists::interface(settings, arrival.ifindex());
    let mut facts = Inbound {
        destination: local.addr,
        port: local.port,
        from_self,
        interface_excluded: interface & INTERFACE_EXCLUDED != 0,
        interface_virtual: interface & INTERFACE_VIRTUAL != 0,
    };
    kernel::forget(&mut facts);
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
    decision.verdict.port(settings)
}

/// The kinds of listeners, in the order in which the kernel prefers them.
const KINDS: [ListenerKind; 4] = [
    ListenerKind::V4,
    ListenerKind::V6,
    ListenerKind::Loopback4,
    ListenerKind::Loopback6,
];

/// The kinds that take packets of a family, from inside the pod or from outside, as bits
/// in the order of [`KINDS`]: listeners at loopback are for the pod itself.
#[inline(always)]
const fn wanted(v4: bool, inside: bool) -> u32 {
    match (v4, inside) {
        (true, true) => 0b1111,
        (true, false) => 0b0011,
        (false, true) => 0b1010,
        (false, false) => 0b0010,
    }
}

/// Gives the packet to a listener of the proxy.
#[inline(always)]
fn assign(arrival: Arrival, netns: NetnsCookie, port: u16, inside: bool) -> Outcome {
    let wanted = wanted(arrival.family() == AF_INET, inside);
    // What the verifier can tell apart it follows through all the slots, for each pod anew.
    let mut known = (port, wanted, 0);
    kernel::forget(&mut known);
    let (port, wanted, mut not_taken) = known;
    for (index, kind) in KINDS.into_iter().enumerate() {
        let is_wanted = wanted & 1 << index != 0;
        if is_wanted && assign_kind(arrival, netns, port, kind, &mut not_taken) {
            return Outcome::Assigned;
        }
    }
    // Where nobody takes a packet from inside, `sock_ops` sees the client, and counts it.
    if not_taken != 0 {
        counters::failed(netns, ErrorCode::AssignFailed);
    } else if !inside {
        counters::failed(netns, ErrorCode::ProxyAway);
    }
    ask_for_listeners(netns, port);
    Outcome::Refused
}

/// Tries the listeners of one kind; `not_taken` is not 0 when there is one that the
/// kernel does not take.
#[inline(always)]
fn assign_kind(
    arrival: Arrival,
    netns: NetnsCookie,
    port: u16,
    kind: ListenerKind,
    not_taken: &mut u32,
) -> bool {
    for slot in 0..LISTENER_SLOTS {
        let key = ListenerKey::new(netns, port, kind, slot);
        // Without NO_REUSEPORT the kernel spreads over the listener's group.
        match LISTENERS.redirect_sk_lookup(SkLookupContext::new(arrival.as_ptr()), key, 0) {
            Ok(()) => {
                if slot > 0 {
                    ask_for_listeners(netns, port);
                }
                return true;
            }
            Err(NO_ENTRY) => {}
            Err(_) => *not_taken |= 1,
        }
    }
    false
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
