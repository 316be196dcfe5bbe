//! What the BPF programs and the agent must agree on.
//!
//! Every type here is laid out by hand: `repr(C)`, explicit padding, integer
//! codes in place of `bool`, `Option` and Rust enums, because the two sides are
//! compiled by different compilers and a map outlives both.
//!
//! **Byte order.** Addresses are kept as the packet has them (network byte
//! order in memory), so that a longest-prefix-match trie can read them. Ports,
//! ids and counters are in host byte order. IPv4 is kept as `::ffff:a.b.c.d`,
//! so that one key type serves both families.
#![no_std]
#![forbid(unsafe_op_in_unsafe_fn)]

mod addr;
mod counters;
mod decided;
mod dns;
mod flow;
mod listeners;
mod lists;
mod offsets;
mod pod;
mod routes;
mod splice;
#[cfg(feature = "user")]
mod user;

pub use addr::Addr;
pub use counters::{Counters, ERROR_COUNT, ErrorCode, RULE_SLOTS};
pub use decided::Decided;
pub use dns::{PATIENCE, QUESTION_SLOTS, Questions};
pub use flow::{
    ASKED_BOUND, ASKED_IN_FLOWS, ASKED_REDIRECTED, Asked, Endpoint, FlowKey, FlowSlot,
    ORIGINAL_DST_KNOWN, ORIGINAL_DST_WATCHED, OriginalDst,
};
pub use listeners::{Event, LISTENER_SLOTS, ListenerKey, ListenerKind};
pub use lists::{
    CidrKey, CidrList, LIST_KEY_BITS, PORTS_PER_CHUNK, PortChunk, PortChunkKey, PortList,
};
pub use offsets::KernelOffsets;
pub use pod::{Hairpin, MAX_GROUPS, MAX_OWNERS, NOBODY, PodSettings, flags};
pub use routes::{
    INTERFACE_EXCLUDED, INTERFACE_VIRTUAL, Interface, InterfaceKey, LINK_HEADER_UNKNOWN,
    ROUTE_KEY_BITS, ROUTE_LOCAL, ROUTE_UNREACHABLE, Route, RouteKey,
};
pub use splice::{
    END_PASSIVE, END_PROXY, End, EndKey, FALLBACK_SLOTS, Fallback, LEAVING_FOR_A_WHILE,
    LEAVING_FOR_GOOD, Peer, Sender, SpliceCounters, SpliceMode, SpliceOffsets, Unfinished,
};

/// The kernel's name of a network namespace: never reused while the node runs
/// (`SO_NETNS_COOKIE`, `bpf_get_netns_cookie`; Linux 5.14). Zero names none.
pub type NetnsCookie = u64;

/// The id that no user and no group has
/// (`INVALID_UID`), given to a socket whose owner could not be read or that
/// has no file. It matches no owner rule, as with `iptables -m owner`.
pub const NO_OWNER: u32 = u32::MAX;
