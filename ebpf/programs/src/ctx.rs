//! The contexts that the kernel hands to a program, read field by field.
//!
//! Every access is volatile and of the field's own width: left to itself the
//! compiler merges neighbouring accesses or computes addresses first, and the
//! verifier then says "invalid bpf_context access" or "pointer arithmetic on
//! sock prohibited". Addresses come out as [`Addr`], ports in host byte order.

use core::{
    ffi::c_void,
    mem::MaybeUninit,
    ptr::{addr_of, addr_of_mut, read_volatile, write_volatile},
};

use aya_ebpf::{
    bindings::{
        __sk_buff, BPF_F_CURRENT_NETNS, BPF_F_INGRESS, BPF_F_PSEUDO_HDR, BPF_TCP_ESTABLISHED,
        bpf_sk_lookup, bpf_sock, bpf_sock_addr, bpf_sock_ops, bpf_sock_tuple, bpf_sockopt, file,
        seq_file, sk_action::SK_PASS, sk_msg_md,
    },
    btf_maps::SockHash,
    helpers::generated::{
        bpf_bind, bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_l3_csum_replace,
        bpf_l4_csum_replace, bpf_msg_apply_bytes, bpf_msg_redirect_hash, bpf_seq_write,
        bpf_set_retval, bpf_sk_fullsock, bpf_sk_release, bpf_skb_load_bytes, bpf_skb_store_bytes,
        bpf_skc_lookup_tcp, bpf_skc_to_tcp_sock, bpf_sock_from_file, bpf_sock_ops_cb_flags_set,
    },
};
use shunt_abi::{Addr, Endpoint, NetnsCookie};
use shunt_decide::Protocol;

/// `AF_INET`
pub const AF_INET: u32 = 2;
/// `AF_INET6`
pub const AF_INET6: u32 = 10;
/// `IPPROTO_TCP`
pub const TCP: u32 = 6;
/// `IPPROTO_UDP`
const UDP: u32 = 17;

/// What a `cgroup` program returns to let the call go on.
pub const PROCEED: i32 = 1;
/// What a `cgroup` program returns to make the call fail.
const DENY: i32 = 0;

/// How much of a caller's buffer a program is given, in bytes.
const PAGE: i32 = 4096;

/// No memory.
pub const ENOMEM: i32 = 12;
/// No way from that source.
pub const EINVAL: i32 = 22;
/// Not an address of the namespace.
pub const EADDRNOTAVAIL: i32 = 99;
/// No route.
pub const ENETUNREACH: i32 = 101;

macro_rules! read {
    ($ptr:expr, $($field:tt)+) => {
        // SAFETY: the pointer is a context or a socket that the kernel gave to
        // this run of the program; the verifier checks offset and width.
        unsafe { read_volatile(addr_of!((*$ptr).$($field)+)) }
    };
}

macro_rules! write {
    ($ptr:expr, $field:ident $([$i:literal])?, $value:expr) => {{
        let value = $value;
        // SAFETY: as for reads; the verifier knows which fields can be written.
        unsafe { write_volatile(addr_of_mut!((*$ptr).$field $([$i])?), value) }
    }};
}

/// Four words, each read on its own.
macro_rules! read_addr6 {
    ($ptr:expr, $($field:tt)+) => {
        Addr::from_v6([
            read!($ptr, $($field)+[0]),
            read!($ptr, $($field)+[1]),
            read!($ptr, $($field)+[2]),
            read!($ptr, $($field)+[3]),
        ])
    };
}

/// The one of two addresses that a family means. Both are read beforehand: of
/// two branches that each end in a read the compiler makes one read at a
/// computed place, which the verifier forbids.
#[inline(always)]
const fn of_family(family: u32, v4: u32, v6: Addr) -> Addr {
    if family == AF_INET {
        Addr::from_v4(v4)
    } else {
        v6
    }
}

/// A port as the contexts have it: network byte order in the low half.
#[inline(always)]
const fn port_from_be(field: u32) -> u16 {
    u16::from_be(field as u16)
}

