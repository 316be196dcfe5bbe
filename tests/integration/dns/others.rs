//! What is neither TCP nor DNS goes its own way.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr as UnixAddr, UnixDatagram, UnixListener, UnixStream},
    },
};

use shunt_tests::{Owner, command::output_of, deadline::DEADLINE, dns::Capture};
use socket2::{Domain, Protocol, Socket, Type};

use super::{POD, RESOLVER, STRANGER, World, resolvers, same_with_rules};

/// As much as can be captured.
fn everything() -> Capture {
    Capture {
        all: true,
        ..resolvers()
    }
}

/// A datagram there, and one back.
fn exchange(client: &UdpSocket, server: &UdpSocket, connected: bool) {
    let address = server.local_addr().expect("it is bound");
    if connected {
        client.connect(address).expect("it has a way");
        assert_eq!(client.peer_addr().expect("a peer"), address);
        client.send(b"there").expect("it goes out");
    } else {
        client.send_to(b"there", address).expect("it goes out");
    }
    let mut heard = [0; 8];
    let (length, from) = server.recv_from(&mut heard).expect("a datagram");
    assert_eq!((&heard[..length], from.ip()), (&b"there"[..], POD.into()));
    server.send_to(b"back", from).expect("it goes out");
    assert_eq!(client.recv_from(&mut heard).expect("one"), (4, address));
}

/// Ports that a rule for TCP speaks of, those of DNS's relatives and of QUIC.
#[test]
fn udp_to_other_ports_is_left_alone() {
    same_with_rules(&everything(), |world| {
        for port in [52, 54, 80, 443, 853, 5353, 15001, 15006, 15008, 15053] {
            for ip in [RESOLVER, STRANGER] {
                let server = world.node.netns().run(|| UdpSocket::bind((ip, port)));
                let server = server.expect("a free port");
                server
                    .set_read_timeout(Some(DEADLINE))
                    .expect("an open socket");
                for connected in [false, true] {
                    let client = world.as_owner(Owner::APP, || {
                        Socket::new(Domain::IPV4, Type::DGRAM, None).expect("a new socket")
                    });
                    client
                        .set_read_timeout(Some(DEADLINE))
                        .expect("an open socket");
                    exchange(&client.into(), &server, connected);
                }
            }
        }
    });
}

/// What comes in is none of the rules' business, whatever the port.
#[test]
fn udp_from_outside_is_left_alone() {
    same_with_rules(&everything(), |world| {
        for port in [80, 5353, 15001] {
            let server = world.pod.netns().run(|| UdpSocket::bind((POD, port)));
            let server = server.expect("a free port");
            server
                .set_read_timeout(Some(DEADLINE))
                .expect("an open socket");
            let client = world.node.netns().run(|| UdpSocket::bind((STRANGER, 0)));
            let client = client.expect("a free port");
            client
                .set_read_timeout(Some(DEADLINE))
                .expect("an open socket");
            client.send_to(b"there", (POD, port)).expect("it goes out");
            let mut heard = [0; 8];
            let (length, from) = server.recv_from(&mut heard).expect("a datagram");
            assert_eq!((length, from), (5, client.local_addr().expect("bound")));
            server.send_to(b"back", from).expect("it goes out");
            let address = SocketAddr::from((POD, port));
            assert_eq!(client.recv_from(&mut heard).expect("one"), (4, address));
        }
    });
}

/// An echo of the kernel's at `ip`, asked for with an application's socket.
fn ping(world: &World, ip: Ipv4Addr, connected: bool) {
    let socket = world.as_owner(Owner::APP, || {
        Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::ICMPV4)).expect("a ping socket")
    });
    socket
        .set_read_timeout(Some(DEADLINE))
        .expect("an open socket");
    let socket = UdpSocket::from(socket);
    // Type 8, an echo; the kernel fills in what is zero.
    let echo = [8, 0, 0, 0, 0, 0, 0, 1, b'!'];
    if connected {
        socket.connect((ip, 0)).expect("it has a way");
        socket.send(&echo).expect("it goes out");
    } else {
        socket.send_to(&echo, (ip, 0)).expect("it goes out");
    }
    let mut heard = [0; 32];
    let (length, from) = socket.recv_from(&mut heard).expect("a reply");
    assert_eq!(
        (heard[0], &heard[6..length], from.ip()),
        (0, &b"\0\x01!"[..], ip.into())
    );
}

#[test]
fn pings_are_left_alone() {
    same_with_rules(&everything(), |world| {
        world.pod.sysctl("net.ipv4.ping_group_range", "0 2000");
        for ip in [RESOLVER, STRANGER, POD, Ipv4Addr::LOCALHOST] {
            for connected in [false, true] {
                ping(world, ip, connected);
            }
            // With a raw socket.
            let mut command = world.pod.netns().command("busybox", Owner::ROOT);
            let output = output_of(command.args(["ping", "-c", "1", &ip.to_string()]));
            assert!(output.contains(" 0% packet loss"), "{output}");
        }
    });
}

#[test]
fn unix_sockets_are_left_alone() {
    same_with_rules(&everything(), |world| {
        world.as_owner(Owner::APP, || {
            let name = |name: &str| UnixAddr::from_abstract_name(name).expect("a short name");
            let listener = UnixListener::bind_addr(&name("stream")).expect("a free name");
            let mut client = UnixStream::connect_addr(&name("stream")).expect("it listens");
            let (mut server, _) = listener.accept().expect("a connection");
            client.write_all(b"there").expect("it is connected");
            let mut heard = [0; 5];
            server.read_exact(&mut heard).expect("it is connected");
            assert_eq!(&heard, b"there");
            let peer = client.peer_addr().expect("a peer");
            assert_eq!(peer.as_abstract_name(), Some(&b"stream"[..]));

            let server = UnixDatagram::bind_addr(&name("datagram")).expect("a free name");
            let client = UnixDatagram::unbound().expect("a new socket");
            client
                .send_to_addr(b"there", &name("datagram"))
                .expect("it goes out");
            assert_eq!(server.recv(&mut heard).expect("a datagram"), 5);
        });
    });
}
