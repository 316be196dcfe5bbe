use crate::NetnsCookie;

/// How many listeners of one `SO_REUSEPORT` group are known at a time. One is
/// enough to reach the whole group; the others stand in when it is closed.
pub const LISTENER_SLOTS: u8 = 8;

/// Which packets a listener can be given.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListenerKind {
    /// `AF_INET`: those of IPv4.
    V4 = 4,
    /// `AF_INET6`: those of IPv6, and of IPv4 unless it is `IPV6_V6ONLY`.
    V6 = 6,
    /// `AF_INET`, bound to loopback: those that the pod itself sent.
    Loopback4 = 14,
    /// `AF_INET6`, bound to loopback: those that the pod itself sent.
    Loopback6 = 16,
}

/// Key of the map `LISTENERS`: one listening socket of a proxy.
#[repr(C)]
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub struct ListenerKey {
    /// The network namespace that it listens in.
    pub cookie: NetnsCookie,
    /// The port, host byte order.
    pub port: u16,
    /// A [`ListenerKind`] code.
    pub kind: u8,
    /// Which of the [`LISTENER_SLOTS`].
    pub slot: u8,
    /// Always 0.
    pub pad: u32,
}

impl ListenerKey {
    /// The key of one slot.
    #[inline(always)]
    pub const fn new(cookie: NetnsCookie, port: u16, kind: ListenerKind, slot: u8) -> Self {
        Self {
            cookie,
            port,
            kind: kind as u8,
            slot,
            pad: 0,
        }
    }
}

/// What a program tells the agent, by the ring buffer `EVENTS`: a connection
/// found the first slot of a listener empty. Others of its group may listen that
/// no slot knows, and the agent looks for them.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// The network namespace that it listened in.
    pub cookie: NetnsCookie,
    /// The port, host byte order.
    pub port: u16,
    /// Always 0.
    pub pad: [u16; 3],
}