/// A helper of the kernel did not do what it was asked.
#[derive(Clone, Copy, Debug)]
pub struct HelperFailed;

/// A socket that a context or an iterator gave, alive while the program runs.
#[derive(Clone, Copy)]
pub struct Socket(*mut c_void);

impl Socket {
    /// The pointer, for helpers.
    #[inline(always)]
    pub const fn as_ptr(self) -> *mut c_void {
        self.0
    }

    /// Its `struct tcp_sock`; `None` when it is no TCP socket (Linux 5.9).
    #[inline(always)]
    pub fn tcp(self) -> Option<Structure> {
        // SAFETY: a Socket is what a context or an iterator gave.
        let tcp = unsafe { bpf_skc_to_tcp_sock(self.0) };
        (!tcp.is_null()).then_some(Structure(tcp.cast()))
    }
}

/// A structure of the kernel's whose type the verifier knows. Its fields are
/// loaded without a helper; the offsets are the running kernel's, and constants to
/// the verifier, which checks them. Where a structure is gone meanwhile, 0 is
/// loaded.
#[derive(Clone, Copy)]
pub struct Structure(*const u8);

impl Structure {
    /// A field of four bytes.
    #[inline(always)]
    pub fn word(self, offset: u32) -> u32 {
        // SAFETY: the verifier checks the offset and the width, and the kernel
        // takes care of a page that is not there.
        unsafe { read_volatile(self.0.add(offset as usize).cast()) }
    }

    /// A field of eight bytes.
    #[inline(always)]
    pub fn long(self, offset: u32) -> u64 {
        // SAFETY: as above.
        unsafe { read_volatile(self.0.add(offset as usize).cast()) }
    }

    /// What a field that is a pointer points to.
    #[inline(always)]
    pub fn follow(self, offset: u32) -> Option<Self> {
        // SAFETY: as above.
        let pointer: *const u8 = unsafe { read_volatile(self.0.add(offset as usize).cast()) };
        (!pointer.is_null()).then_some(Self(pointer))
    }
}

/// A `struct bpf_sock`: a socket whose fields a program may read.
#[derive(Clone, Copy)]
pub struct FullSocket(*mut bpf_sock);

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
        of_family(
            self.family(),
            read!(self.0, src_ip4),
            read_addr6!(self.0, src_ip6),
        )
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

/// The call that a `cgroup/connect` or `cgroup/getpeername` program sees.
#[derive(Clone, Copy)]
pub struct AddressCall(*mut bpf_sock_addr);

impl AddressCall {
    /// From the program's context.
    #[inline(always)]
    pub const fn new(ctx: *mut bpf_sock_addr) -> Self {
        Self(ctx)
    }

    /// The network namespace of the socket (Linux 5.7).
    #[inline(always)]
    pub fn netns(self) -> NetnsCookie {
        // SAFETY: the context of this very run.
        unsafe { bpf_get_netns_cookie(self.0.cast()) }
    }

    /// The socket.
    #[inline(always)]
    pub fn socket(self) -> FullSocket {
        FullSocket(read!(self.0, __bindgen_anon_1.sk))
    }

    /// The transport protocol of the socket, if the rules know it.
    #[inline(always)]
    pub fn protocol(self) -> Option<Protocol> {
        match read!(self.0, protocol) {
            TCP => Some(Protocol::Tcp),
            UDP => Some(Protocol::Udp),
            _ => None,
        }
    }

    /// The family of the socket.
    #[inline(always)]
    pub fn family(self) -> u32 {
        read!(self.0, family)
    }

    /// The address in an `AF_INET` call.
    #[inline(always)]
    pub fn address4(self) -> Endpoint {
        Endpoint::new(
            Addr::from_v4(read!(self.0, user_ip4)),
            port_from_be(read!(self.0, user_port)),
        )
    }

    /// The address in an `AF_INET6` call.
    #[inline(always)]
    pub fn address6(self) -> Endpoint {
        Endpoint::new(
            read_addr6!(self.0, user_ip6),
            port_from_be(read!(self.0, user_port)),
        )
    }

