use crate::{Addr, NetnsCookie};

/// An address and a port.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Hash, PartialEq, Eq)]
pub struct Endpoint {
    /// The address.
    pub addr: Addr,
    /// The port, host byte order.
    pub port: u16,
    /// Always 0.
    pub pad: u16,
}

impl Endpoint {
    /// An endpoint; `port` in host byte order.
    #[inline(always)]
    pub const fn new(addr: Addr, port: u16) -> Self {
        Self { addr, port, pad: 0 }
    }
}

/// Value of the socket storage `ASKED`: what `connect` did to a socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// What the application asked for; meaningful with [`ASKED_REDIRECTED`].
    pub destination: Endpoint,
    /// Bits `ASKED_…`.
    pub flags: u32,
}

/// Bit of [`Asked::flags`]: the last connect() was redirected.
pub const ASKED_REDIRECTED: u32 = 1 << 0;
/// Bit of [`Asked::flags`]: the source address was bound by the program, not by
/// the application. It stays when a connection fails or is dissolved, and the
/// next connect() must not take it for the application's wish.
pub const ASKED_BOUND: u32 = 1 << 1;
/// Bit of [`Asked::flags`]: the connection had no slot in `FLOW_SLOTS` and may have entries in
/// `FLOWS`.
pub const ASKED_IN_FLOWS: u32 = 1 << 2;

impl Asked {
    /// The destination that was asked for, `None` when the last connect() was
    /// not redirected.
    #[inline(always)]
    pub const fn destination(&self) -> Option<&Endpoint> {
        if self.flags & ASKED_REDIRECTED == 0 {
            return None;
        }
        Some(&self.destination)
    }
}

/// Value of the socket storage `ORIGINAL_DST`, of a listener of the proxy and of what it
/// accepts.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OriginalDst {
    /// The original destination; of no family where there is only the mark of a listener.
    pub addr: Addr,
    /// Its port, or the listener's own; host byte order.
    pub port: u16,
    /// Bits `ORIGINAL_DST_…`. What agents before this one made has 0 here.
    pub flags: u16,
}

/// Bit of [`OriginalDst::flags`]: splicing hears of each segment that the socket sends, and
/// nobody else had asked for that.
pub const ORIGINAL_DST_WATCHED: u16 = 1 << 0;
/// Bit of [`OriginalDst::flags`]: it has heard of enough of them.
pub const ORIGINAL_DST_KNOWN: u16 = 1 << 1;

impl OriginalDst {
    /// What is kept with an accepted socket whose client asked for this.
    #[inline(always)]
    pub const fn new(destination: &Endpoint) -> Self {
        Self {
            addr: destination.addr,
            port: destination.port,
            flags: 0,
        }
    }

    /// The mark of a listener at this port, which what it accepts inherits.
    #[inline(always)]
    pub fn listener(port: u16) -> Self {
        Self::new(&Endpoint::new(Addr::default(), port))
    }

    /// The original destination, if there is more than the mark of a listener.
    #[inline(always)]
    pub fn destination(&self) -> Option<Endpoint> {
        let is_mark = self.addr.same(&Addr::default());
        (!is_mark).then(|| Endpoint::new(self.addr, self.port))
    }
}

/// Key of the map `FLOWS`, and of a [`FlowSlot`]: a redirected connection between the first
/// packet of the application and its acceptance by the proxy.
#[repr(C)]
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub struct FlowKey {
    /// The network namespace of both sides.
    pub cookie: NetnsCookie,
    /// The application's address.
    pub client: Addr,
    /// The proxy's address.
    pub server: Addr,
    /// The application's port, host byte order.
    pub client_port: u16,
    /// The proxy's port, host byte order.
    pub server_port: u16,
    /// Always 0.
    pub pad: u32,
}

impl FlowKey {
    /// Which of so many slots, 65,536 at most, is this connection's, wherever it ends up: the
    /// proxy's address has no part in it.
    #[inline(always)]
    pub const fn slot(&self, slots: u32) -> u32 {
        /// 2³² divided by the golden ratio: namespaces come with cookies in a row, and their
        /// clients with ports in a row.
        const SPREAD: u32 = 0x9e37_79b1;
        // connect() takes ports of one parity: the lowest bit tells less than all others.
        let port = self.client_port.rotate_right(1) as u32;
        let client = (self.client.words[3] ^ self.cookie as u32).wrapping_add(port << 16);
        (client.wrapping_mul(SPREAD) >> 16) % slots
    }

    /// Whether this is the same connection, sent to the same address.
    #[inline(always)]
    pub const fn same(&self, other: &Self) -> bool {
        self.same_client(other) && self.server.same(&other.server)
    }

