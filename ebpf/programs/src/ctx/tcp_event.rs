//! An event in the life of a TCP socket.

use aya_ebpf::{
    bindings::{bpf_sock, bpf_sock_ops},
    helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_sock_ops_cb_flags_set},
};
use shunt_abi::{Endpoint, NetnsCookie};

use super::{SO_REUSEADDR, SOL_SOCKET, Socket, TCP, TCP_WINDOW_CLAMP, set_option};

/// What a `sock_ops` program sees of a TCP socket.
#[derive(Clone, Copy)]
pub struct TcpEvent(*mut bpf_sock_ops);

impl TcpEvent {
    /// From the program's context.
    #[inline(always)]
    pub const fn new(ctx: *mut bpf_sock_ops) -> Self {
        Self(ctx)
    }

    /// The context, for helpers.
    #[inline(always)]
    pub const fn as_ptr(self) -> *mut bpf_sock_ops {
        self.0
    }

    /// Which event, a `BPF_SOCK_OPS_…` code.
    #[inline(always)]
    pub fn op(self) -> u32 {
        read!(self.0, op)
    }

    /// The state until now, in a state callback.
    #[inline(always)]
    pub fn old_state(self) -> u32 {
        read!(self.0, __bindgen_anon_1.args[0])
    }

    /// The new state, in a state callback.
    #[inline(always)]
    pub fn new_state(self) -> u32 {
        read!(self.0, __bindgen_anon_1.args[1])
    }

    /// The state that it is in.
    #[inline(always)]
    pub fn state(self) -> u32 {
        read!(self.0, state)
    }

    /// Whether this callback for options of a header is about a segment, and not about how
    /// large the next ones may be.
    #[inline(always)]
    pub fn is_segment(self) -> bool {
        // A segment has a flag, ACK at least. What the kernel says itself (`args[0]`) is where
        // programs that ran before this one have put their reply.
        read!(self.0, skb_tcp_flags) != 0
    }

    /// The network namespace of the socket (Linux 5.14).
    #[inline(always)]
    pub fn netns(self) -> NetnsCookie {
        // SAFETY: the context of this very run.
        unsafe { bpf_get_netns_cookie(self.0.cast()) }
    }

    /// The socket; `None` for one that is not a full socket. Asked for before: where the
    /// compiler loads the pointer into the register of the context, some kernels leave the
    /// context there for such a socket (CVE-2026-53078).
    #[inline(always)]
    pub fn socket(self) -> Option<Socket> {
        if read!(self.0, is_fullsock) == 0 {
            return None;
        }
        let sk: *mut bpf_sock = read!(self.0, __bindgen_anon_2.sk);
        (!sk.is_null()).then(|| Socket(sk.cast()))
    }

    /// Its family.
    #[inline(always)]
    pub fn family(self) -> u32 {
        read!(self.0, family)
    }

    /// Its local address and port.
    #[inline(always)]
    pub fn local(self) -> Endpoint {
        let addr = read_addr!(self.0, local_ip4, local_ip6);
        Endpoint::new(addr, self.local_port())
    }

    /// Its local port.
    #[inline(always)]
    pub fn local_port(self) -> u16 {
        read!(self.0, local_port) as u16
    }

    /// Its peer's address and port.
    #[inline(always)]
    pub fn remote(self) -> Endpoint {
        let addr = read_addr!(self.0, remote_ip4, remote_ip6);
        // On both byte orders the port is in the half that a 32-bit swap brings
        // down: the field is `port << 16` on little endian machines.
        let port = u32::from_be(read!(self.0, remote_port)) as u16;
        Endpoint::new(addr, port)
    }

    /// Asks for callbacks of this socket, beside those already asked for.
    #[inline(always)]
    pub fn watch(self, flags: u32) {
        let asked = read!(self.0, bpf_sock_ops_cb_flags);
        self.set_watched(asked | flags);
    }

    /// Whether somebody has asked for callbacks of all these kinds: these programs, or others
    /// of `sock_ops`, which share one word of a socket's for it.
    #[inline(always)]
    pub fn is_watched(self, flags: u32) -> bool {
        read!(self.0, bpf_sock_ops_cb_flags) & flags == flags
    }

    /// Asks for no more callbacks of these kinds.
    #[inline(always)]
    pub fn unwatch(self, flags: u32) {
        let asked = read!(self.0, bpf_sock_ops_cb_flags);
        self.set_watched(asked & !flags);
    }

    #[inline(always)]
    fn set_watched(self, flags: u32) {
        // SAFETY: the context of this very run. It fails only for sockets that
        // are not full, and then there is nothing to watch.
        let _ = unsafe { bpf_sock_ops_cb_flags_set(self.0, flags as i32) };
    }

    /// Sets SO_REUSEADDR of the socket (Linux 6.1).
    #[inline(always)]
    pub fn set_reuses_address(self, value: &i32) {
        // SAFETY: the context of this run.
        unsafe { set_option(self.0.cast(), (SOL_SOCKET, SO_REUSEADDR), value) };
    }

    /// Has the socket offer no more than so many bytes from now on; what it has offered
    /// stays (`TCP_WINDOW_CLAMP`).
    #[inline(always)]
    pub fn offer_at_most(self, bytes: u32) {
        let option = (TCP as i32, TCP_WINDOW_CLAMP);
        // SAFETY: as above.
        unsafe { set_option(self.0.cast(), option, &bytes.cast_signed()) };
    }

    /// The socket's cookie.
    #[inline(always)]
    pub fn cookie(self) -> u64 {
        // SAFETY: the context of this very run.
        unsafe { bpf_get_socket_cookie(self.0.cast()) }
    }

    /// How many segments with data it has sent.
    #[inline(always)]
    pub fn data_segments(self) -> u32 {
        read!(self.0, data_segs_out)
    }

    /// How many segments with data it has received.
    #[inline(always)]
    pub fn data_segments_received(self) -> u32 {
        read!(self.0, data_segs_in)
    }

    /// The sequence number of the first byte that this side sends, and that of
    /// the first byte of the other side. `active` says that this side called
    /// connect(): its SYN is among the bytes that the kernel counts.
    #[inline(always)]
    pub fn first_bytes(self, active: bool) -> (u32, u32) {
        let acked = read!(self.0, bytes_acked) as u32;
        let received = read!(self.0, bytes_received) as u32;
        let own = read!(self.0, snd_una).wrapping_sub(acked);
        let remote = read!(self.0, rcv_nxt).wrapping_sub(received);
        (own.wrapping_add(active as u32), remote)
    }
}
