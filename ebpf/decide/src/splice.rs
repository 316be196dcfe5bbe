use shunt_abi::{Fallback, SpliceMode};

/// What is known when a socket that may be spliced sends a message. Nothing of
/// its own can change while it does: the kernel holds its lock.
#[derive(Clone, Copy, Debug)]
pub struct Message {
    /// A [`SpliceMode`] code: the least of what both pods allow.
    pub mode: u32,
    /// The socket is the proxy's.
    pub from_proxy: bool,
    /// The other end is the proxy's.
    pub into_proxy: bool,
    /// The other end is known, and alive.
    pub peer_known: bool,
    /// The sender's file is in blocking mode.
    pub blocking: bool,
    /// The sender has SO_ZEROCOPY.
    pub zerocopy: bool,
    /// One of the ends has a protocol on top of TCP.
    pub layered: bool,
    /// How many messages were spliced since the other end last had nothing to read; 0
    /// when the last bytes went by TCP.
    pub spliced: u32,
    /// The sequence number after the last byte that was given to TCP.
    pub written: u32,
    /// The sequence number after the last one that is acknowledged.
    pub acked: u32,
    /// The sequence number after the last byte of TCP's that the other end has
    /// read; another one than `written` when that could not be found out.
    pub read: u32,
    /// How many bytes the other end has not yet read, as the kernel counts them
    /// against its buffer.
    pub queued: u32,
    /// The other end's receive buffer, in bytes.
    pub buffer: u32,
    /// How many bytes the other end has offered to take by TCP, behind those that it has
    /// acknowledged: its window, as the sender was last told.
    pub offered: u32,
    /// The sender itself offers more to TCP than [`most_offered`], and can be told not to.
    pub wide_window: bool,
    /// The message's size in bytes.
    pub size: u32,
    /// How many more messages of this socket went by TCP because the other end was
    /// not ready than were spliced.
    pub missed: u32,
}

/// Which way a message goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// It is given to the other end directly, as a whole. The kernel would splice what is
    /// left of one that is cut as well, whatever is decided over it: in `struct sk_msg` the
    /// socket stays that the first part was redirected to (`sk_psock_msg_verdict`).
    Splice,
    /// By TCP; the next message may go the other way.
    Tcp(Fallback),
    /// By TCP, and so does everything that the socket sends for a while, in which it is
    /// in no map.
    TcpForAWhile(Fallback),
    /// By TCP, and so does everything that the socket sends from now on.
    TcpForGood(Fallback),
}

/// What the kernel takes for a spliced message that waits, beside its bytes: its `struct
/// sk_msg`, which is counted against no buffer. A socket that is sent small messages and
/// does not read would hold a hundred times its buffer. In bytes.
const OVERHEAD: u32 = 1024;

/// How often the proxy may be not ready for what its application sends. While one
/// sends more than is read it is quicker by TCP alone: what a member of the map
/// gives to TCP is copied first, and what TCP then does not take is thrown away.
const PATIENCE: u32 = 32;

/// Decides over one message.
///
/// What was spliced is always read before what came by TCP. So TCP may follow
/// what was spliced at any time; and what is spliced may follow TCP only when
/// all of that was read.
#[inline(always)]
pub const fn splice(message: &Message) -> Way {
    // The kernel would tell of each part of a message that it is sent, or of none.
    if message.zerocopy {
        return Way::TcpForGood(Fallback::Zerocopy);
    }
    if message.blocking && !message.from_proxy {
        return Way::TcpForGood(Fallback::Blocking);
    }
    // Nobody tells whether a message is urgent data (MSG_OOB), which spliced would
    // be read as any other. It is sent byte by byte, because of several only the
    // last would be urgent.
    if message.size == 1 {
        return Way::Tcp(Fallback::SingleByte);
    }
    if message.mode < least_mode(message.from_proxy) as u32 {
        return Way::Tcp(Fallback::NotWanted);
    }
    if !message.peer_known {
        return Way::Tcp(Fallback::PeerUnknown);
    }
    if !message.into_proxy && message.mode < SpliceMode::All as u32 {
        return Way::Tcp(Fallback::IntoApplication);
    }
    if message.layered {
        return Way::Tcp(Fallback::Layered);
    }
    if message.wide_window {
        return Way::Tcp(Fallback::WideWindow);
    }
    if message.spliced == 0 && !drained(message) {
        return not_ready(message, Fallback::NotDrained);
    }
    if message.size <= space(message).saturating_sub(waiting(message)) {
        Way::Splice
    } else {
        not_ready(message, Fallback::ReceiverFull)
    }
}

