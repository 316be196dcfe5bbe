//! The socket of a context.

use core::ffi::c_void;

use aya_ebpf::bindings::{BPF_TCP_ESTABLISHED, bpf_sock};
use shunt_abi::Addr;

/// A socket that a context or an iterator gave, alive while the program runs.
#[derive(Clone, Copy)]
pub struct Socket(pub(super) *mut c_void);

impl Socket {
    /// The pointer, for helpers.
    #[inline(always)]
    pub const fn as_ptr(self) -> *mut c_void {
        self.0
    }
}

/// A `struct bpf_sock`: a socket whose fields a program may read.
#[derive(Clone, Copy)]
pub struct FullSocket(pub(super) *mut bpf_sock);

impl FullSocket {
    /// The socket, for storage.
    #[inline(always)]
    pub const fn socket(self) -> Socket {
        Socket(self.0.cast())
    }

    /// Its family.
    #[inline(always)]
    pub fn family(self) -> u32 {
        read!(self.0, family)
    }

    /// Whether it has a peer: a connected UDP socket is in the state of an
    /// established TCP one.
    #[inline(always)]
    pub fn is_connected(self) -> bool {
        read!(self.0, state) == BPF_TCP_ESTABLISHED
    }

    /// Its local address; unspecified while it is not bound to one.
    #[inline(always)]
    pub fn source(self) -> Addr {
        read_addr!(self.0, src_ip4, src_ip6)
    }

    /// The index of the interface that it is bound to (`SO_BINDTODEVICE`), or 0.
    #[inline(always)]
    pub fn device(self) -> u32 {
        read!(self.0, bound_dev_if)
    }

    /// Whether it listens.
    #[inline(always)]
    pub fn is_listener(self) -> bool {
        /// `TCP_LISTEN`
        const LISTEN: u32 = 10;
        read!(self.0, state) == LISTEN
    }

    /// Its local port; 0 while it has none.
    #[inline(always)]
    pub fn source_port(self) -> u16 {
        read!(self.0, src_port) as u16
    }
}
