//! Which sockets are spliced: those whose other end is on this node, too, and
//! that have sent something more than once, or been sent it.
//!
//! A socket in a socket map reads by other code of the kernel's than the rest,
//! which a program that reads in blocking mode can tell. So nothing is put there
//! when a connection comes to be, while nobody knows how it will be read, but
//! later, by the agent's iterator over open files, which looks at the file: only
//! non-blocking ones are spliced. Until then everything goes by TCP, and for a
//! connection of one small request and its answer nothing is ever done.

use core::ffi::c_void;

use aya_ebpf::{
    Global,
    bindings::{
        BPF_NOEXIST, BPF_SOCK_OPS_RTT_CB_FLAG, BPF_SOCK_OPS_STATE_CB_FLAG,
        BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG, BPF_TCP_CLOSE, BPF_TCP_ESTABLISHED, BPF_TCP_FIN_WAIT1,
        BPF_TCP_LAST_ACK, BPF_TCP_SYN_RECV,
    },
    helpers::generated::{bpf_map_delete_elem, bpf_map_update_elem},
};
use shunt_abi::{
    END_PASSIVE, END_PROXY, End, EndKey, Fallback, LEAVING_FOR_A_WHILE, LEAVING_FOR_GOOD,
    NetnsCookie, ORIGINAL_DST_KNOWN, ORIGINAL_DST_WATCHED, PodSettings, Sender, SpliceMode,
    SpliceOffsets,
};
use shunt_decide::{least_mode, most_offered, offers_too_much};

use crate::{
    counters,
    ctx::{FileVisit, Socket, TcpEvent},
    kernel::{self, Address, Structure},
    maps::{ENDS, ORIGINAL_DST, RECEIVERS, SENDERS, SPLICE_WANTED, SPLICED},
    pods,
    splice::has_unread,
};

/// Where the running kernel keeps what is read here. Set by the agent when it
/// loads the programs.
#[unsafe(no_mangle)]
static SPLICE_OFFSETS: Global<SpliceOffsets> = Global::new(SpliceOffsets {
    sock_socket: 0,
    socket_file: 0,
    socket_sock: 0,
    file_flags: 0,
    common_cookie: 0,
    sock_queued: 0,
    sock_buffer: 0,
    sock_flags: 0,
    sock_user_data: 0,
    icsk_ulp: 0,
    tcp_copied: 0,
    tcp_written: 0,
    tcp_acked: 0,
    tcp_offered: 0,
    tcp_window: 0,
    tcp_clamp: 0,
    psock_queue: 0,
    psock_users: 0,
    zerocopy_bit: 0,
});

/// The node's [`SpliceMode`]. Set by the agent when it loads the programs: with 0
/// all of this is left out of them.
#[unsafe(no_mangle)]
static SPLICE_MODE: Global<u32> = Global::new(0);

/// How often the other end of a socket is looked for, once for each
/// acknowledgement, before it counts as not on this node.
const PATIENCE: u32 = 64;

/// How many segments with data a socket has to have sent before it may be worth splicing, or
/// received.
const FEW: u32 = 2;

/// What has the kernel say that a socket is about to send a segment, an acknowledgement alone
/// too: it asks whether a program wants room for an option in its header (Linux 5.10).
const SENDS: u32 = BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG;

/// How long a sender is out of the map that sends more than is read, in
/// milliseconds.
const AWHILE: u32 = 1000;

/// `-EOPNOTSUPP`: a half of the connection is closed, and so it is not put into a map
/// (`sock_map_sk_state_allowed`).
const NOT_ESTABLISHED: i64 = -95;

/// `-EBUSY`: a map with a program has the socket, or has had it and a call of its program is
/// still under way (`sock_map_link`).
const BUSY: i64 = -16;

/// `O_NONBLOCK`
const NONBLOCK: u32 = 0o4000;

/// Where the running kernel keeps what splicing looks at.
#[inline(always)]
pub fn offsets() -> SpliceOffsets {
    SPLICE_OFFSETS.load()
}

/// Whether anything is spliced on this node.
#[inline(always)]
pub fn is_on() -> bool {
    SPLICE_MODE.load() != SpliceMode::Off as u32
}

/// Whether bytes are spliced into sockets of applications on this node.
#[inline(always)]
fn applications_receive() -> bool {
    SPLICE_MODE.load() == SpliceMode::All as u32
}

/// How far a pod goes, a [`SpliceMode`] code. What one has that was kept from a former agent may
/// be above what the node does now.
#[inline(always)]
pub fn mode_of(pod: &PodSettings) -> u32 {
    pod.splice.min(SPLICE_MODE.load())
}

