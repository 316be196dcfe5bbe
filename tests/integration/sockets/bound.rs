//! Sockets that are bound: to an address, a port, an interface.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::socket::{setsockopt, sockopt},
};
use shunt_tests::{Node, Owner};
use socket2::{Domain, Socket};

use super::{
    FAR_OUTSIDE, LOOPBACK, OUTSIDE, OWN, Seen, Side, Sides, address, call, connect, open, open_for,
};

/// An address that is nobody's.
const FOREIGN: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 99));
/// Below the ports that the kernel gives out.
const SOURCE_PORT: u16 = 17000;

fn bind(socket: &Socket, to: impl Into<SocketAddr>) {
    socket.bind(&to.into().into()).expect("it can be bound");
}

/// The ways to be bound to an address that the pod does not have.
const FOREIGN_WAYS: [fn(&Socket) -> io::Result<()>; 2] = [
    |socket| socket.set_ip_transparent_v4(true),
    |socket| socket.set_freebind_v4(true),
];

fn foreign_socket(way: fn(&Socket) -> io::Result<()>) -> Socket {
    let socket = open(Owner::APP);
    way(&socket).expect("root may");
    bind(&socket, (FOREIGN, 0));
    socket
}

/// As a transparent proxy is set up: what comes back to the foreign address
/// stays in the pod.
#[test]
fn a_foreign_source_address_stays_when_the_pod_answers_for_it() {
    let sides = Sides::plain();
    let _proxies = [&sides.rules, &sides.enrolled].map(|side| {
        let route = format!("route add local {FOREIGN} dev lo\n");
        side.pod.netns().ip(&route);
        side.redirect();
        side.start_proxy()
    });
    let found = sides
        .ask(|_| FOREIGN_WAYS.map(|way| [OUTSIDE, OWN].map(|to| call(&foreign_socket(way), to))));
    let seen = [Seen::redirected(OUTSIDE), Seen::inside(OWN)].map(|seen| Ok(seen.from(FOREIGN)));
    found.assert_both(&[seen.clone(), seen]);
}

/// Without that the answer of the proxy leaves the pod, and the client waits;
/// where the kernel has no route from such an address it says so. Neither goes
/// out directly.
#[test]
fn a_foreign_source_address_gets_no_answer_when_the_pod_does_not_answer_for_it() {
    let sides = Sides::new();
    let found = sides.ask(|side| {
        let results = FOREIGN_WAYS.map(|way| connect_shortly(&foreign_socket(way), OUTSIDE));
        (results, side.outside.accepted())
    });
    let results = [Err(Errno::EINPROGRESS), Err(Errno::ENETUNREACH)];
    found.assert_both(&(results, 0));
}

/// Gives up before the SYN is sent again.
fn connect_shortly(socket: &Socket, to: SocketAddr) -> Result<(), Errno> {
    let shortly = Duration::from_millis(500);
    socket
        .set_write_timeout(Some(shortly))
        .expect("an open socket");
    connect(socket, to)
}

/// A socket that must use eth0 cannot reach loopback, which is where both send
/// it: there is no answer, and nothing goes out directly.
#[test]
fn a_socket_bound_to_eth0_gets_no_answer_from_the_proxy() {
    let sides = Sides::new();
    let found = sides.ask(|side| {
        let redirected = on_device(Owner::APP, "eth0");
        let result = connect_shortly(&redirected, OUTSIDE);
        (result, side.outside.accepted())
    });
    found.assert_both(&(Err(Errno::EINPROGRESS), 0));
}

#[test]
fn a_socket_bound_to_eth0_is_direct_where_any_other_is() {
    let sides = Sides::new();
    let found = sides.ask(|_| call(&on_device(Owner::PROXY, "eth0"), OUTSIDE));
    found.assert_both(&Ok(Seen::direct(OUTSIDE)));
}

/// The kernel takes anything but loopback for a neighbour behind lo, and gets no
/// answer from there, be it a host outside or the pod's own address.
#[test]
fn a_socket_bound_to_lo_reaches_loopback_only() {
    let sides = Sides::new();
    let found = sides.ask(|side| {
        let results = [
            connect_shortly(&on_device(Owner::APP, "lo"), LOOPBACK),
            connect_shortly(&on_device(Owner::APP, "lo"), OWN),
            connect_shortly(&on_device(Owner::PROXY, "lo"), OWN),
            connect_shortly(&on_device(Owner::APP, "lo"), OUTSIDE),
        ];
        (results, side.outside.accepted())
    });
    let silent = Err(Errno::EINPROGRESS);
    found.assert_both(&([Ok(()), silent, silent, silent], 0));
}

fn on_device(owner: Owner, name: &str) -> Socket {
    let socket = open(owner);
    socket
        .bind_device(Some(name.as_bytes()))
        .expect("the pod has it");
    socket
}

