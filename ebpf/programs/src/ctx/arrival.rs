//! A packet that looks for a listener.

use aya_ebpf::bindings::bpf_sk_lookup;
use shunt_abi::Endpoint;

/// What a `sk_lookup` program sees: a packet that looks for a listener.
#[derive(Clone, Copy)]
pub struct Arrival(*mut bpf_sk_lookup);

impl Arrival {
    /// From the program's context.
    #[inline(always)]
    pub const fn new(ctx: *mut bpf_sk_lookup) -> Self {
        Self(ctx)
    }

    /// The context, for helpers.
    #[inline(always)]
    pub const fn as_ptr(self) -> *mut bpf_sk_lookup {
        self.0
    }

    /// The transport protocol.
    #[inline(always)]
    pub fn protocol(self) -> u32 {
        read!(self.0, protocol)
    }

    /// The family of the packet.
    #[inline(always)]
    pub fn family(self) -> u32 {
        read!(self.0, family)
    }

    /// Where it was sent to.
    #[inline(always)]
    pub fn local(self) -> Endpoint {
        let addr = read_addr!(self.0, local_ip4, local_ip6);
        Endpoint::new(addr, read!(self.0, local_port) as u16)
    }

    /// The index of the interface that it came in through (Linux 5.17). For a packet from
    /// inside to the pod's own address it is not that of loopback.
    #[inline(always)]
    pub fn ifindex(self) -> u32 {
        read!(self.0, ingress_ifindex)
    }

    /// Whether it goes from inside to an address of loopback, which needs no help. What comes
    /// from outside to such an address, or from inside to another, does not come in through
    /// loopback's interface.
    #[inline(always)]
    pub fn stays_at_loopback(self) -> bool {
        /// That of `lo` in every network namespace (`LOOPBACK_IFINDEX`).
        const LOOPBACK: u32 = 1;
        self.ifindex() == LOOPBACK && self.local().addr.is_loopback()
    }

    /// Where it came from.
    #[inline(always)]
    pub fn remote(self) -> Endpoint {
        let addr = read_addr!(self.0, remote_ip4, remote_ip6);
        Endpoint::new(addr, u16::from_be(read!(self.0, remote_port)))
    }
}
