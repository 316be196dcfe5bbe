//! MPTCP: several TCP connections that are one to a program.

use std::{
    io::{ErrorKind, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
};

use shunt_tests::{Node, Owner, deadline::wait_until};
use socket2::{Domain, Protocol, Socket, Type};

use crate::lab::Lab;

use super::{OUTSIDE, OWN, Redirection, Seen, Sides, call, owned_by, patient};

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

/// The proxy speaks TCP, and the client falls back to it. The redirection is
/// that of its TCP connection, a socket of the kernel's behind that of the
/// client; what the client asked for is not known to its own, which therefore
/// tells the proxy's name.
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
    let seen = |peer: SocketAddr| {
        let redirected = Seen {
            peer,
            ..Seen::redirected(OUTSIDE)
        };
        [redirected, Seen::direct(OUTSIDE), Seen::inside(OWN)].map(Ok)
    };
    let proxy = SocketAddr::from((Ipv4Addr::LOCALHOST, 15001));
    found.assert_each(&seen(OUTSIDE), &seen(proxy));
}

/// A connection of the proxy that has an address more to use: the kernel opens
/// another subflow by itself, with a socket that no file belongs to and thus no
/// owner. That counts as an application's, as `iptables -m owner` has it, and is
/// not let out beside the proxy; the connection lives on with its first subflow.
#[test]
fn a_subflow_that_the_kernel_opens_has_no_owner() {
    const MULTIPATH_PORT: u16 = 8443;
    let second_address = Ipv4Addr::new(10, 42, 0, 200);
    let sides = sides();
    let side = &sides.enrolled;
    let Redirection::Agent(agent) = &side.redirection else {
        unreachable!("this side has an agent");
    };
    side.pod.netns().ip(&format!(
        "addr add {second_address}/24 dev eth0\n\
         mptcp limits set subflows 2\n\
         mptcp endpoint add {second_address} dev eth0 subflow\n"
    ));
    let to = SocketAddr::from((Node::OUTSIDE, MULTIPATH_PORT));
    let listener = side.node.netns().run(|| {
        let listener = open(Owner::APP);
        listener.bind(&to.into()).expect("a free port");
        listener.listen(8).expect("a bound socket");
        listener
    });
    let mut client = side.pod.netns().run(|| {
        let client = open(Owner::PROXY);
        client.connect(&to.into()).expect("it listens");
        client
    });
    let (mut server, _) = listener.accept().expect("a client has connected");

    // Data both ways makes it a connection of several.
    wait_until("the kernel to open a subflow", || {
        client.write_all(b"x").expect("it is open");
        server.read_exact(&mut [0]).expect("it is open");
        server.write_all(b"x").expect("it is open");
        client.read_exact(&mut [0]).expect("it is open");
        let seen = agent.errors("owner_unknown");
        (seen > 0).then_some(()).ok_or(seen.to_string())
    }); // Rule 11 is the application's way to the proxy; the proxy's own connection
    // was decided by another.
    let status = agent.status();
    let rules = &status["pods"][0]["counters"]["rules"];
    assert!(rules["outbound 11"].as_u64() > Some(0), "{rules}");
}

/// A proxy whose own listener is one of MPTCP's: behind it is a socket of TCP's, which the
/// kernel puts into no map (`sk_psock_init`, `icsk_ulp_ops`), so that nothing can be given to it.
#[test]
fn an_mptcp_listener_of_the_proxy_is_refused_and_counted() {
    let lab = Lab::new();
    lab.pod.sysctl("net.mptcp.enabled", "1");
    let agent = lab.enrolled();
    let _listener = lab.pod.netns().run(|| {
        let listener = open(Owner::PROXY);
        let inbound = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 15006));
        listener.bind(&inbound.into()).expect("a free port");
        listener.listen(8).expect("a bound socket");
        listener
    });
    let called = lab.node.netns().run(|| TcpStream::connect(OWN));
    assert_eq!(
        called.map(drop).map_err(|error| error.kind()),
        Err(ErrorKind::ConnectionRefused)
    );
    assert_ne!(agent.errors("listener_failed"), 0);
}
