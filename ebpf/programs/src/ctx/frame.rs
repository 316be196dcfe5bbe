//! A packet on an interface, and what may be changed in it.

use core::mem::MaybeUninit;

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_CURRENT_NETNS, BPF_F_PSEUDO_HDR, bpf_sock, bpf_sock_tuple},
    helpers::generated::{
        bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_sk_fullsock, bpf_sk_release,
        bpf_skb_load_bytes, bpf_skb_store_bytes, bpf_skc_lookup_tcp,
    },
};
use shunt_abi::Endpoint;

use super::{FullSocket, HelperFailed, Socket};

/// What a classifier sees: a packet of an interface.
#[derive(Clone, Copy)]
pub struct Frame(*mut __sk_buff);

/// A checksum that is to be kept right while a field is replaced, by where it is.
#[derive(Clone, Copy)]
pub enum Checksum {
    /// That of an IPv4 header.
    Header(u32),
    /// That of TCP, for a field of the TCP header.
    Tcp(u32),
    /// That of TCP, for an address, which counts as the pseudo header.
    TcpAddress(u32),
}

impl Frame {
    /// From the program's context.
    #[inline(always)]
    pub const fn new(ctx: *mut __sk_buff) -> Self {
        Self(ctx)
    }

    /// The index of the interface that it comes in or goes out through.
    #[inline(always)]
    pub fn ifindex(self) -> u32 {
        read!(self.0, ifindex)
    }

    /// Its `ETH_P_…` code.
    #[inline(always)]
    pub fn protocol(self) -> u16 {
        u16::from_be(read!(self.0, protocol) as u16)
    }

    /// Whether it is one of a VLAN, that is: of another interface.
    #[inline(always)]
    pub fn is_tagged(self) -> bool {
        read!(self.0, vlan_present) != 0
    }

    /// Whether a socket of this host has sent it.
    #[inline(always)]
    pub fn has_sender(self) -> bool {
        let sk: *mut bpf_sock = read!(self.0, __bindgen_anon_2.sk);
        !sk.is_null()
    }

    /// The socket that has sent it, when that is a full socket.
    #[inline(always)]
    pub fn sender(self) -> Option<Socket> {
        let sk: *mut bpf_sock = read!(self.0, __bindgen_anon_2.sk);
        if sk.is_null() {
            return None;
        }
        // SAFETY: a socket of this context.
        let full = unsafe { bpf_sk_fullsock(sk) };
        (!full.is_null()).then(|| Socket(full.cast()))
    }

    /// The bytes at `offset`; `None` when there are not that many.
    #[inline(always)]
    pub fn load<T: Copy>(self, offset: u32) -> Option<T> {
        let mut value = MaybeUninit::<T>::uninit();
        let len = size_of::<T>() as u32;
        // SAFETY: the context of this run, and room for that many bytes.
        let done =
            unsafe { bpf_skb_load_bytes(self.0.cast(), offset, value.as_mut_ptr().cast(), len) };
        // SAFETY: the helper has written all of it; any bits are a T, which is
        // made of integers here.
        (done == 0).then(|| unsafe { value.assume_init() })
    }

    /// Replaces a word at `offset` and brings the checksum up to date. Both
    /// words in network byte order.
    ///
    /// Fails when there is no memory for a copy of a shared packet.
    #[inline(always)]
    pub fn replace<T: Copy + Into<u64>>(
        self,
        offset: u32,
        old: T,
        new: T,
        checksum: Checksum,
    ) -> Result<(), HelperFailed> {
        self.correct(checksum, old, new)?;
        let len = size_of::<T>() as u32;
        // SAFETY: the context of this run, and a value of that many bytes.
        let done = unsafe {
            bpf_skb_store_bytes(self.0, offset, core::ptr::from_ref(&new).cast(), len, 0)
        };
        if done == 0 { Ok(()) } else { Err(HelperFailed) }
    }

    /// Brings a checksum up to date for a word that is replaced. The helpers
    /// know the checksums that are left to the network card.
    #[inline(always)]
    pub fn correct<T: Copy + Into<u64>>(
        self,
        checksum: Checksum,
        old: T,
        new: T,
    ) -> Result<(), HelperFailed> {
        let (old, new, len) = (old.into(), new.into(), size_of::<T>() as u64);
        let done = match checksum {
            // SAFETY: the context of this run.
            Checksum::Header(at) => unsafe { bpf_l3_csum_replace(self.0, at, old, new, len) },
            // SAFETY: as above.
            Checksum::Tcp(at) => unsafe { bpf_l4_csum_replace(self.0, at, old, new, len) },
            Checksum::TcpAddress(at) => {
                let flags = len | u64::from(BPF_F_PSEUDO_HDR);
                // SAFETY: as above.
                unsafe { bpf_l4_csum_replace(self.0, at, old, new, flags) }
            }
        };
        if done == 0 { Ok(()) } else { Err(HelperFailed) }
    }

    /// Lets `look` see the socket that a packet of this four-tuple is for: one
    /// of a connection, or else a listener. Of one that is not full yet, or not
    /// any more, only the state is to be read.
    #[inline(always)]
    pub fn receiver<R>(
        self,
        client: &Endpoint,
        server: &Endpoint,
        look: impl FnOnce(FullSocket) -> R,
    ) -> Option<R> {
        let (source_port, port) = (client.port.to_be(), server.port.to_be());
        let socket = if client.addr.is_v4() {
            self.lookup(Tuple {
                source: client.addr.v4(),
                destination: server.addr.v4(),
                source_port,
                port,
            })
        } else {
            self.lookup(Tuple {
                source: client.addr.words,
                destination: server.addr.words,
                source_port,
                port,
            })
        };
        if socket.is_null() {
            return None;
        }
        let seen = look(FullSocket(socket));
        // SAFETY: the socket of the lookup above, given back once.
        let _ = unsafe { bpf_sk_release(socket.cast()) };
        Some(seen)
    }

    #[inline(always)]
    fn lookup<A>(self, mut tuple: Tuple<A>) -> *mut bpf_sock {
        let len = size_of::<Tuple<A>>() as u32;
        let tuple = core::ptr::from_mut(&mut tuple).cast::<bpf_sock_tuple>();
        let here = BPF_F_CURRENT_NETNS as u64;
        // SAFETY: the context of this run, and a tuple of that many bytes, which
        // is how the helper tells the families apart.
        unsafe { bpf_skc_lookup_tcp(self.0.cast(), tuple, len, here, 0) }
    }
}

/// `struct bpf_sock_tuple` of one family, network byte order.
#[repr(C)]
struct Tuple<A> {
    source: A,
    destination: A,
    source_port: u16,
    port: u16,
}
