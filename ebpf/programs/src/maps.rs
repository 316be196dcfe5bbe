//! Every map, with who writes and who reads it.
//!
//! What grows with connections lives in socket storage and dies with the socket;
//! the sizes below bound pods, lists and handshakes under way, never the number
//! of open connections. All but the arrays and ring buffers are hash-like and allocate
//! an element when it is inserted (`BPF_F_NO_PREALLOC`).

use aya_ebpf::{
    bindings::{BPF_F_CLONE, BPF_F_NO_PREALLOC},
    btf_maps::{
        Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, PerCpuHashMap, RingBuf, SockHash,
    },
    macros::btf_map,
};
use shunt_abi::{
    Asked, CidrKey, Counters, Decided, End, EndKey, Endpoint, Event, FlowKey, FlowSlot, Interface,
    InterfaceKey, ListenerKey, NetnsCookie, OriginalDst, PodSettings, PortChunk, PortChunkKey,
    Questions, Route, RouteKey, Sender,
};

use crate::storage::SocketStorage;

const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;

const CLONE: usize = BPF_F_CLONE as usize;

/// How many network namespaces can be enrolled on a node.
pub const MAX_PODS: usize = 4096;

/// The settings of each enrolled namespace. Written by the agent; read by every
/// program, first thing: a namespace that is not in here is left alone.
#[btf_map]
pub static PODS: HashMap<NetnsCookie, PodSettings, MAX_PODS, NO_PREALLOC> = HashMap::new();

/// The pods' lists of ports. Written by the agent, before the settings that
/// name them; read by `connect` and `sk_lookup`.
#[btf_map]
pub static PORTS: HashMap<PortChunkKey, PortChunk, 65_536, NO_PREALLOC> = HashMap::new();

/// The pods' lists of address ranges. Written by the agent, before the settings
/// that name them; read by `connect`.
#[btf_map]
pub static CIDRS: LpmTrie<CidrKey, u32, 16_777_216> = LpmTrie::new();

/// What the pods' routing tables say. Written by the agent, kept current from
/// rtnetlink; read by `connect` and `sk_lookup`.
#[btf_map]
pub static ROUTES: LpmTrie<RouteKey, Route, 4_194_304> = LpmTrie::new();

/// The pods' interfaces that are excluded or virtual. Written by the agent, kept
/// current from rtnetlink; read by `connect`, `sk_lookup` and the classifiers, for
/// pods that have such.
#[btf_map]
pub static INTERFACES: HashMap<InterfaceKey, Interface, 16_384, NO_PREALLOC> = HashMap::new();

/// The proxies' listeners. Written by `sock_ops` when a proxy calls listen() and
/// by the iterator for those that did before; read by `sk_lookup`. The kernel
/// removes a socket that is closed.
#[btf_map]
pub static LISTENERS: SockHash<ListenerKey, 65_536> = SockHash::new();

/// How many slots `FLOW_SLOTS` has. As a rule a handshake over loopback is over before its
/// processor begins another, so that more than a node has processors are seldom under way; and
/// few enough stay in the processors' caches. A power of two.
pub const FLOW_SLOT_COUNT: u32 = 128;

/// Redirected connections between the first packet and the proxy's side being
/// established, each in the slot that its client gives it. Written by `sock_ops` on the
/// application's side, read and freed on the proxy's; freed when the application's socket
/// closes.
#[btf_map]
pub static FLOW_SLOTS: Array<FlowSlot, { FLOW_SLOT_COUNT as usize }> = Array::new();

/// Those of them that found another in their slot. Written, read and deleted as
/// `FLOW_SLOTS`.
#[btf_map]
pub static FLOWS: HashMap<FlowKey, Endpoint, 262_144, NO_PREALLOC> = HashMap::new();

/// Connections from virtual interfaces that no socket of the proxy knows the
/// original destination of: those under way, and those that are to be refused.
/// Written by the classifier of what arrives; read by the one of what leaves;
/// taken out by `sock_ops` when the proxy's side is established.
///
/// The other side of these is no socket here, whose end would take an entry away:
/// so the kernel drops the oldest when there is no room. That loses a SYN-ACK,
/// never a redirection, and the next SYN writes the entry again.
#[btf_map]
pub static FORWARDED: LruHashMap<FlowKey, Endpoint, 16_384> = LruHashMap::new();

