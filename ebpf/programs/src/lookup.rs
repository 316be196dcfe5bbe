//! A packet from outside the pod looks for a listener.

use aya_ebpf::{Global, programs::SkLookupContext};
use shunt_abi::{
    ErrorCode, Event, INTERFACE_EXCLUDED, INTERFACE_VIRTUAL, LISTENER_SLOTS, ListenerKey,
    NetnsCookie, ROUTE_LOCAL,
};
use shunt_decide::{Inbound, inbound};

use crate::{
    counters,
    ctx::{AF_INET, Arrival, TCP},
    lists::{self, PodLists},
    maps::{EVENTS, LISTENERS},
    pods,
};

/// The namespace that this copy of the program is attached to. No helper tells
/// an `sk_lookup` program where it runs, so each pod gets a copy of its own.
#[unsafe(no_mangle)]
static NETNS: Global<NetnsCookie> = Global::new(0);

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
    let netns = NETNS.load();
    let Some(settings) = pods::settings(netns) else {
        return Outcome::Untouched;
    };
    let local = arrival.local();
    let interface = lists::interface(netns, settings, arrival.ifindex());
    let facts = Inbound {
        destination: local.addr,
        port: local.port,
        // The interface does not tell: for the pod's own address it is eth0's.
        // An own source can only come from inside; from outside it is a martian.
        from_self: lists::route(netns, &arrival.remote_addr())
            .is_some_and(|route| route.flags & ROUTE_LOCAL != 0),
        interface_excluded: interface & INTERFACE_EXCLUDED != 0,
        interface_virtual: interface & INTERFACE_VIRTUAL != 0,
    };
    let lists = PodLists {
        list_set: settings.list_set,
    };
    let decision = inbound(settings, &facts, &lists);
    counters::decided(netns, decision.rule);
    match decision.verdict.port(settings) {
        None => Outcome::Untouched,
        Some(port) => assign(arrival, netns, port),
    }
}

/// Gives the packet to a listener of the proxy: one of its own family, or one
/// of IPv6 that takes IPv4 as well.
#[inline(always)]
fn assign(arrival: Arrival, netns: NetnsCookie, port: u16) -> Outcome {
    let mut seen = false;
    if arrival.family() == AF_INET {
        match assign_family(arrival, netns, port, 4) {
            Found::Assigned => return Outcome::Assigned,
            Found::NotTaken => seen = true,
            Found::Nobody => {}
        }
    }
    match assign_family(arrival, netns, port, 6) {
        Found::Assigned => return Outcome::Assigned,
        Found::NotTaken => seen = true,
        Found::Nobody => {}
    }
    let error = if seen {
        ErrorCode::AssignFailed
    } else {
        ErrorCode::ProxyAway
    };
    counters::failed(netns, error);
    ask_for_listeners(netns, port);
    Outcome::Refused
}

/// What trying the listeners of one family came to.
enum Found {
    Assigned,
    NotTaken,
    Nobody,
}

#[inline(always)]
fn assign_family(arrival: Arrival, netns: NetnsCookie, port: u16, family: u8) -> Found {
    let mut found = Found::Nobody;
    for slot in 0..LISTENER_SLOTS {
        let key = ListenerKey::new(netns, port, family, slot);
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