/// The least mode in which anything is spliced of what a socket sends: a proxy's, or an
/// application's.
#[inline(always)]
pub const fn least_mode(from_proxy: bool) -> SpliceMode {
    if from_proxy {
        SpliceMode::Between
    } else {
        SpliceMode::Proxy
    }
}

/// How much of its buffer the other end has for what is spliced, in bytes: half of it, and
/// less where TCP may fill more than the other half. What it has offered it cannot take back
/// (RFC 9293, 3.8.6); TCP drops what then finds no room, and waits a fifth of a second
/// before it sends that again.
#[inline(always)]
const fn space(message: &Message) -> u32 {
    let half = message.buffer / 2;
    let left = message.buffer.saturating_sub(taken_by_tcp(message));
    let left = if left < LAST { LAST } else { left };
    if left < half { left } else { half }
}

/// What the kernel takes when TCP brings all that was offered, in messages like this one:
/// less than 2 KiB for each beside its bytes, and as much for every 64 KiB of a larger one.
/// (More of smaller ones than of 6 KiB come in one segment.)
#[inline(always)]
const fn taken_by_tcp(message: &Message) -> u32 {
    let part = match message.size / 2048 {
        0..3 => 3,
        large @ 3..32 => large,
        _ => 32,
    };
    message.offered.saturating_add(message.offered / part)
}

/// The most that a socket may offer to TCP so that there is room for what is spliced, in
/// bytes.
///
/// Less than half would be a trap. A sender's segments are as large as half of the largest
/// window that it has seen, where the network takes them, as loopback does
/// (`tcp_bound_to_half_wnd`); into a window that is smaller than one of them it sends
/// nothing but a probe every 200 ms. No window is larger than the buffer, which the kernel
/// never makes smaller.
#[inline(always)]
pub const fn most_offered(buffer: u32) -> u32 {
    buffer / 2
}

/// Whether a socket is to be told to offer less: its buffer, its window as the other end was
/// told of it, and the most that this may become, in bytes.
///
/// Not while the window is shut: before Linux 6.6.7 it would have stayed shut
/// (`tcp_set_window_clamp`).
#[inline(always)]
pub const fn offers_too_much(buffer: u32, window: u32, clamp: u32) -> bool {
    clamp > most_offered(buffer) && window > 0
}

/// So much there is room for whatever was offered, in bytes. Before Linux 6.17 the last
/// segment that TCP brings is taken where the others have left a byte of the buffer
/// (`tcp_try_rmem_schedule`).
const LAST: u32 = 16 * 1024;

/// What waits for the other end, and what the kernel takes for it, in bytes. How many of the
/// spliced messages still wait is not known, only that it is none when no byte does.
#[inline(always)]
const fn waiting(message: &Message) -> u32 {
    if message.queued == 0 {
        return 0;
    }
    let beside = message.spliced.saturating_mul(OVERHEAD);
    message.queued.saturating_add(beside)
}

/// Which way it goes while the other end has something to read. A sender can leave
/// the map only where nothing is ever spliced into it.
#[inline(always)]
const fn not_ready(message: &Message, why: Fallback) -> Way {
    let can_leave = !message.from_proxy && message.mode < SpliceMode::All as u32;
    if can_leave && message.missed >= PATIENCE {
        Way::TcpForAWhile(why)
    } else {
        Way::Tcp(why)
    }
}

/// Whether the other end has read everything: what was given to TCP, and what
/// was spliced before that.
#[inline(always)]
const fn drained(message: &Message) -> bool {
    message.acked == message.written && message.read == message.written && message.queued == 0
}