/// Connections that somebody has opened to what is behind a virtual interface:
/// the answers are let through. Written and read by the classifiers. When the
/// kernel drops one because there is no room, its connection is reset.
#[btf_map]
pub static SERVED: LruHashMap<FlowKey, u32, 16_384> = LruHashMap::new();

/// Whose socket the classifier of what arrives looks for right now, on this
/// processor. Written by it; read by `sk_lookup`, which that look may run.
#[btf_map]
pub static LOOKING: PerCpuArray<Endpoint, 1> = PerCpuArray::new();

/// What the application asked for, kept with its socket. Written by `connect`, and
/// marked by `sock_ops`; read by `sock_ops`, `recvmsg` and `getpeername`.
#[btf_map]
pub static ASKED: SocketStorage<Asked, NO_PREALLOC> = SocketStorage::new();

/// That a socket is lent SO_REUSEADDR, and what it had before: 0, or it would not need it.
/// Written by `bind`; read and deleted by `connect` and by `sock_ops` at listen().
#[btf_map]
pub static REUSES: SocketStorage<i32, NO_PREALLOC> = SocketStorage::new();

/// The servers that an unconnected UDP socket asked. Written by `sendmsg`; read
/// by `recvmsg`.
#[btf_map]
pub static QUESTIONS: SocketStorage<Questions, NO_PREALLOC> = SocketStorage::new();

/// The original destination of an accepted socket of the proxy. A listener has
/// an entry with no address and its own port, which each socket accepted from
/// it inherits; `sock_ops` puts the published destination in its place, and notes there what
/// it has asked the kernel to tell of the socket. Read by `getsockopt`.
#[btf_map]
pub static ORIGINAL_DST: SocketStorage<OriginalDst, { NO_PREALLOC | CLONE }> = SocketStorage::new();

/// What was decided and what went wrong, by pod. Created by the agent; written
/// by every program.
#[btf_map]
pub static COUNTERS: PerCpuHashMap<NetnsCookie, Counters, MAX_PODS, NO_PREALLOC> =
    PerCpuHashMap::new();

/// The decision that is being logged on this processor. Written and read by the
/// programs that decide, when decisions are logged.
#[btf_map]
pub static DECIDED: PerCpuArray<Decided, 1> = PerCpuArray::new();

/// Requests to the agent. Written by `sk_lookup`.
#[btf_map]
pub static EVENTS: RingBuf<Event, 65_536> = RingBuf::new();

/// The ends of connections that may be spliced, so that two ends on this node
/// find each other. Written by `sock_ops` and read by it, by `sk_msg` and by the
/// iterator over files; deleted when the socket closes. A connection that finds no
/// room goes by TCP.
#[btf_map]
pub static ENDS: HashMap<EndKey, End, 131_072, NO_PREALLOC> = HashMap::new();

/// The sockets that are spliced: both ends of each connection that has proved to
/// be worth it, but for those in `RECEIVERS`. Written by the iterator over files; `sock_ops` takes out those of
/// applications; read by `sk_msg`, which runs for its members. A connection that
/// finds no room goes by TCP.
#[btf_map]
pub static SPLICED: SockHash<EndKey, 131_072> = SockHash::new();

/// The sockets of proxies that are only given something: the other end is the
/// application's, to which everything goes by TCP. No program runs for what they
/// send. Written by the iterator over files; read by `sk_msg`.
#[btf_map]
pub static RECEIVERS: SockHash<EndKey, 131_072> = SockHash::new();

/// What is known of a socket that may be spliced, kept with it. Written by `sock_ops`,
/// `sk_msg` and the iterator: [`Sender`] says who writes what.
#[btf_map]
pub static SENDERS: SocketStorage<Sender, NO_PREALLOC> = SocketStorage::new();

/// Not 0 when everything is to go by TCP from now on. Written by the agent before
/// it ends; read by `sk_msg`.
#[btf_map]
pub static SPLICE_STOP: Array<u32, 1> = Array::new();

/// Tells the agent that there are connections for `SPLICED`. Written by
/// `sock_ops`.
#[btf_map]
pub static SPLICE_WANTED: RingBuf<NetnsCookie, 4096> = RingBuf::new();