    /// Whether this connection, as it was published, is the one that has arrived as `other`.
    /// What was sent to another address than loopback's, which is its client's own, may arrive
    /// at loopback all the same: the proxy's iptables rules, where a pod has them too, send it
    /// there. What was sent to loopback arrives there.
    #[inline(always)]
    pub const fn arrives_as(&self, other: &Self) -> bool {
        self.same_client(other)
            && (self.server.same(&other.server)
                || (!self.server.is_loopback() && other.server.is_loopback()))
    }

    #[inline(always)]
    const fn same_client(&self, other: &Self) -> bool {
        self.cookie == other.cookie
            && self.client.same(&other.client)
            && self.client_port == other.client_port
            && self.server_port == other.server_port
    }
}

/// Element of the map `FLOW_SLOTS`: a place for one connection on its way.
///
/// Its two ends, on two processors, and other connections of the same slot meet here
/// without a lock. Who changes `state` from free owns the rest until it is published. From
/// then on nobody writes to it, so who has read it and then changes `state` to free has read
/// what was there all the while; and so has who finds `state` as it was before. For it never
/// has the same value twice.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowSlot {
    /// How often it changed; see [`is_free`](Self::is_free), [`is_published`](Self::is_published).
    pub state: u64,
    /// The connection.
    pub key: FlowKey,
    /// What the application asked for.
    pub asked: Endpoint,
    /// Always 0.
    pub pad: u32,
}

impl FlowSlot {
    /// How far the states of two free ones in a row are apart. After the first comes being
    /// written, then published; the fourth is left out, so that a program need not divide.
    const PHASES: u64 = 4;

    /// Whether a slot in this state has nothing in it.
    #[inline(always)]
    pub const fn is_free(state: u64) -> bool {
        state.is_multiple_of(Self::PHASES)
    }

    /// Whether the connection of a slot in this state may be looked at.
    #[inline(always)]
    pub const fn is_published(state: u64) -> bool {
        state % Self::PHASES == 2
    }

    /// The state after `state`.
    #[inline(always)]
    pub const fn next(state: u64) -> u64 {
        if Self::is_published(state) {
            state.wrapping_add(2)
        } else {
            state.wrapping_add(1)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Addr = Addr::SIX4;

    fn key(server: Addr) -> FlowKey {
        FlowKey {
            cookie: 7,
            client: OWN,
            server,
            client_port: 40_000,
            server_port: 15001,
            pad: 0,
        }
    }

    #[test]
    fn a_connection_to_the_own_address_may_arrive_at_loopback_and_not_the_other_way() {
        let [to_own, to_loopback] = [OWN, Addr::LOOPBACK6].map(key);
        let own = FlowKey {
            server: Addr::from_v4(1),
            ..to_own
        };
        assert!(own.arrives_as(&own) && to_loopback.arrives_as(&to_loopback));
        assert!(own.arrives_as(&to_loopback) && !own.same(&to_loopback));
        assert!(!to_loopback.arrives_as(&own));
        assert_eq!(own.slot(128), to_loopback.slot(128));
    }

    #[test]
    fn connections_of_others_do_not_arrive() {
        let one = key(Addr::LOOPBACK4);
        for other in [
            FlowKey { cookie: 8, ..one },
            FlowKey {
                client: Addr::LOOPBACK4,
                ..one
            },
            FlowKey {
                client_port: 40_001,
                ..one
            },
            FlowKey {
                server_port: 15006,
                ..one
            },
        ] {
            assert!(!one.arrives_as(&other) && !one.same(&other), "{other:?}");
        }
    }

    #[test]
    fn connections_that_begin_together_have_slots_of_their_own() {
        const SLOTS: u32 = 128;
        let held = |cookies: core::ops::Range<u64>, each: u16| {
            let mut slots = [0_u16; SLOTS as usize];
            for cookie in cookies {
                // connect() gives ports in steps of two.
                for client_port in (0..each).map(|number| 40_000 + 2 * number) {
                    let one = FlowKey {
                        cookie,
                        client_port,
                        ..key(Addr::LOOPBACK4)
                    };
                    slots[one.slot(SLOTS) as usize] += 1;
                }
            }
            slots
        };
        assert!(held(7..8, 128).iter().all(|held| *held == 1), "of one pod");
        let held = held(4_000..4_010, 3);
        let shared = held.iter().filter(|held| **held > 1).count();
        assert!(shared < 8, "{shared} slots for 30 connections are shared");
    }

    #[test]
    fn a_slot_goes_from_free_to_published_and_back_and_is_never_as_before() {
        let mut states = [0_u64; 7];
        for at in 1..states.len() {
            states[at] = FlowSlot::next(states[at - 1]);
        }
        let free = states.map(FlowSlot::is_free);
        let published = states.map(FlowSlot::is_published);
        assert_eq!(free, [true, false, false, true, false, false, true]);
        assert_eq!(published, [false, false, true, false, false, true, false]);
        assert!(states.is_sorted() && states[6] > states[3]);
    }
}
