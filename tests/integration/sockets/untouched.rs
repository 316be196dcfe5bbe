//! What is not TCP goes its own way.

use std::{
    io::{Read, Write},
    net::{SocketAddr, UdpSocket},
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr as UnixAddr, UnixListener, UnixStream},
    },
};

use nix::errno::Errno;
use shunt_tests::{Node, Owner, deadline::DEADLINE, leftovers::unique_name};
use socket2::{Domain, Protocol, Socket, Type};

use super::{Redirection, Side, Sides, errno};

/// The ports of the proxy, of DNS, and of nobody in particular.
const PORTS: [u16; 4] = [15001, 15006, 53, 80];

fn udp(to: impl Into<SocketAddr>) -> UdpSocket {
    let socket = UdpSocket::bind(to.into()).expect("a free port");
    socket
        .set_read_timeout(Some(DEADLINE))
        .expect("an open socket");
    socket
}

/// Sends from `client` to `server`, by send() when it is connected and by
/// sendto() when not, and back.
fn exchange(client: &UdpSocket, server: &UdpSocket, connected: bool) -> [SocketAddr; 2] {
    let to = server.local_addr().expect("it is bound");
    let sent = if connected {
        client.connect(to).expect("any address will do");
        client.send(b"question")
    } else {
        client.send_to(b"question", to)
    };
    assert_eq!(errno(sent), Ok(8));
    let mut buffer = [0; 16];
    let (read, source) = server.recv_from(&mut buffer).expect("the question");
    assert_eq!(&buffer[..read], b"question");
    server.send_to(b"answer", source).expect("the client waits");
    let (read, answered) = client.recv_from(&mut buffer).expect("the answer");
    assert_eq!(&buffer[..read], b"answer");
    [source, answered]
}

/// Also from outside to a port that is the proxy's for TCP.
#[test]
fn udp_is_untouched() {
    let sides = Sides::new();
    for side in [&sides.rules, &sides.enrolled] {
        for port in PORTS {
            let outside = side.node.netns().run(|| udp((Node::OUTSIDE, port)));
            let inside = side.pod.netns().run(|| udp((Node::FIRST_POD, port)));
            for connected in [false, true] {
                let client = side.pod.netns().run(|| udp((Node::FIRST_POD, 0)));
                let own = client.local_addr().expect("it is bound");
                let seen = exchange(&client, &outside, connected);
                assert_eq!(seen, [own, (Node::OUTSIDE, port).into()]);

                let client = side.node.netns().run(|| udp((Node::OUTSIDE, 0)));
                let own = client.local_addr().expect("it is bound");
                let seen = exchange(&client, &inside, connected);
                assert_eq!(seen, [own, (Node::FIRST_POD, port).into()]);
            }
        }
    }
}

/// A UDP socket that is connected anew, and to nobody in between.
#[test]
fn a_udp_socket_can_be_connected_anew() {
    let sides = Sides::new();
    for side in [&sides.rules, &sides.enrolled] {
        let servers = side
            .node
            .netns()
            .run(|| [udp((Node::OUTSIDE, 80)), udp((Node::FAR_OUTSIDE, 15001))]);
        let client = side.pod.netns().run(|| udp((Node::FIRST_POD, 0)));
        for server in &servers {
            let to = server.local_addr().expect("it is bound");
            assert_eq!(exchange(&client, server, true)[1], to);
            assert_eq!(errno(client.peer_addr()), Ok(to));
            let socket = Socket::from(client.try_clone().expect("one more descriptor"));
            errno(shunt_tests::syscall::disconnect(&socket)).expect("it is connected");
            assert_eq!(errno(client.peer_addr()), Err(Errno::ENOTCONN));
            assert_eq!(exchange(&client, server, false)[1], to);
        }
    }
}

/// An echo request by a ping socket, which may also be connected.
#[test]
fn icmp_is_untouched() {
    /// `icmp_echo`: type, code, checksum and id from the kernel, sequence.
    const REQUEST: [u8; 8] = [8, 0, 0, 0, 0, 0, 0, 1];
    let sides = Sides::new();
    let found = sides.ask(|side| {
        side.pod.sysctl("net.ipv4.ping_group_range", "0 0");
        [false, true].map(|connected| {
            let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::ICMPV4));
            let socket = super::patient(socket.expect("root may ping"));
            let to = SocketAddr::from((Node::OUTSIDE, 0));
            if connected {
                socket.connect(&to.into()).expect("any address will do");
            }
            socket
                .send_to(&REQUEST, &to.into())
                .expect("there is a route");
            let mut reply = [0; 8];
            let read = (&socket).read(&mut reply).expect("a reply");
            (read, reply[0], reply[7])
        })
    });
    // Of type 0, the echo reply.
    found.assert_both(&[(8, 0, 1); 2]);
}

/// This kernel has no SCTP; where one has, it is as untouched as UDP.
#[test]
fn sctp_is_as_the_kernel_has_it() {
    let work = |_: &Side| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::SCTP));
        errno(socket).map(drop)
    };
    let plain = Side::new(|_| Redirection::Rules);
    let expected = plain.pod.netns().run(|| work(&plain));
    Sides::new().ask(work).assert_both(&expected);
}

#[test]
fn unix_sockets_are_untouched() {
    let sides = Sides::new();
    let found = sides.ask(|_| {
        Owner::APP.assume();
        let name = UnixAddr::from_abstract_name(unique_name("unix")).expect("a short name");
        let listener = UnixListener::bind_addr(&name).expect("a new name");
        let mut client = UnixStream::connect_addr(&name).expect("it listens");
        let (mut server, _) = listener.accept().expect("a client has connected");
        let peer = client.peer_addr().expect("it is connected");
        client.write_all(b"hello").expect("it is connected");
        let mut heard = [0; 5];
        server.read_exact(&mut heard).expect("it is connected");
        (heard, peer.as_abstract_name() == name.as_abstract_name())
    });
    found.assert_both(&(*b"hello", true));
}