/// Whether a socket that is connected may be spliced, by its addresses and the node's mode,
/// which no pod's is above.
#[inline(always)]
pub fn may_concern(event: TcpEvent) -> bool {
    may_be_in(SPLICE_MODE.load(), event)
}

/// Whether a socket that is connected may be spliced in this mode.
#[inline(always)]
fn may_be_in(mode: u32, event: TcpEvent) -> bool {
    mode != SpliceMode::Off as u32 && (mode >= SpliceMode::Proxy as u32 || !is_within_pod(event))
}

/// A socket of an enrolled namespace is connected, by its own call (`active`) or
/// by accepting, on a node where something is spliced.
#[inline(always)]
pub fn established(
    event: TcpEvent,
    socket: Socket,
    netns: NetnsCookie,
    settings: &PodSettings,
    active: bool,
) {
    let mode = mode_of(settings);
    if !may_be_in(mode, event) {
        return;
    }
    let applications_too = mode >= SpliceMode::Proxy as u32;
    if active {
        if applications_too || is_proxys(socket, settings) {
            // More of it is remembered when it has sent more than one request.
            event.watch(BPF_SOCK_OPS_RTT_CB_FLAG);
        }
    } else if let Some(kept) = ORIGINAL_DST.get_mut(socket) {
        if event.is_watched(SENDS) {
            // By others. What they asked for is not taken from them.
            remember_proxys(event, socket, netns);
        } else {
            // It may never send anything, and so hear of no acknowledgement; but it
            // acknowledges.
            kept.flags = ORIGINAL_DST_WATCHED;
            event.watch(SENDS);
        }
    } else if applications_too {
        remember(event, socket, netns, END_PASSIVE);
    }
}

/// A socket is about to send a segment: perhaps one that a proxy has accepted, which is
/// remembered when there was more than a request and its answer.
#[inline(always)]
pub fn sends(event: TcpEvent, socket: Socket) {
    let Some(kept) = ORIGINAL_DST.get_mut(socket) else {
        return;
    };
    let state = event.state();
    // Before it is established there may be an answer already (TCP Fast Open).
    if kept.flags == 0 || !event.is_segment() || state == BPF_TCP_SYN_RECV {
        return;
    }
    if kept.flags & ORIGINAL_DST_KNOWN != 0 {
        // Nobody has put an option into the segment before this one.
        kept.flags = 0;
        event.unwatch(SENDS);
    } else if state != BPF_TCP_ESTABLISHED
        || event.data_segments() >= FEW
        || event.data_segments_received() >= FEW
    {
        kept.flags |= ORIGINAL_DST_KNOWN;
        remember_if_spliced(event, socket);
    }
}

/// A segment that a socket sends has an option of another program, which has asked for that
/// after this one: it goes on to be asked.
#[inline(always)]
pub fn has_options(event: TcpEvent, socket: Socket) {
    let Some(kept) = ORIGINAL_DST.get_mut(socket) else {
        return;
    };
    let flags = kept.flags;
    if flags == 0 || event.state() == BPF_TCP_SYN_RECV {
        return;
    }
    kept.flags = 0;
    if flags == ORIGINAL_DST_WATCHED {
        remember_if_spliced(event, socket);
    }
}

/// Remembers a socket that a proxy has accepted, unless the settings are others by now, or it is
/// half closed: no map takes it then. One that sends a reset is closed already, and nobody would
/// forget it any more.
#[inline(always)]
fn remember_if_spliced(event: TcpEvent, socket: Socket) {
    let netns = event.netns();
    let mode = pods::settings(netns).map_or(SpliceMode::Off as u32, mode_of);
    if event.state() == BPF_TCP_ESTABLISHED && may_be_in(mode, event) {
        remember_proxys(event, socket, netns);
    }
}

/// Remembers a socket that a proxy has accepted, and lets the other end find it.
#[inline(always)]
fn remember_proxys(event: TcpEvent, socket: Socket, netns: NetnsCookie) {
    if let Some(sender) = remember(event, socket, netns, END_PASSIVE | END_PROXY) {
        publish(event, socket, netns, sender);
    }
}

/// Remembers a socket that may be spliced, and watches what becomes of it.
#[inline(always)]
fn remember<'a>(
    event: TcpEvent,
    socket: Socket,
    netns: NetnsCookie,
    flags: u32,
) -> Option<&'a mut Sender> {
    let Some(sender) = SENDERS.get_or_zeros(socket) else {
        counters::by_tcp(netns, Fallback::NoRoom);
        event.unwatch(BPF_SOCK_OPS_RTT_CB_FLAG);
        return None;
    };
    // Nobody looks at it before: its socket is in no map, and unknown in `ENDS`.
    sender.flags = flags;
    event.watch(BPF_SOCK_OPS_RTT_CB_FLAG | BPF_SOCK_OPS_STATE_CB_FLAG);
    Some(sender)
}

