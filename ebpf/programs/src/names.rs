//! What the two sides are told about each other.

use shunt_abi::Endpoint;

use crate::{
    ctx::{AF_INET, AF_INET6, AddressCall, OptionCall, SockAddr4, SockAddr6},
    maps::{ASKED, ORIGINAL_DST},
};

/// What getpeername() on a redirected socket has to answer: what was asked for.
#[inline(always)]
pub fn peer(call: AddressCall) -> Option<Endpoint> {
    ASKED.get(call.socket().socket())?.destination().copied()
}

/// `SOL_IP`
const SOL_IP: i32 = 0;
/// `SOL_IPV6`
const SOL_IPV6: i32 = 41;
/// `SO_ORIGINAL_DST` and `IP6T_SO_ORIGINAL_DST`
const SO_ORIGINAL_DST: i32 = 80;

/// Answers `SO_ORIGINAL_DST` on a socket that was redirected, and leaves every
/// other answer of the kernel as it is.
///
/// The length that the caller passed stays, as with the kernel's own
/// `getorigdst`; a buffer that is too small leaves the kernel's error.
#[inline(always)]
pub fn original_destination(call: OptionCall) {
    let destination = if is_original_dst(call) {
        destination_of(call)
    } else {
        None
    };
    let answered = destination.is_some_and(|destination| tell(call, &destination));
    if !answered {
        call.leave_alone();
    }
}

/// Writes the answer. `false` when the caller's buffer is too small.
#[inline(always)]
fn tell(call: OptionCall, destination: &Endpoint) -> bool {
    if call.level() == SOL_IP {
        let answer = SockAddr4 {
            family: AF_INET as u16,
            port: destination.port.to_be(),
            addr: destination.addr.v4(),
            zero: [0; 2],
        };
        call.answer(answer)
    } else {
        let answer = SockAddr6 {
            family: AF_INET6 as u16,
            port: destination.port.to_be(),
            flowinfo: 0,
            addr: destination.addr.words,
            scope: 0,
        };
        call.answer(answer)
    }
}

#[inline(always)]
fn is_original_dst(call: OptionCall) -> bool {
    call.name() == SO_ORIGINAL_DST && (call.level() == SOL_IP || call.level() == SOL_IPV6)
}

/// The original destination, when there is one in the family of the option.
#[inline(always)]
fn destination_of(call: OptionCall) -> Option<Endpoint> {
    let socket = call.socket();
    let kept = ORIGINAL_DST.get(socket.socket())?;
    let destination = if let Some(destination) = kept.destination() {
        destination
    } else {
        // Inherited from the listener: steered here when the ports differ.
        let own = Endpoint::new(socket.source(), socket.source_port());
        (own.port != kept.port).then_some(own)?
    };
    (destination.addr.is_v4() == (call.level() == SOL_IP)).then_some(destination)
}
