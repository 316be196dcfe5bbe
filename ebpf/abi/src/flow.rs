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

/// Value of the socket storage `ASKED`: what `connect` did to a socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// What the application asked for; meaningful with [`ASKED_REDIRECTED`].
    pub destination: Endpoint,
    /// [`ASKED_REDIRECTED`] and [`ASKED_BOUND`].
    pub flags: u32,
}

/// Bit of [`Asked::flags`]: the last connect() was redirected.
pub const ASKED_REDIRECTED: u32 = 1 << 0;
/// Bit of [`Asked::flags`]: the source address was bound by the program, not by
/// the application. It stays when a connection fails or is dissolved, and the
/// next connect() must not take it for the application's wish.
pub const ASKED_BOUND: u32 = 1 << 1;

impl Asked {
    /// The destination that was asked for, `None` when the last connect() was
    /// not redirected.
    #[inline(always)]
    pub const fn destination(&self) -> Option<&Endpoint> {
        if self.flags & ASKED_REDIRECTED == 0 {
            return None;
        }
        Some(&self.destination)
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
