//! connect(): decide, remember what was asked for, rewrite.

use shunt_abi::{Endpoint, ErrorCode, NetnsCookie};
use shunt_decide::{Protocol, may_capture};

use crate::{
    counters,
    ctx::{AddressCall, EADDRNOTAVAIL, ENOMEM},
    facts::{self, Path, loopback_like},
    maps::ASKED,
    pods,
};

/// What becomes of a call to connect().
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It goes on as it is.
    Untouched,
    /// It goes on to this address instead.
    Redirected(Endpoint),
    /// It fails with this error number: it has to be redirected and cannot be.
    Refused(i32),
}

/// Decides over a call to connect() that asks for `asked`.
#[inline(always)]
pub fn connect(call: AddressCall, asked: Endpoint) -> Outcome {
    let netns = call.netns();
    let Some(settings) = pods::settings(netns) else {
        return Outcome::Untouched;
    };
    let Some(protocol) = call.protocol() else {
        return Outcome::Untouched;
    };
    if may_capture(settings, protocol, asked.port) {
        let path = Path::of(call, netns, asked);
        let decision = facts::decide(call, netns, settings, protocol, &path, asked.port);
        if let Some(port) = decision.verdict.port(settings) {
            return redirect(
                call,
                netns,
                protocol,
                &path,
                Endpoint::new(path.destination, asked.port),
                port,
            );
        }
    }
    // The socket may have been redirected by an earlier connect().
    ASKED.remove(call.socket().socket());
    Outcome::Untouched
}

/// Points the connection at the proxy's `port`, and leaves everything else that
/// either side can see as it would have been.
#[inline(always)]
fn redirect(
    call: AddressCall,
    netns: NetnsCookie,
    protocol: Protocol,
    path: &Path,
    asked: Endpoint,
    port: u16,
) -> Outcome {
    if let Some(errno) = path.dead_end() {
        counters::failed(netns, ErrorCode::NoRoute);
        return Outcome::Refused(errno);
    }
    let loopback = loopback_like(&path.destination);
    let mut to = loopback;
    // On its way to loopback an unbound socket would get loopback's address:
    // right for a datagram, which the mesh's rules give that very source.
    let keeps_source = matches!(protocol, Protocol::Tcp);
    if keeps_source && !path.bound && !path.source.same(&loopback) {
        if call.socket().source_port() == 0 {
            if call.bind(&path.source).is_err() {
                counters::failed(netns, ErrorCode::BindFailed);
                return Outcome::Refused(EADDRNOTAVAIL);
            }
        } else {
            // Bound to a port and no address, a socket cannot be bound again.
            // Sent to the source address itself it gets just that.
            to = path.source;
        }
    }
    if ASKED.set(call.socket().socket(), asked).is_err() {
        counters::failed(netns, ErrorCode::RememberFailed);
        return Outcome::Refused(ENOMEM);
    }
    Outcome::Redirected(Endpoint::new(to, port))
}
