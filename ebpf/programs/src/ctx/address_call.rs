//! `connect()` and the like, as a `cgroup/…` program of a socket address sees them.

use aya_ebpf::{
    bindings::bpf_sock_addr,
    helpers::generated::{bpf_bind, bpf_get_netns_cookie, bpf_getsockopt, bpf_set_retval},
};
use shunt_abi::{Addr, Endpoint, NetnsCookie};
use shunt_decide::Protocol;

use super::{
    AF_INET, AF_INET6, FullSocket, HelperFailed, PROCEED, SO_REUSEADDR, SOL_SOCKET, SockAddr4,
    SockAddr6, TCP, port_from_be, set_option,
};

/// `IPPROTO_UDP`
const UDP: u32 = 17;

/// What a `cgroup` program returns to make the call fail.
const DENY: i32 = 0;

/// The call that a `cgroup/connect`, `cgroup/bind` or `cgroup/getpeername` program sees.
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

    /// What the socket has for SO_REUSEADDR; `None` where the kernel does not say it to a
    /// program (Linux 5.12 does in bind(), and 6.1 this option).
    #[inline(always)]
    pub fn reuses_address(self) -> Option<i32> {
        let mut value = 0_i32;
        let to = (&raw mut value).cast();
        let size = size_of::<i32>() as i32;
        // SAFETY: the context of this run, and room for an option of that size.
        let done = unsafe { bpf_getsockopt(self.0.cast(), SOL_SOCKET, SO_REUSEADDR, to, size) };
        (done == 0).then_some(value)
    }

    /// Sets SO_REUSEADDR of the socket.
    #[inline(always)]
    pub fn set_reuses_address(self, value: &i32) {
        // SAFETY: the context of this run.
        unsafe { set_option(self.0.cast(), (SOL_SOCKET, SO_REUSEADDR), value) };
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
            unsafe { bpf_bind(self.0, (&raw mut to).cast(), len) }
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
            unsafe { bpf_bind(self.0, (&raw mut to).cast(), len) }
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