/// A port that the client chose is what the proxy sees.
#[test]
fn a_source_port_stays() {
    let sides = Sides::new();
    let found = sides.ask(|_| {
        let socket = open(Owner::APP);
        bind(&socket, (Ipv4Addr::UNSPECIFIED, SOURCE_PORT));
        let seen = call(&socket, OUTSIDE);
        (seen, address(socket.local_addr()))
    });
    found.assert_both(&(
        Ok(Seen::redirected(OUTSIDE)),
        Ok((Node::FIRST_POD, SOURCE_PORT).into()),
    ));
}

/// Two sockets on one source port, for two destinations.
fn two_from_one_port(_: &Side) -> [Result<(), Errno>; 2] {
    let sockets = [(); 2].map(|()| {
        let socket = open(Owner::APP);
        socket.set_reuse_address(true).expect("an open socket");
        socket.set_reuse_port(true).expect("an open socket");
        bind(&socket, (Node::FIRST_POD, SOURCE_PORT));
        socket
    });
    [
        connect(&sockets[0], OUTSIDE),
        connect(&sockets[1], FAR_OUTSIDE),
    ]
}

/// Redirected, both connections are between the same two endpoints. Connection
/// tracking gives one of them another source port, which the proxy then sees;
/// here a source port is what the client chose, and the second is told so. It
/// does not go out directly.
#[test]
fn two_sockets_of_one_source_port_cannot_both_be_redirected() {
    let sides = Sides::new();
    sides
        .ask(two_from_one_port)
        .assert_each(&[Ok(()), Ok(())], &[Ok(()), Err(Errno::EADDRNOTAVAIL)]);
    assert_eq!(sides.enrolled.outside.accepted(), 0);
}

/// As Envoy binds: the port is chosen by connect().
#[test]
fn a_source_address_with_a_late_port_stays() {
    let sides = Sides::new();
    let found = sides.ask(|_| {
        [Ipv4Addr::UNSPECIFIED.into(), Node::FIRST_POD].map(|source| {
            let socket = open(Owner::APP);
            setsockopt(&socket, sockopt::IpBindAddressNoPort, &true).expect("an open socket");
            bind(&socket, (source, 0));
            call(&socket, OUTSIDE)
        })
    });
    found.assert_both(&[(); 2].map(|()| Ok(Seen::redirected(OUTSIDE))));
}

/// `::ffff:a.b.c.d`
fn mapped(to: SocketAddr) -> SocketAddr {
    let SocketAddr::V4(v4) = to else {
        panic!("{to} is not IPv4");
    };
    (v4.ip().to_ipv6_mapped(), v4.port()).into()
}

fn open_v6(owner: Owner) -> Socket {
    open_for(Domain::IPV6, owner)
}

/// What a client that connects to a mapped address sees: mapped addresses.
fn seen_mapped(seen: Seen) -> Seen {
    let IpAddr::V4(source) = seen.source else {
        panic!("{seen:?} is not IPv4");
    };
    Seen {
        source: source.to_ipv6_mapped().into(),
        peer: mapped(seen.peer),
        ..seen
    }
}

/// As the JVM does everything, also where the pod has no IPv6 at all.
#[test]
fn an_ipv6_socket_to_a_mapped_address_follows_the_rules_of_ipv4() {
    let sides = Sides::new();
    // A port each: a child of another test may have the former socket for a moment longer.
    for (ipv6_disabled, port) in [("0", SOURCE_PORT), ("1", SOURCE_PORT + 1)] {
        for side in [&sides.rules, &sides.enrolled] {
            side.pod
                .sysctl("net.ipv6.conf.all.disable_ipv6", ipv6_disabled);
        }
        let found = sides.ask(|_| {
            [
                call(&open_v6(Owner::APP), mapped(OUTSIDE)),
                call(&open_v6(Owner::PROXY), mapped(OUTSIDE)),
                call(&open_v6(Owner::APP), mapped(OWN)),
                call(
                    &bound_v6(mapped((Node::FIRST_POD, 0).into())),
                    mapped(OUTSIDE),
                ),
                call(
                    &bound_v6((Ipv6Addr::UNSPECIFIED, port).into()),
                    mapped(OUTSIDE),
                ),
            ]
        });
        found.assert_both(
            &[
                Seen::redirected(OUTSIDE),
                Seen::direct(OUTSIDE),
                Seen::inside(OWN),
                Seen::redirected(OUTSIDE),
                Seen::redirected(OUTSIDE),
            ]
            .map(|seen| Ok(seen_mapped(seen))),
        );
    }
}

fn bound_v6(to: SocketAddr) -> Socket {
    let socket = open_v6(Owner::APP);
    socket.set_reuse_address(true).expect("an open socket");
    bind(&socket, to);
    socket
}

/// A socket that is for IPv6 alone has no way to an IPv4 address.
#[test]
fn an_ipv6_only_socket_reaches_no_mapped_address() {
    let sides = Sides::new();
    let found = sides.ask(|_| {
        let socket = open_v6(Owner::APP);
        socket.set_only_v6(true).expect("an open socket");
        connect(&socket, mapped(OUTSIDE))
    });
    found.assert_both(&Err(Errno::ENETUNREACH));
}
