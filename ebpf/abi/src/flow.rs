use crate::{Addr, NetnsCookie};

/// An address and a port.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Hash, PartialEq, Eq)]
pub struct Endpoint {
    /// The address.
    pub addr: Addr,
    /// The port, host byte order.
    pub port: u16,
    /// Always 0.
    pub pad: u16,
}

impl Endpoint {
    /// An endpoint; `port` in host byte order.
    #[inline(always)]
    pub const fn new(addr: Addr, port: u16) -> Self {
        Self { addr, port, pad: 0 }
    }
}

/// Key of the map `FLOWS`: a redirected connection between the first packet of
/// the application and its acceptance by the proxy.
#[repr(C)]
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub struct FlowKey {
    /// The network namespace of both sides.
    pub cookie: NetnsCookie,
    /// The application's address.
    pub client: Addr,
    /// The proxy's address.
    pub server: Addr,
    /// The application's port, host byte order.
    pub client_port: u16,
    /// The proxy's port, host byte order.
    pub server_port: u16,
    /// Always 0.
    pub pad: u32,
}
