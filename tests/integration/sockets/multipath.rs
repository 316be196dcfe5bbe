//! MPTCP: several TCP connections that are one to a program.

use shunt_tests::Owner;
use socket2::{Domain, Protocol, Socket, Type};

use super::{OUTSIDE, OWN, Seen, Sides, call, owned_by, patient};

fn open(owner: Owner) -> Socket {
    let open =
        || Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP)).expect("a new socket");
    patient(owned_by(owner, open))
}

fn sides() -> Sides {
    let sides = Sides::new();
    for side in [&sides.rules, &sides.enrolled] {
        side.sysctl("net.mptcp.enabled", "1");
    }
    sides
}

/// The proxy speaks TCP, and the client falls back to it.
#[test]
fn an_mptcp_socket_is_redirected() {
    let sides = sides();
    let found = sides.ask(|_| {
        [
            call(&open(Owner::APP), OUTSIDE),
            call(&open(Owner::PROXY), OUTSIDE),
            call(&open(Owner::APP), OWN),
        ]
    });
    found.assert_both(&[
        Ok(Seen::redirected(OUTSIDE)),
        Ok(Seen::direct(OUTSIDE)),
        Ok(Seen::inside(OWN)),
    ]);
}