/// Remembers one that has connected, when something that it sent is acknowledged: those
/// that were accepted are known already, or [`sends`] sees to them. The first request and its
/// answer are over before splicing would be of use.
#[inline(always)]
fn remember_active<'a>(event: TcpEvent, socket: Socket) -> Option<&'a mut Sender> {
    if event.data_segments() < FEW || ORIGINAL_DST.get(socket).is_some() {
        return None;
    }
    let netns = event.netns();
    // Of one that may not, as a rule others have asked to hear: in the mesh and outside.
    let flags = may_be_spliced(socket, pods::settings(netns)?)?;
    remember(event, socket, netns, flags)
}

/// The flags of one that has connected, if it may still be spliced: the settings may be
/// others by now. (One that a former agent has known does not find its other end.)
#[inline(always)]
fn may_be_spliced(socket: Socket, settings: &PodSettings) -> Option<u32> {
    let proxy = is_proxys(socket, settings);
    (mode_of(settings) >= least_mode(proxy) as u32).then_some(if proxy { END_PROXY } else { 0 })
}

/// Whether both ends are in one pod, as far as their addresses say: the other one is the
/// application's, or of the same proxy. (From `::6`, where Istio's proxies call from, it is
/// not recognised. Then more is remembered, and nothing else is done.)
#[inline(always)]
fn is_within_pod(event: TcpEvent) -> bool {
    let (local, remote) = (event.local().addr, event.remote().addr);
    local.is_loopback() || remote.is_loopback() || local.same(&remote)
}

/// Whether a proxy owns the socket, as the rules have it.
#[inline(always)]
fn is_proxys(socket: Socket, settings: &PodSettings) -> bool {
    kernel::owner(socket).is_some_and(|(uid, gid)| shunt_decide::is_proxy(settings, uid, gid))
}

/// Something that it sent was acknowledged.
#[inline(always)]
pub fn acknowledged(event: TcpEvent, socket: Socket) {
    // The acknowledgement of a SYN comes here, too.
    if !is_on() || event.data_segments() == 0 {
        return;
    }
    let known = SENDERS.get_mut(socket);
    let Some(sender) = known.or_else(|| remember_active(event, socket)) else {
        return;
    };
    if sender.member != 0 {
        stay_or_leave(event, socket, sender);
        return;
    }
    if sender.looks >= PATIENCE || sender.leaving != 0 {
        if !may_join(sender) {
            event.unwatch(BPF_SOCK_OPS_RTT_CB_FLAG);
        }
        return;
    }
    if is_away(sender) {
        return;
    }
    let at = offsets();
    let nonblocking = Structure::tcp_sock(socket).is_some_and(|tcp| is_nonblocking(tcp, &at));
    if event.data_segments() < FEW || !nonblocking {
        sender.looks += 1;
        return;
    }
    let netns = event.netns();
    if sender.known == 0 {
        publish(event, socket, netns, sender);
    }
    let look = sender.looks;
    sender.looks += 1;
    // The agent is told again where it was too slow, or missed it.
    if (look.is_power_of_two() || look == 0) && ask_for(netns, sender) {
        keep_room(event, socket, sender);
    }
}

/// Has a socket into which bytes may be spliced offer no more to TCP than leaves room for
/// them. TCP makes that more again when it makes the buffer larger, so this is looked at for
/// as long as it sends anything by TCP.
#[inline(always)]
fn keep_room(event: TcpEvent, socket: Socket, sender: &Sender) {
    let at = offsets();
    if let Some(tcp) = Structure::tcp_sock(socket)
        && has_wide_window(tcp, sender.flags, &at)
    {
        event.offer_at_most(most_offered(tcp.word(at.sock_buffer)));
    }
}

/// Whether the socket has to send by TCP, so that it can be told to offer less: it surely
/// still hears of the acknowledgement then.
#[inline(always)]
pub fn has_to_offer_less(tcp: Structure, sender: &Sender, at: &SpliceOffsets) -> bool {
    sender.looks < PATIENCE && has_wide_window(tcp, sender.flags, at)
}

