//! bind(): a port at which the proxy has connections is free for the application.
//!
//! What `sk_lookup` gives to the proxy stays at the port that was called, and so does the
//! accepted socket (`__inet_inherit_port`); the rules' DNAT leaves it at the proxy's port.
//! There bind() would find it and say EADDRINUSE (`inet_csk_bind_conflict`), unless both
//! sockets have SO_REUSEADDR. Every proxy's has; the application's is lent it until it has
//! its port for good, which is listen() or connect(). Then it is as before, and so are the
//! sockets accepted from it, so that its own connections are in its way as ever.

use shunt_abi::Endpoint;
use shunt_decide::Protocol;

use crate::{
    ctx::{AddressCall, Socket, TcpEvent},
    maps::REUSES,
    pods,
};

/// A socket is about to be bound to `to`. The proxy has no connections at a loopback
/// address, and a socket that has a port cannot be bound again.
#[inline(always)]
pub fn bind(call: AddressCall, to: &Endpoint) {
    let concerned = to.port != 0
        && call.socket().source_port() == 0
        && !to.addr.is_loopback()
        && matches!(call.protocol(), Some(Protocol::Tcp))
        && pods::settings(call.netns()).is_some();
    if concerned && call.reuses_address() == Some(0) {
        lend(call);
    }
}

#[inline(always)]
fn lend(call: AddressCall) {
    if REUSES.set(call.socket().socket(), &0).is_ok() {
        call.set_reuses_address(&1);
    }
}

/// A socket is about to be connected: one that was bound, or that could not be, wherever it
/// is by now.
#[inline(always)]
pub fn connects(call: AddressCall) {
    take_back(call.socket().socket(), |before| {
        call.set_reuses_address(before)
    });
}

/// A socket has called listen().
#[inline(always)]
pub fn listens(event: TcpEvent, socket: Socket) {
    take_back(socket, |before| event.set_reuses_address(before));
}

#[inline(always)]
fn take_back(socket: Socket, set: impl FnOnce(&i32)) {
    if let Some(before) = REUSES.get(socket) {
        set(before);
        REUSES.remove(socket);
    }
}
