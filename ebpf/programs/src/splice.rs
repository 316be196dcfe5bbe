//! A message between two sockets of this node: facts gathered, the decision
//! asked for, and done.

use core::ptr;

use shunt_abi::{
    END_PROXY, End, EndKey, Fallback, LEAVING_FOR_A_WHILE, LEAVING_FOR_GOOD, NetnsCookie, Sender,
    SpliceMode, Unfinished,
};
use shunt_decide::{Message, Way, splice};

use crate::{
    counters,
    ctx::{Outgoing, Socket},
    kernel::{Address, Structure},
    maps::{ENDS, RECEIVERS, SENDERS, SPLICE_STOP, SPLICED},
    pods,
    splice_ends::{
        has_to_offer_less, has_zerocopy, is_layered, is_nonblocking, is_receiver, mode_of, offsets,
    },
};

/// A member of the map sends a message.
#[inline(always)]
pub fn message(call: Outgoing) {
    let socket = call.socket();
    let Some(sender) = SENDERS.get_mut(socket) else {
        return;
    };
    // One that was taken out of the map comes here for as long as calls of its program overlap
    // (`sk_psock_get`). What it says then would be believed when it comes back, although what it
    // sends after them does not come here: bytes would be spliced before others of TCP's that
    // came first, and nobody would take back that it wants to leave.
    if sender.member == 0 || sender.leaving != 0 {
        return;
    }
    let netns = call.netns();
    let way = match Structure::tcp_sock(socket) {
        Some(tcp) => splice(&facts(call, netns, tcp, sender)),
        None => Way::Tcp(Fallback::Failed),
    };
    let way = match way {
        Way::Splice => {
            let mut key = sender.key.peer();
            let given = if is_receiver(sender.peer.flags, sender.flags) {
                call.give(&RECEIVERS, &mut key)
            } else {
                call.give(&SPLICED, &mut key)
            };
            match given {
                Ok(()) => {
                    sender.spliced = sender.spliced.saturating_add(1);
                    sender.missed = sender.missed.saturating_sub(1);
                    counters::spliced(netns, call.size());
                    return;
                }
                Err(_) => Fallback::Failed,
            }
        }
        Way::Tcp(why) => why,
        Way::TcpForAWhile(why) => {
            sender.leaving = LEAVING_FOR_A_WHILE;
            why
        }
        Way::TcpForGood(why) => {
            sender.leaving = LEAVING_FOR_GOOD;
            why
        }
    };
    sender.spliced = 0;
    if matches!(way, Fallback::NotDrained | Fallback::ReceiverFull) {
        sender.missed = sender.missed.saturating_add(1);
    }
    counters::by_tcp(netns, way);
}

/// What is known of the message.
#[inline(always)]
fn facts(call: Outgoing, netns: NetnsCookie, own: Structure, sender: &mut Sender) -> Message {
    let at = offsets();
    let other = peer(sender);
    let peer = &sender.peer;
    let word = |offset| other.and_then(|other| other.field::<u32>(offset));
    let from_proxy = sender.flags & END_PROXY != 0;
    let queued = word(at.sock_queued).unwrap_or(u32::MAX);
    if queued == 0 {
        // The last of them has been read, too.
        sender.spliced = sender.spliced.min(1);
    }
    let spliced = sender.spliced;
    let written = own.word(at.tcp_written);
    Message {
        mode: mode(netns, other.map_or(netns, |_| peer.netns)),
        from_proxy,
        into_proxy: peer.flags & END_PROXY != 0,
        peer_known: other.is_some(),
        blocking: !from_proxy && !is_nonblocking(own, &at),
        zerocopy: has_zerocopy(own, &at),
        layered: is_layered(own, &at)
            || other.and_then(|other| other.field::<u64>(at.icsk_ulp)) != Some(0),
        spliced,
        written,
        acked: own.word(at.tcp_acked),
        // Asked for only where it matters: this is for every message.
        read: if spliced == 0 {
            word(at.tcp_copied)
        } else {
            None
        }
        .unwrap_or(!written),
        queued,
        buffer: word(at.sock_buffer).unwrap_or(0),
        offered: own.word(at.tcp_offered),
        wide_window: has_to_offer_less(own, sender, &at),
        size: call.size(),
        missed: sender.missed,
    }
}

/// Where the other end is, if it is the same that it was when it was found.
#[inline(always)]
fn peer(sender: &mut Sender) -> Option<Address> {
    if sender.peer.address == 0 {
        sender.peer = end(sender.key.peer())?.as_peer();
    }
    let address = Address::kept(sender.peer.address)?;
    let cookie = address.field::<u64>(offsets().common_cookie)?;
    (cookie == sender.peer.cookie).then_some(address)
}

/// What is known of an end; `None` also when its element was deleted meanwhile, whose
/// memory the kernel gives to another connection at once.
#[inline(always)]
fn end(key: EndKey) -> Option<End> {
    let element = ENDS.get_ptr_mut(key)?;
    // SAFETY: an element of the map, which is readable also when it has another
    // owner. It is read in this order, the word that tells the owner at last.
    let (end, starts) = unsafe {
        let end = ptr::read_volatile(element);
        (end, ptr::read_volatile(&raw const (*element).starts))
    };
    (starts == key.starts()).then_some(end)
}

/// What both pods allow, a [`SpliceMode`] code.
#[inline(always)]
fn mode(own: NetnsCookie, other: NetnsCookie) -> u32 {
    const OFF: u32 = SpliceMode::Off as u32;
    if SPLICE_STOP.get(0).is_none_or(|stop| *stop != 0) {
        return OFF;
    }
    let of = |netns| pods::settings(netns).map_or(OFF, mode_of);
    if own == other {
        of(own)
    } else {
        of(own).min(of(other))
    }
}

/// Whether bytes were spliced into the socket that it has not read yet.
#[inline(always)]
pub fn has_unread(socket: Socket) -> bool {
    psock(socket).is_some_and(has_queue)
}

/// What a member of a socket map has not finished; `None` when it has finished everything.
#[inline(always)]
pub fn unfinished(socket: Socket) -> Option<Unfinished> {
    let at = offsets();
    let psock = psock(socket)?;
    let unread = has_queue(psock);
    // The map is one.
    let under_way = psock.field::<u32>(at.psock_users)? != 1;
    (unread || under_way).then_some(Unfinished {
        cookie: Address::of(socket)?.field(at.common_cookie)?,
        unread: unread.into(),
        under_way: under_way.into(),
    })
}

/// What makes the socket a member of a map (`struct sk_psock`).
#[inline(always)]
fn psock(socket: Socket) -> Option<Address> {
    /// The bits of the pointer that say what it points to.
    const MARKS: u64 = 7;
    let pointer = Address::of(socket)?.field::<u64>(offsets().sock_user_data)?;
    Address::kept(pointer & !MARKS)
}

/// Whether something that was spliced waits there. An empty list is one whose head points to
/// itself.
#[inline(always)]
fn has_queue(psock: Address) -> bool {
    let at = offsets().psock_queue;
    let first = psock.field::<u64>(at);
    first.is_some_and(|first| first != psock.number() + u64::from(at))
}