/// Whether bytes may be spliced into a socket with these flags, and it offers more to TCP
/// than leaves room for them.
#[inline(always)]
fn has_wide_window(tcp: Structure, flags: u32, at: &SpliceOffsets) -> bool {
    (flags & END_PROXY != 0 || applications_receive())
        && offers_too_much(
            tcp.word(at.sock_buffer),
            tcp.word(at.tcp_window),
            tcp.word(at.tcp_clamp),
        )
}

/// Whether the agent was told of a socket: it may put it into the map yet, and it then has to
/// hear of acknowledgements, to be taken out again or to keep room.
#[inline(always)]
fn may_join(sender: &Sender) -> bool {
    if sender.known == 0 || sender.leaving != 0 {
        return false;
    }
    // SAFETY: an element of the map, of which this word is only set.
    unsafe { ENDS.get(&sender.key) }.is_some_and(|end| end.wanted != 0)
}

/// A socket that is spliced heard of an acknowledgement: something of it went by
/// TCP.
#[inline(always)]
fn stay_or_leave(event: TcpEvent, socket: Socket, sender: &mut Sender) {
    if sender.flags & END_PROXY != 0 {
        // It stays to its end: what was given to it would be lost with its place.
        keep_room(event, socket, sender);
    } else if sender.leaving != 0 && !has_unread(socket) {
        // In the mode `all` it may have been given something, too.
        take_out(sender);
        if sender.leaving == LEAVING_FOR_A_WHILE {
            stay_away(sender);
            sender.missed = 0;
            sender.leaving = 0;
        } else {
            event.unwatch(BPF_SOCK_OPS_RTT_CB_FLAG);
        }
    }
}

/// Whether it has left the map and may not come back yet.
#[inline(always)]
fn is_away(sender: &Sender) -> bool {
    sender.back != 0 && sender.back.wrapping_sub(kernel::now_ms()).cast_signed() > 0
}

/// Has it come back later, and look for its peer anew.
#[inline(always)]
fn stay_away(sender: &mut Sender) {
    sender.back = kernel::now_ms().wrapping_add(AWHILE).max(1);
    sender.looks = 0;
}

/// Lets the other end find this one.
#[inline(always)]
fn publish(event: TcpEvent, socket: Socket, netns: NetnsCookie, sender: &mut Sender) {
    let Some(address) = Address::of(socket) else {
        return;
    };
    let active = sender.flags & END_PASSIVE == 0;
    let (own, remote) = event.first_bytes(active);
    sender.key = EndKey::new(netns, &event.local(), &event.remote(), own, remote);
    let end = End {
        starts: sender.key.starts(),
        address: address.number(),
        cookie: event.cookie(),
        netns,
        flags: sender.flags,
        wanted: 0,
    };
    if ENDS.insert(&sender.key, &end, 0).is_ok() {
        sender.known = 1;
    } else {
        counters::by_tcp(netns, Fallback::NoRoom);
    }
}

/// Has the agent put both ends into the map, when the other one is here. Whether it is.
#[inline(always)]
fn ask_for(netns: NetnsCookie, sender: &Sender) -> bool {
    let (Some(own), Some(peer)) = (
        ENDS.get_ptr_mut(&sender.key),
        ENDS.get_ptr_mut(sender.key.peer()),
    ) else {
        return false;
    };
    // SAFETY: elements of the map; the field is set and never cleared.
    unsafe {
        if ((*own).flags | (*peer).flags) & END_PROXY == 0 {
            return false;
        }
        (*own).wanted = 1;
        (*peer).wanted = 1;
    }
    // When the ring is full the agent has been told often enough.
    let _ = SPLICE_WANTED.output(netns, 0);
    true
}

/// The state of a socket is about to change.
#[inline(always)]
pub fn changes(event: TcpEvent, socket: Socket) {
    let state = event.new_state();
    let at_end = state == BPF_TCP_FIN_WAIT1 || state == BPF_TCP_LAST_ACK || state == BPF_TCP_CLOSE;
    if !is_on() || !at_end {
        return;
    }
    let Some(sender) = SENDERS.get_mut(socket) else {
        return;
    };
    if leaves_at_end(sender) {
        // The iterator may be about to put it there.
        sender.leaving = LEAVING_FOR_GOOD;
        if sender.member != 0 {
            take_out(sender);
        }
    }
    if state == BPF_TCP_CLOSE {
        if sender.known != 0 {
            let _ = ENDS.remove(&sender.key);
        }
        SENDERS.remove(socket);
    }
}

