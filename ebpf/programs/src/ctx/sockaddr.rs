//! Addresses as a system call has them.

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
