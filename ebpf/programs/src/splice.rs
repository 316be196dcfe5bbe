//! A message between two sockets of this node: facts gathered, the decision
//! asked for, and done.

use core::ptr;

use shunt_abi::{END_PROXY, End, EndKey, Fallback, Sender, SpliceMode};
use shunt_decide::{Message, Way, splice};

use crate::{
    counters,
    ctx::{Outgoing, Socket},
    kernel::{self, Address},
    maps::{ENDS, RECEIVERS, SENDERS, SPLICE_STOP, SPLICED},
    pods,
    splice_ends::{has_zerocopy, is_nonblocking, is_receiver, offsets},
};

/// A member of the map sends a message.
#[inline(always)]
pub fn message(call: Outgoing) {
    let socket = call.socket();
    let Some(sender) = SENDERS.get_mut(socket) else {
        return;
    };
    if sender.leaving != 0 {
        return;
    }
    let netns = call.netns();
    let facts = kernel::forget(facts(call, socket, sender));
    let way = match splice(&facts) {
        Way::Splice(bytes) => {
            let mut key = kernel::forget(sender.key.peer());
            let peer = sender.peer.flags;
            let given = if is_receiver(peer, sender.flags) {
                call.give(&RECEIVERS, &mut key, bytes)
            } else {
                call.give(&SPLICED, &mut key, bytes)
            };
            match given {
                Ok(()) => {
                    sender.spliced = 1;
                    counters::spliced(netns, bytes);
                    return;
                }
                Err(_) => Fallback::Failed,
            }
        }
        Way::Tcp(why) => why,
        Way::TcpForGood(why) => {
            sender.leaving = 1;
            why
        }
    };
    sender.spliced = 0;
    counters::by_tcp(netns, way);
}

/// What is known of the message.
#[inline(always)]
fn facts(call: Outgoing, socket: Socket, sender: &mut Sender) -> Message {
    let at = offsets();
    let peer = peer(sender);
    let other = peer.and_then(|peer| Address::kept(peer.address));
    let own = Address::of(socket);
    let word = |of: Option<Address>, offset| of.and_then(|of| of.field::<u32>(offset));
    let ulp = |of: Option<Address>| of.and_then(|of| of.field::<u64>(at.icsk_ulp));
    let from_proxy = sender.flags & END_PROXY != 0;
    let spliced = sender.spliced != 0;
    // Asked for only where it matters: this is for every message. What cannot be
    // read differs from everything else, and so is not drained.
    let (written, acked, read) = if spliced {
        (0, 1, 2)
    } else {
        (
            word(own, at.tcp_written).unwrap_or(0),
            word(own, at.tcp_acked).unwrap_or(1),
            word(other, at.tcp_copied).unwrap_or(2),
        )
    };
    Message {
        mode: mode(call, peer),
        from_proxy,
        into_proxy: peer.is_some_and(|peer| peer.flags & END_PROXY != 0),
        peer_known: peer.is_some(),
        blocking: !from_proxy && !is_nonblocking(socket),
        zerocopy: own.is_none_or(|own| has_zerocopy(own, &at)),
        layered: ulp(own) != Some(0) || ulp(other) != Some(0),
        spliced,
        written,
        acked,
        read,
        queued: word(other, at.sock_queued).unwrap_or(u32::MAX),
        buffer: word(other, at.sock_buffer).unwrap_or(0),
        size: call.size(),
    }
}

/// The other end, if it is the same that it was when it was found.
#[inline(always)]
fn peer(sender: &mut Sender) -> Option<End> {
    if sender.peer.address == 0 {
        sender.peer = end(sender.key.peer())?;
    }
    let peer = kernel::forget(sender.peer);
    let cookie = Address::kept(peer.address)?.field::<u64>(offsets().common_cookie)?;
    (cookie == peer.cookie).then_some(peer)
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
fn mode(call: Outgoing, peer: Option<End>) -> u32 {
    const OFF: u32 = SpliceMode::Off as u32;
    if SPLICE_STOP.get(0).is_none_or(|stop| *stop != 0) {
        return OFF;
    }
    let netns = call.netns();
    let own = pods::settings(netns).map_or(OFF, |pod| pod.splice);
    match peer {
        Some(peer) if peer.netns != netns => {
            let other = pods::settings(peer.netns).map_or(OFF, |pod| pod.splice);
            own.min(other)
        }
        _ => own,
    }
}

/// Whether bytes were spliced into the socket that it has not read yet.
#[inline(always)]
pub fn has_unread(socket: Socket) -> bool {
    /// The bits of the pointer that say what it points to.
    const MARKS: u64 = 7;
    let at = offsets();
    let psock = Address::of(socket)
        .and_then(|sock| sock.field::<u64>(at.sock_user_data))
        .and_then(|pointer| Address::kept(pointer & !MARKS));
    let Some(psock) = psock else {
        return false;
    };
    // An empty list is one whose head points to itself.
    psock
        .field::<u64>(at.psock_queue)
        .is_some_and(|first| first != psock.number() + u64::from(at.psock_queue))
}