/// Whether the socket leaves the map when it has sent its last: its program may read in any
/// way then. Nothing was put into its queue, so that nothing is lost; of those into whose
/// queue something may have been put, the kernel lets go when they are closed.
#[inline(always)]
fn leaves_at_end(sender: &Sender) -> bool {
    sender.flags & END_PROXY == 0 && !applications_receive()
}

/// Takes the socket out of the map. The key is given where it lies, and not copied: nobody
/// changes it once it is known.
#[inline(always)]
fn take_out(sender: &mut Sender) {
    let key = core::ptr::from_mut(&mut sender.key).cast();
    // SAFETY: a socket map, and a key of it; `sock_ops` may do this.
    let _ = unsafe { bpf_map_delete_elem(map_of(&SPLICED), key) };
    sender.member = 0;
}

/// Whether the socket's file is in non-blocking mode. `false` when it has no
/// file, as before accept().
#[inline(always)]
pub fn is_nonblocking(tcp: Structure, at: &SpliceOffsets) -> bool {
    tcp.follow(at.sock_socket)
        .and_then(|socket| socket.follow(at.socket_file))
        .is_some_and(|file| file.word(at.file_flags) & NONBLOCK != 0)
}

/// The agent's iterator has come to an open file.
#[inline(always)]
pub fn visited(visit: FileVisit) {
    let at = offsets();
    let Some(socket) = visit.socket(at.socket_sock) else {
        return;
    };
    let Some(sender) = SENDERS.get_mut(socket) else {
        return;
    };
    if sender.member != 0 || sender.known == 0 || sender.leaving != 0 || is_away(sender) {
        return;
    }
    let (Some(tcp), Some(address)) = (Structure::tcp_sock(socket), Address::of(socket)) else {
        return;
    };
    let Some(end) = ENDS.get_ptr_mut(&sender.key) else {
        return;
    };
    // SAFETY: an element of the map, of which this word is only set.
    let wanted = unsafe { (*end).wanted } != 0;
    let is_plain = !is_layered(tcp, &at) && !has_zerocopy(tcp, &at);
    if !wanted || !is_nonblocking(tcp, &at) || !is_plain {
        return;
    }
    // SAFETY: as above. The same that is there, but for connections that the agent
    // itself made to try things out.
    unsafe { (*end).address = address.number() };
    // SAFETY: as above.
    let peer = unsafe { ENDS.get(sender.key.peer()) };
    let receives = is_receiver(sender.flags, peer.map_or(0, |peer| peer.flags));
    // What it has sent since it was last a member went by TCP. So does what it sends until it is
    // one again, and this has no other writer.
    sender.spliced = 0;
    let done = if receives {
        put(map_of(&RECEIVERS), sender, socket)
    } else {
        put(map_of(&SPLICED), sender, socket)
    };
    match done {
        0 => {
            sender.member = 1;
            // It may have sent its last meanwhile.
            if sender.leaving != 0 && leaves_at_end(sender) {
                take_out(sender);
            }
        }
        // The kernel has not let go of it yet.
        BUSY if sender.back != 0 => stay_away(sender),
        NOT_ESTABLISHED => {}
        // SAFETY: as above; this word never changes.
        _ => counters::by_tcp(unsafe { (*end).netns }, Fallback::NoRoom),
    }
}

/// Adds a socket to a map, by its key where it lies.
#[inline(always)]
fn put(map: *mut c_void, sender: &mut Sender, socket: Socket) -> i64 {
    let key = core::ptr::from_mut(&mut sender.key).cast();
    // SAFETY: a key of this map; the iterator holds the file, and the value of a
    // socket map is the socket itself.
    unsafe { bpf_map_update_elem(map, key, socket.as_ptr(), u64::from(BPF_NOEXIST)) }
}

/// Whether a socket with these flags is only given something by one with those.
#[inline(always)]
pub fn is_receiver(flags: u32, sender: u32) -> bool {
    flags & END_PROXY != 0 && sender & END_PROXY == 0 && !applications_receive()
}

/// Whether a protocol is on top of TCP.
#[inline(always)]
pub fn is_layered(tcp: Structure, at: &SpliceOffsets) -> bool {
    tcp.long(at.icsk_ulp) != 0
}

/// Whether the socket has SO_ZEROCOPY, without which MSG_ZEROCOPY means nothing.
#[inline(always)]
pub fn has_zerocopy(tcp: Structure, at: &SpliceOffsets) -> bool {
    tcp.long(at.sock_flags) >> (at.zerocopy_bit & 63) & 1 != 0
}

/// A map of sockets, for helpers.
#[inline(always)]
pub fn map_of<T>(map: &'static T) -> *mut c_void {
    core::ptr::from_ref(map).cast_mut().cast()
}
