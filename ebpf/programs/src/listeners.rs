//! The proxies' listening sockets, from which `sk_lookup` assigns.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::BPF_NOEXIST,
    helpers::generated::{bpf_map_update_elem, bpf_sock_hash_update},
};
use shunt_abi::{
    Endpoint, ErrorCode, LISTENER_SLOTS, ListenerKey, ListenerKind, NetnsCookie, OriginalDst,
};

use crate::{
    counters,
    ctx::{AF_INET, FileVisit, Socket, TcpEvent},
    kernel,
    maps::{LISTENERS, ORIGINAL_DST},
    pods,
};

/// A socket has called listen().
#[inline(always)]
pub fn opened(event: TcpEvent, socket: Socket) {
    let listener = Listener {
        netns: event.netns(),
        local: event.local(),
        family: event.family(),
    };
    listener.remember(socket, |key| {
        // SAFETY: the context of this run, and a key of this map.
        unsafe {
            bpf_sock_hash_update(
                event.as_ptr(),
                map(),
                core::ptr::from_mut(key).cast(),
                u64::from(BPF_NOEXIST),
            )
        }
    });
}

/// An iterator has come to an open file: perhaps a listener that called listen()
/// before its namespace was enrolled, or that found no free slot then.
///
/// The kernel's iterator over TCP sockets would find those without a file as well, but
/// it counts one use too few of a connection that begins while it passes, and memory
/// is used that was freed (CVE-2026-74714; see docs/datapath.md). It waits for the lock of
/// each socket, too.
#[inline(always)]
pub fn visited(visit: FileVisit) {
    let Some(socket) = visit.socket(kernel::offsets().socket_sock) else {
        return;
    };
    let Some(found) = kernel::listening(socket) else {
        return;
    };
    let listener = Listener {
        netns: found.netns,
        local: found.local,
        family: found.family,
    };
    let add = |key: &mut ListenerKey| {
        // SAFETY: a key of this map; the iterator holds the file, and the
        // value of a socket map is the socket itself.
        unsafe {
            bpf_map_update_elem(
                map(),
                core::ptr::from_mut(key).cast(),
                socket.as_ptr(),
                u64::from(BPF_NOEXIST),
            )
        }
    };
    if ORIGINAL_DST.get(socket).is_none() {
        listener.remember(socket, add);
    } else {
        listener.move_up(add);
    }
}

/// A socket that listens.
struct Listener {
    netns: NetnsCookie,
    local: Endpoint,
    family: u32,
}

impl Listener {
    /// What comes from outside the pod never reaches a listener on loopback.
    #[inline(always)]
    const fn kind(&self) -> ListenerKind {
        match (self.family == AF_INET, self.local.addr.is_loopback()) {
            (true, false) => ListenerKind::V4,
            (false, false) => ListenerKind::V6,
            (true, true) => ListenerKind::Loopback4,
            (false, true) => ListenerKind::Loopback6,
        }
    }

    /// The key under which it stands in a slot.
    #[inline(always)]
    const fn key(&self, slot: u8) -> ListenerKey {
        ListenerKey::new(self.netns, self.local.port, self.kind(), slot)
    }

    #[inline(always)]
    fn is_proxys(&self) -> bool {
        pods::settings(self.netns).is_some_and(|settings| settings.is_proxy_port(self.local.port))
    }

    /// Has a listener that is known take the first slot, if that is empty, whether
    /// it is in another or in none: `sk_lookup` finds it there at once, and asks
    /// for no more.
    #[inline(always)]
    fn move_up(&self, add: impl Fn(&mut ListenerKey) -> i64) {
        if self.is_proxys() {
            let _ = add(&mut self.key(0));
        }
    }

    /// Marks the listener, so that the sockets accepted from it know whose they
    /// are, and adds it where `sk_lookup` finds it. One that finds no place keeps
    /// its mark: it gets connections all the same, as one of a group, of which
    /// another has a place.
    #[inline(always)]
    fn remember(&self, socket: Socket, add: impl Fn(&mut ListenerKey) -> i64) {
        let (netns, port) = (self.netns, self.local.port);
        if !self.is_proxys() {
            return;
        }
        if ORIGINAL_DST
            .set(socket, &OriginalDst::listener(port))
            .is_err()
        {
            counters::failed(netns, ErrorCode::ListenerFailed);
            return;
        }
        into_free_slot(self, add);
    }
}

/// Adds a listener under the first key that no other has, if there is one.
#[inline(always)]
fn into_free_slot(listener: &Listener, add: impl Fn(&mut ListenerKey) -> i64) {
    for slot in 0..LISTENER_SLOTS {
        match add(&mut listener.key(slot)) as i32 {
            0 => return,
            TAKEN => {}
            _ => return counters::failed(listener.netns, ErrorCode::ListenerFailed),
        }
    }
}

/// `-EEXIST`, as an `int`: before Linux 6.4 `bpf_map_update_elem` is a call of the map's own
/// function, which returns one, and nobody extends its sign.
const TAKEN: i32 = -17;

#[inline(always)]
fn map() -> *mut c_void {
    core::ptr::from_ref(&LISTENERS).cast_mut().cast()
}
