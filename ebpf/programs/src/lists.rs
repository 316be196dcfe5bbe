//! The pods' lists, looked up where the agent put them.

use core::ptr;

use aya_ebpf::btf_maps::lpm_trie::Key;
use shunt_abi::{
    Addr, CidrKey, CidrList, Interface, InterfaceKey, LIST_KEY_BITS, NetnsCookie, PodSettings,
    PortChunkKey, PortList, ROUTE_KEY_BITS, Route, RouteKey, flags,
};
use shunt_decide::Lists;

use crate::maps::{CIDRS, INTERFACES, PORTS, ROUTES};

/// The lists of one version of one pod's settings.
pub struct PodLists {
    /// [`PodSettings::list_set`](shunt_abi::PodSettings::list_set)
    pub list_set: u32,
}

impl Lists for PodLists {
    #[inline(always)]
    fn port(&self, list: PortList, port: u16) -> bool {
        let key = PortChunkKey::of(self.list_set, list, port);
        // SAFETY: the agent replaces lists only under a new number, so nobody
        // writes what is read here.
        unsafe { PORTS.get(key) }.is_some_and(|chunk| chunk.contains(port))
    }

    #[inline(always)]
    fn cidr(&self, list: CidrList, addr: &Addr) -> bool {
        let key = TrieKey {
            bits: LIST_KEY_BITS + 128,
            data: CidrKey {
                list_set: self.list_set,
                list: list as u32,
                addr: *addr,
            },
        };
        CIDRS.get(key.as_key()).is_some()
    }
}

/// What the routing table of a namespace says of a destination.
#[inline(always)]
pub fn route<'a>(netns: NetnsCookie, to: &Addr) -> Option<&'a Route> {
    let key = TrieKey {
        bits: ROUTE_KEY_BITS + 128,
        data: RouteKey::new(netns, *to),
    };
    ROUTES.get(key.as_key())
}

/// What the pod's settings say of an interface, as `INTERFACE_…` bits.
#[inline(always)]
pub fn interface(settings: &PodSettings, ifindex: u32) -> u32 {
    if !settings.has(flags::INTERFACES) {
        return 0;
    }
    marked_interface(settings, ifindex).map_or(0, |interface| interface.flags)
}

/// An interface that the pod's settings speak of.
#[inline(always)]
pub fn marked_interface<'a>(settings: &PodSettings, ifindex: u32) -> Option<&'a Interface> {
    let key = InterfaceKey::new(settings.list_set, ifindex);
    // SAFETY: the agent replaces an element as a whole, by another one, and gives
    // the old one to nobody else while a program runs that may have looked it up.
    unsafe { INTERFACES.get(key) }
}

/// aya's key of a trie, aligned: as a packed structure it would be put together
/// byte by byte.
#[repr(C)]
struct TrieKey<K> {
    bits: u32,
    data: K,
}

impl<K> TrieKey<K> {
    #[inline(always)]
    fn as_key(&self) -> &Key<K> {
        const { assert!(align_of::<K>() <= 4 && size_of::<Self>() == size_of::<Key<K>>()) };
        // SAFETY: without padding the two have the same layout, and a packed
        // structure may stand anywhere.
        unsafe { &*ptr::from_ref(self).cast() }
    }
}
