use crate::{Addr, NetnsCookie};

/// How many bits of [`RouteKey`] stand before the address and always have to
/// match.
pub const ROUTE_KEY_BITS: u32 = 64;

/// Key of the trie `ROUTES`, without the prefix length that the trie puts
/// before it: [`ROUTE_KEY_BITS`] plus that of the route (IPv4 counts from 96).
#[repr(C)]
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub struct RouteKey {
    /// The cookie of the network namespace that has the route, low half first:
    /// as one number it would be misaligned behind the trie's prefix length.
    pub cookie: [u32; 2],
    /// The destination, or the first of the range.
    pub addr: Addr,
}

impl RouteKey {
    /// The key of a destination in a namespace.
    #[inline(always)]
    pub const fn new(cookie: NetnsCookie, addr: Addr) -> Self {
        Self {
            cookie: [cookie as u32, (cookie >> 32) as u32],
            addr,
        }
    }
}

/// Value of the trie `ROUTES`: what the namespace's routing says of a
/// destination, as far as the rules ask.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Route {
    /// The source address that an unbound socket gets; unspecified where it is
    /// the destination itself (a route of type local without a preferred source).
    pub source: Addr,
    /// The interface it leaves through.
    pub ifindex: u32,
    /// [`ROUTE_LOCAL`] and [`ROUTE_UNREACHABLE`].
    pub flags: u32,
}

/// The destination is an address of the namespace itself ("routed to lo").
pub const ROUTE_LOCAL: u32 = 1 << 0;
/// The routing table says that nothing can be reached there.
pub const ROUTE_UNREACHABLE: u32 = 1 << 1;

/// Key of the map `INTERFACES`: a version of a pod's settings, which names some of
/// its interfaces, and one of those.
#[repr(C)]
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub struct InterfaceKey {
    /// The number of the version,
    /// [`PodSettings::list_set`](crate::PodSettings::list_set).
    pub list_set: u32,
    /// The index of the interface in the pod's namespace.
    pub ifindex: u32,
}

impl InterfaceKey {
    /// The key of an interface.
    #[inline(always)]
    pub const fn new(list_set: u32, ifindex: u32) -> Self {
        Self { list_set, ifindex }
    }
}

/// Value of the map `INTERFACES`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    /// [`INTERFACE_EXCLUDED`] and [`INTERFACE_VIRTUAL`].
    pub flags: u32,
    /// How many bytes of its packets come before the IP header
    /// ([`LINK_HEADER_UNKNOWN`] where the agent cannot tell).
    pub link_header: u32,
    /// Its first IPv4 address; unspecified where it has none.
    pub v4: Addr,
    /// Its first IPv6 address; unspecified where it has none.
    pub v6: Addr,
}

/// The packets of this interface cannot be read.
pub const LINK_HEADER_UNKNOWN: u32 = u32::MAX;

/// Bit of [`Interface::flags`]: the pod excludes it (`-c`).
pub const INTERFACE_EXCLUDED: u32 = 1 << 0;
/// Bit of [`Interface::flags`]: it leads to a virtual machine (`-k`).
pub const INTERFACE_VIRTUAL: u32 = 1 << 1;