    /// Replaces the address of an `AF_INET` call, which goes on with it.
    #[inline(always)]
    pub fn set_address4(self, to: &Endpoint) -> i32 {
        write!(self.0, user_ip4, to.addr.v4());
        write!(self.0, user_port, u32::from(to.port.to_be()));
        PROCEED
    }

    /// Replaces the address of an `AF_INET6` call, which goes on with it.
    #[inline(always)]
    pub fn set_address6(self, to: &Endpoint) -> i32 {
        write!(self.0, user_ip6[0], to.addr.words[0]);
        write!(self.0, user_ip6[1], to.addr.words[1]);
        write!(self.0, user_ip6[2], to.addr.words[2]);
        write!(self.0, user_ip6[3], to.addr.words[3]);
        write!(self.0, user_port, u32::from(to.port.to_be()));
        PROCEED
    }

    /// Binds the socket to a source address and leaves the port to connect().
    ///
    /// Fails when the address is not the namespace's, or the socket has a port.
    #[inline(always)]
    pub fn bind(self, source: &Addr) -> Result<(), HelperFailed> {
        let done = if self.family() == AF_INET {
            let mut to = SockAddr4 {
                family: AF_INET as u16,
                port: 0,
                addr: source.v4(),
                zero: [0; 2],
            };
            let len = size_of::<SockAddr4>() as i32;
            // SAFETY: the context of this run, and a sockaddr_in of that size.
            unsafe { bpf_bind(self.0, addr_of_mut!(to).cast(), len) }
        } else {
            let mut to = SockAddr6 {
                family: AF_INET6 as u16,
                port: 0,
                flowinfo: 0,
                addr: source.words,
                scope: 0,
            };
            let len = size_of::<SockAddr6>() as i32;
            // SAFETY: the context of this run, and a sockaddr_in6 of that size.
            unsafe { bpf_bind(self.0, addr_of_mut!(to).cast(), len) }
        };
        if done == 0 { Ok(()) } else { Err(HelperFailed) }
    }
}

/// Makes the system call fail with `errno` (Linux 5.18).
#[inline(always)]
pub fn fail_with(errno: i32) -> i32 {
    // SAFETY: changes nothing but the return value of this run.
    let _ = unsafe { bpf_set_retval(-errno) };
    DENY
}

/// `struct sockaddr_in`
#[repr(C)]
#[derive(Clone, Copy)]
pub struct SockAddr4 {
    /// `AF_INET`
    pub family: u16,
    /// The port, network byte order.
    pub port: u16,
    /// The address, network byte order.
    pub addr: u32,
    /// Zero.
    pub zero: [u32; 2],
}

/// `struct sockaddr_in6`
#[repr(C)]
#[derive(Clone, Copy)]
pub struct SockAddr6 {
    /// `AF_INET6`
    pub family: u16,
    /// The port, network byte order.
    pub port: u16,
    /// Zero.
    pub flowinfo: u32,
    /// The address, network byte order.
    pub addr: [u32; 4],
    /// Zero: the answer never names an interface.
    pub scope: u32,
}

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

    /// The network namespace of the socket (Linux 5.14).
    #[inline(always)]
    pub fn netns(self) -> NetnsCookie {
        // SAFETY: the context of this very run.
        unsafe { bpf_get_netns_cookie(self.0.cast()) }
    }

    /// The socket; `None` for one that is not a full socket.
    #[inline(always)]
    pub fn socket(self) -> Option<Socket> {
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
        let addr = of_family(
            self.family(),
            read!(self.0, local_ip4),
            read_addr6!(self.0, local_ip6),
        );
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
        let addr = of_family(
            self.family(),
            read!(self.0, remote_ip4),
            read_addr6!(self.0, remote_ip6),
        );
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

/// What a `sk_msg` program sees: a message that a socket sends.
#[derive(Clone, Copy)]
pub struct Outgoing(*mut sk_msg_md);

impl Outgoing {
    /// From the program's context.
    #[inline(always)]
    pub const fn new(ctx: *mut sk_msg_md) -> Self {
        Self(ctx)
    }

    /// The socket (Linux 5.8).
    #[inline(always)]
    pub fn socket(self) -> Socket {
        let sk: *mut bpf_sock = read!(self.0, __bindgen_anon_3.sk);
        Socket(sk.cast())
    }

    /// How many bytes there are, or are left.
    #[inline(always)]
    pub fn size(self) -> u32 {
        read!(self.0, size)
    }

    /// The network namespace of the socket (Linux 5.15).
    #[inline(always)]
    pub fn netns(self) -> NetnsCookie {
        // SAFETY: the context of this very run.
        unsafe { bpf_get_netns_cookie(self.0.cast()) }
    }

    /// Gives the first `bytes` of it to the socket that `map` has under `key`,
    /// for its reader. The program is asked again about what is left.
    ///
    /// Fails when there is no such socket.
    #[inline(always)]
    pub fn give<K, const N: usize>(
        self,
        map: &'static SockHash<K, N>,
        key: &mut K,
        bytes: u32,
    ) -> Result<(), HelperFailed> {
        let map = core::ptr::from_ref(map).cast_mut().cast();
        let key = core::ptr::from_mut(key).cast();
        // SAFETY: the context of this run, a socket map and a key of it.
        let done = unsafe { bpf_msg_redirect_hash(self.0, map, key, u64::from(BPF_F_INGRESS)) };
        if done != i64::from(SK_PASS) {
            return Err(HelperFailed);
        }
        if bytes < self.size() {
            // SAFETY: the context of this run.
            let _ = unsafe { bpf_msg_apply_bytes(self.0, bytes) };
        }
        Ok(())
    }
}

/// What an iterator over open files sees (`struct bpf_iter__task_file`).
#[derive(Clone, Copy)]
pub struct FileVisit(*mut TaskFile);

/// `struct bpf_iter__task_file`
#[repr(C)]
pub struct TaskFile {
    meta: *mut c_void,
    task: *mut c_void,
    fd: u32,
    file: *mut file,
}

impl FileVisit {
    /// From the program's context.
    #[inline(always)]
    pub const fn new(ctx: *mut TaskFile) -> Self {
        Self(ctx)
    }

    /// The socket that the file is; `None` when it is none. `offset` is that of
    /// `sk` in `struct socket` (Linux 5.11).
    #[inline(always)]
    pub fn socket(self, offset: u32) -> Option<Socket> {
        let file = read!(self.0, file);
        if file.is_null() {
            return None;
        }
        // SAFETY: a file of this context.
        let socket = unsafe { bpf_sock_from_file(file) };
        if socket.is_null() {
            return None;
        }
        // SAFETY: the verifier knows the structure and checks the offset.
        let sk = unsafe {
            read_volatile(
                socket
                    .cast::<u8>()
                    .add(offset as usize)
                    .cast::<*mut c_void>(),
            )
        };
        (!sk.is_null()).then_some(Socket(sk))
    }
}

/// What an iterator over a socket map sees (`struct bpf_iter__sockmap`).
#[derive(Clone, Copy)]
pub struct MemberVisit(*mut Member);

/// `struct bpf_iter__sockmap`
#[repr(C)]
pub struct Member {
    meta: *mut VisitMeta,
    map: *mut c_void,
    key: *mut c_void,
    sk: *mut c_void,
}

/// The start of `struct bpf_iter_meta`.
#[repr(C)]
struct VisitMeta {
    seq: *mut seq_file,
}

impl MemberVisit {
    /// From the program's context.
    #[inline(always)]
    pub const fn new(ctx: *mut Member) -> Self {
        Self(ctx)
    }

    /// The socket; `None` after the last one.
    #[inline(always)]
    pub fn socket(self) -> Option<Socket> {
        let sk = read!(self.0, sk);
        (!sk.is_null()).then_some(Socket(sk))
    }

    /// Adds a byte to what the reader of the iterator reads.
    #[inline(always)]
    pub fn tick(self) {
        let meta = read!(self.0, meta);
        let seq = read!(meta, seq);
        let byte = b'.';
        // SAFETY: the file of this context, and one byte.
        let _ = unsafe { bpf_seq_write(seq, addr_of!(byte).cast(), 1) };
    }
}

/// What a `cgroup/getsockopt` program sees: the call after the kernel answered.
#[derive(Clone, Copy)]
pub struct OptionCall(*mut bpf_sockopt);

impl OptionCall {
    /// From the program's context.
    #[inline(always)]
    pub const fn new(ctx: *mut bpf_sockopt) -> Self {
        Self(ctx)
    }

    /// The protocol level.
    #[inline(always)]
    pub fn level(self) -> i32 {
        read!(self.0, level)
    }

    /// The option.
    #[inline(always)]
    pub fn name(self) -> i32 {
        read!(self.0, optname)
    }

    /// The length of the caller's buffer, in bytes.
    #[inline(always)]
    pub fn length(self) -> i32 {
        read!(self.0, optlen)
    }

    /// The socket.
    #[inline(always)]
    pub fn socket(self) -> FullSocket {
        FullSocket(read!(self.0, __bindgen_anon_1.sk))
    }

    /// Leaves the kernel's answer as it is. Of a buffer of more than a page the
    /// program was given the first page only, which must not be copied back.
    #[inline(always)]
    pub fn leave_alone(self) {
        if self.length() > PAGE {
            write!(self.0, optlen, 0);
        }
    }

    /// Makes the call succeed, with an answer of `length` bytes.
    #[inline(always)]
    fn succeed(self, length: usize) {
        // The kernel's own answer leaves the caller's length as it is; of a
        // buffer of more than a page the program could not write the rest.
        if self.length() > PAGE {
            write!(self.0, optlen, length as i32);
        }
        write!(self.0, retval, 0);
    }

    /// Writes `value` to the start of the caller's buffer, and the call succeeds.
    /// `false` when the buffer is too small.
    #[inline(always)]
    pub fn answer<T: Copy>(self, value: T) -> bool {
        let start = read!(self.0, __bindgen_anon_2.optval).cast::<T>();
        let end = read!(self.0, __bindgen_anon_3.optval_end).cast::<T>();
        // SAFETY: the address is only compared; the verifier wants exactly this
        // comparison before it lets the program write.
        if unsafe { start.add(1) } > end {
            return false;
        }
        // SAFETY: start..start+1 lies within the buffer, as just checked.
        unsafe { start.write_unaligned(value) };
        self.succeed(size_of::<T>());
        true
    }
}

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
        let addr = of_family(
            self.family(),
            read!(self.0, local_ip4),
            read_addr6!(self.0, local_ip6),
        );
        Endpoint::new(addr, read!(self.0, local_port) as u16)
    }

    /// The index of the interface that it came in through (Linux 5.17). For a
    /// packet from inside it is not that of loopback.
    #[inline(always)]
    pub fn ifindex(self) -> u32 {
        read!(self.0, ingress_ifindex)
    }

    /// Where it came from.
    #[inline(always)]
    pub fn remote(self) -> Endpoint {
        let addr = of_family(
            self.family(),
            read!(self.0, remote_ip4),
            read_addr6!(self.0, remote_ip6),
        );
        Endpoint::new(addr, u16::from_be(read!(self.0, remote_port)))
    }
}

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

/// What an iterator over TCP sockets sees (`struct bpf_iter__tcp`).
#[derive(Clone, Copy)]
pub struct Visit(*mut TcpVisit);

/// `struct bpf_iter__tcp`
#[repr(C)]
pub struct TcpVisit {
    meta: *mut c_void,
    sk_common: *mut c_void,
    uid: u32,
}

impl Visit {
    /// From the program's context.
    #[inline(always)]
    pub const fn new(ctx: *mut TcpVisit) -> Self {
        Self(ctx)
    }

    /// The socket; `None` after the last one.
    #[inline(always)]
    pub fn socket(self) -> Option<Socket> {
        let sk = read!(self.0, sk_common);
        (!sk.is_null()).then_some(Socket(sk))
    }
}
