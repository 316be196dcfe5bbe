//! Every way in which a program can use a UDP socket to ask.

use std::{
    io::{ErrorKind, IoSlice, IoSliceMut},
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    os::fd::{AsFd, AsRawFd},
    time::Duration,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        ControlMessage, MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg, recvmsg, sendmmsg,
        sendmsg,
    },
};
use shunt_tests::{
    Owner,
    deadline::DEADLINE,
    dns::{Reply, question},
};
use socket2::{Domain, SockAddr, SockAddrStorage, SockRef, Socket, Type};

use super::{POD, PROXY, RESOLVER, SECOND, STRANGER, World, ipv6, resolvers, same_with_rules};

/// The kind of socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// IPv4, never bound.
    V4,
    /// IPv4, bound to the pod's address.
    V4Bound,
    /// IPv6, which asks IPv4-mapped addresses.
    Mapped,
    /// The same, bound to the pod's address.
    MappedBound,
    /// IPv6, never bound.
    V6,
    /// IPv6, bound to the pod's address.
    V6Bound,
}

impl Kind {
    const ALL: [Self; 6] = [
        Self::V4,
        Self::V4Bound,
        Self::Mapped,
        Self::MappedBound,
        Self::V6,
        Self::V6Bound,
    ];

    fn is_ipv6(self) -> bool {
        matches!(self, Self::V6 | Self::V6Bound)
    }

    /// The address at which sockets of this kind find somebody.
    fn address(self, ip: Ipv4Addr, port: u16) -> SocketAddr {
        let ip = match self {
            Self::V4 | Self::V4Bound => IpAddr::V4(ip),
            Self::Mapped | Self::MappedBound => IpAddr::V6(ip.to_ipv6_mapped()),
            Self::V6 | Self::V6Bound => IpAddr::V6(ipv6(ip).expect("it has one")),
        };
        SocketAddr::new(ip, port)
    }

    fn server(self, ip: Ipv4Addr) -> SocketAddr {
        self.address(ip, 53)
    }

    fn domain(self) -> Domain {
        match self {
            Self::V4 | Self::V4Bound => Domain::IPV4,
            Self::Mapped | Self::MappedBound | Self::V6 | Self::V6Bound => Domain::IPV6,
        }
    }

    fn open(self) -> UdpSocket {
        let socket = Socket::new(self.domain(), Type::DGRAM, None).expect("a new socket");
        socket
            .set_read_timeout(Some(DEADLINE))
            .expect("an open socket");
        if matches!(self, Self::V4Bound | Self::MappedBound | Self::V6Bound) {
            socket
                .bind(&self.address(POD, 0).into())
                .expect("the pod's address");
        }
        socket.into()
    }
}

/// A system call that sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Send {
    To,
    Msg,
    Mmsg,
}

impl Send {
    const ALL: [Self; 3] = [Self::To, Self::Msg, Self::Mmsg];

    /// Asks, and gives the number of the question. A connected socket needs no
    /// server.
    fn ask(self, socket: &UdpSocket, server: Option<SocketAddr>) -> u16 {
        let (id, message) = question();
        let to = server.map(SockaddrStorage::from);
        let fd = socket.as_raw_fd();
        let slices = [IoSlice::new(&message)];
        let flags = MsgFlags::empty();
        let sent = match (self, server) {
            (Self::To, Some(server)) => socket.send_to(&message, server).expect("sendto"),
            (Self::To, None) => socket.send(&message).expect("send"),
            (Self::Msg, _) => sendmsg(fd, &slices, &[], flags, to.as_ref()).expect("sendmsg"),
            (Self::Mmsg, _) => {
                let mut headers = MultiHeaders::preallocate(1, None);
                let none: [ControlMessage<'_>; 0] = [];
                sendmmsg(fd, &mut headers, [&slices], [to], none, flags)
                    .expect("sendmmsg")
                    .map(|sent| sent.bytes)
                    .sum()
            }
        };
        assert_eq!(sent, message.len(), "{self:?}");
        id
    }
}

/// A system call that receives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Receive {
    From,
    Msg,
    Mmsg,
    /// A look at it, before it is taken.
    PeekFirst,
    /// Nobody asks whom it is from.
    Read,
}

impl Receive {
    const ALL: [Self; 5] = [
        Self::From,
        Self::Msg,
        Self::Mmsg,
        Self::PeekFirst,
        Self::Read,
    ];

    fn hear(self, socket: &UdpSocket) -> Heard {
        let mut message = [0; 512];
        let fd = socket.as_raw_fd();
        let (length, from) = match self {
            Self::From => {
                let (length, from) = socket.recv_from(&mut message).expect("recvfrom");
                (length, Some(from))
            }
            Self::PeekFirst => {
                let peeked = socket.peek_from(&mut message).expect("recvfrom");
                let (length, from) = socket.recv_from(&mut message).expect("recvfrom");
                assert_eq!(peeked, (length, from), "peeked, taken");
                (length, Some(from))
            }
            Self::Read => (socket.recv(&mut message).expect("recv"), None),
            Self::Msg => {
                let mut slices = [IoSliceMut::new(&mut message)];
                let heard = recvmsg(fd, &mut slices, None, MsgFlags::empty()).expect("recvmsg");
                (heard.bytes, heard.address.as_ref().map(address_of))
            }
            Self::Mmsg => {
                let mut headers = MultiHeaders::preallocate(1, None);
                let mut slices = [[IoSliceMut::new(&mut message)]];
                let flags = MsgFlags::empty();
                let heard = recvmmsg(fd, &mut headers, &mut slices, flags, None)
                    .expect("recvmmsg")
                    .next()
                    .expect("one message");
                (heard.bytes, heard.address.as_ref().map(address_of))
            }
        };
        let Reply { id, answer } = Reply::parse(&message[..length]);
        Heard { id, answer, from }
    }
}

fn address_of(storage: &SockaddrStorage) -> SocketAddr {
    if let Some(v4) = storage.as_sockaddr_in() {
        SocketAddr::V4((*v4).into())
    } else {
        let v6 = storage
            .as_sockaddr_in6()
            .expect("an address of IPv4 or IPv6");
        SocketAddr::V6((*v6).into())
    }
}

/// Does the same with every kind of socket, in an enrolled pod and in one with
/// rules.
#[track_caller]
fn with_each_kind(look: impl Fn(&World, Kind) + Sync) {
    same_with_rules(&resolvers(), |world| {
        for kind in Kind::ALL {
            world.as_owner(Owner::APP, || look(world, kind));
        }
    });
}

/// An answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Heard {
    id: u16,
    answer: Ipv4Addr,
    /// Whom it seems to come from, where that was asked.
    from: Option<SocketAddr>,
}

/// The servers, and who answers.
const SERVERS: [(Ipv4Addr, Ipv4Addr); 3] =
    [(RESOLVER, PROXY), (SECOND, PROXY), (STRANGER, STRANGER)];

/// Asks every server and hears its answer, by every system call.
fn asks_and_hears(kind: Kind, connect: bool) {
    for send in Send::ALL {
        for receive in Receive::ALL {
            let mut socket = kind.open();
            for (server, answer) in SERVERS {
                let asked = kind.server(server);
                let id = if connect {
                    socket = kind.open();
                    socket.connect(asked).expect("it has a way");
                    assert_eq!(socket.peer_addr().expect("a peer"), asked);
                    send.ask(&socket, None)
                } else {
                    send.ask(&socket, Some(asked))
                };
                let from = (receive != Receive::Read).then_some(asked);
                let expected = Heard { id, answer, from };
                let heard = receive.hear(&socket);
                assert_eq!(heard, expected, "{kind:?} {send:?} {receive:?}");
            }
        }
    }
}

/// One socket for all servers.
#[test]
fn an_answer_comes_from_the_server_that_was_asked() {
    with_each_kind(|_, kind| asks_and_hears(kind, false));
}

/// A socket for each.
#[test]
fn a_connected_socket_has_the_server_that_was_asked_for_its_peer() {
    with_each_kind(|_, kind| asks_and_hears(kind, true));
}

/// Asks the server that a socket is connected to; who answers.
fn ask_peer(socket: &UdpSocket) -> Ipv4Addr {
    let peer = socket.peer_addr().expect("a peer");
    let id = Send::To.ask(socket, None);
    let heard = Receive::From.hear(socket);
    assert_eq!((heard.id, heard.from), (id, Some(peer)));
    heard.answer
}

/// Asks a server with a socket that is not connected; who answers.
fn ask(socket: &UdpSocket, server: SocketAddr) -> Ipv4Addr {
    let id = Send::To.ask(socket, Some(server));
    let heard = Receive::From.hear(socket);
    assert_eq!((heard.id, heard.from), (id, Some(server)));
    heard.answer
}

#[test]
fn a_socket_can_be_connected_to_one_server_after_the_other() {
    with_each_kind(|_, kind| {
        let socket = kind.open();
        for (server, answer) in SERVERS.into_iter().chain(SERVERS) {
            socket.connect(kind.server(server)).expect("it has a way");
            assert_eq!(ask_peer(&socket), answer, "{kind:?}");
            let source = socket.local_addr().expect("it is connected");
            assert_eq!(source.ip(), kind.server(POD).ip());
        }
    });
}

#[test]
fn a_socket_can_go_on_to_a_peer_that_speaks_no_dns() {
    same_with_rules(&resolvers(), |world| {
        for kind in Kind::ALL {
            let address = kind.address(STRANGER, 0);
            let peer = world.node.netns().run(|| UdpSocket::bind(address));
            let peer = peer.expect("a free port");
            peer.set_read_timeout(Some(DEADLINE))
                .expect("an open socket");
            world.as_owner(Owner::APP, || goes_on_to(&peer, kind));
        }
    });
}

fn goes_on_to(peer: &UdpSocket, kind: Kind) {
    let socket = kind.open();
    socket.connect(kind.server(RESOLVER)).expect("it has a way");
    assert_eq!(ask_peer(&socket), PROXY);
    let address = peer.local_addr().expect("it is bound");
    socket.connect(address).expect("it has a way");
    assert_eq!(socket.peer_addr().expect("a peer"), address);
    assert_eq!(socket.send(b"hello").expect("it goes out"), 5);
    let mut heard = [0; 8];
    let (length, from) = peer.recv_from(&mut heard).expect("a datagram");
    let pod = kind.address(POD, from.port());
    assert_eq!((&heard[..length], from), (&b"hello"[..], pod));
    peer.send_to(b"welcome", from).expect("it goes back");
    assert_eq!(socket.recv_from(&mut heard).expect("one"), (7, address));
}

/// An earlier answer that was taken without asking whom it is from, or never
/// came, is no concern of the server that the socket is connected to.
#[test]
fn a_connected_socket_forgets_what_was_asked_before() {
    with_each_kind(|_, kind| {
        let socket = kind.open();
        Send::To.ask(&socket, Some(kind.server(RESOLVER)));
        Receive::Read.hear(&socket);
        socket.connect(kind.server(SECOND)).expect("it has a way");
        assert_eq!(ask_peer(&socket), PROXY);
    });
}

/// connect() to nobody: the socket is as good as new.
fn disconnect(socket: &UdpSocket) {
    let nobody = SockAddrStorage::zeroed();
    let length = size_of::<nix::libc::sa_family_t>();
    let length = length.try_into().expect("two");
    // SAFETY: all of an address of the family AF_UNSPEC, which is zero, is its
    // family.
    let nobody = unsafe { SockAddr::new(nobody, length) };
    SockRef::from(socket)
        .connect(&nobody)
        .expect("always possible");
    assert!(socket.peer_addr().is_err());
}

#[test]
fn a_disconnected_socket_asks_whomever_it_wants() {
    with_each_kind(|_, kind| {
        let socket = kind.open();
        socket.connect(kind.server(RESOLVER)).expect("it has a way");
        assert_eq!(ask_peer(&socket), PROXY);
        disconnect(&socket);
        assert_eq!(ask(&socket, kind.server(RESOLVER)), PROXY);
        if kind.is_ipv6() {
            // The kernel forgets a peer of IPv6 only for sending: the socket
            // goes on to hear nobody else, with and without redirection.
            return;
        }
        assert_eq!(ask(&socket, kind.server(SECOND)), PROXY);
        assert_eq!(ask(&socket, kind.server(STRANGER)), STRANGER);
        socket.connect(kind.server(STRANGER)).expect("it has a way");
        assert_eq!(ask_peer(&socket), STRANGER);
        disconnect(&socket);
        assert_eq!(ask(&socket, kind.server(RESOLVER)), PROXY);
    });
}

/// As the resolver of musl does: one socket asks every server the same, and
/// takes the answers of those that it has asked, in whatever order.
#[test]
fn several_servers_can_be_asked_at_once() {
    with_each_kind(|_, kind| {
        let socket = kind.open();
        socket.set_nonblocking(true).expect("an open socket");
        let (id, message) = question();
        for (server, _) in SERVERS {
            let sent = socket.send_to(&message, kind.server(server));
            assert_eq!(sent.expect("it goes out"), message.len());
        }
        let mut heard = SERVERS.map(|_| {
            await_readable(&socket);
            let heard = Receive::Msg.hear(&socket);
            assert_eq!(heard.id, id);
            (heard.from, heard.answer)
        });
        heard.sort();
        assert_eq!(
            heard,
            SERVERS.map(|(server, answer)| (Some(kind.server(server)), answer))
        );
        let error = socket.recv(&mut [0]).expect_err("all are heard");
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
    });
}

fn await_readable(socket: &UdpSocket) {
    let mut sockets = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    let deadline = PollTimeout::try_from(DEADLINE).expect("it is short");
    assert_eq!(poll(&mut sockets, deadline), Ok(1), "no answer");
}

/// Without redirection there is no way from there, so there is none with it.
/// IPv6 has one.
#[test]
fn a_socket_bound_to_loopback_has_no_way_to_a_resolver() {
    with_each_kind(|_, kind| {
        if kind.is_ipv6() {
            return;
        }
        let socket = Socket::new(kind.domain(), Type::DGRAM, None).expect("a new socket");
        let loopback = kind.address(Ipv4Addr::LOCALHOST, 0);
        socket.bind(&loopback.into()).expect("a free port");
        let resolver = kind.server(RESOLVER).into();
        let (_, message) = question();
        let sent = socket.send_to(&message, &resolver).map(drop);
        for tried in [sent, socket.connect(&resolver)] {
            let error = tried.expect_err("no way");
            assert_eq!(error.raw_os_error(), Some(nix::libc::EINVAL));
        }
    });
}

/// The proxy's server is one like any other to those who ask for it.
#[test]
fn the_proxy_can_be_asked_at_its_own_address() {
    with_each_kind(|_, kind| {
        let proxy = kind.address(Ipv4Addr::LOCALHOST, 15053);
        assert_eq!(ask(&kind.open(), proxy), PROXY);
        let socket = kind.open();
        socket.connect(proxy).expect("it has a way");
        assert_eq!(ask_peer(&socket), PROXY);
    });
}

/// The error of a read that gets nothing. One with a time limit is not begun again by the kernel
/// after a signal, which was meant for another test.
fn how_it_ends(socket: &UdpSocket) -> ErrorKind {
    loop {
        let error = socket.recv(&mut [0]).expect_err("nobody answers").kind();
        if error != ErrorKind::Interrupted {
            return error;
        }
    }
}

/// A server that did not answer is given up for another one: the answer is that
/// one's.
#[test]
fn a_retry_is_answered_by_the_server_that_it_asks() {
    let capture = resolvers();
    for world in [
        World::new(&capture).with_rules(&capture),
        World::new(&capture).enrolled(&capture),
    ] {
        let unanswered = Kind::ALL.map(|kind| {
            world.as_owner(Owner::APP, || {
                let socket = kind.open();
                Send::To.ask(&socket, Some(kind.server(RESOLVER)));
                socket
            })
        });
        // What resolvers wait for an answer at the least.
        let [first, ..] = &unanswered;
        first
            .set_read_timeout(Some(Duration::from_secs(1)))
            .expect("an open socket");
        assert_eq!(how_it_ends(first), ErrorKind::WouldBlock);
        first
            .set_read_timeout(Some(DEADLINE))
            .expect("an open socket");
        let world = world.with_proxy();
        for (socket, kind) in unanswered.iter().zip(Kind::ALL) {
            let answer = world.as_owner(Owner::APP, || ask(socket, kind.server(SECOND)));
            assert_eq!(answer, PROXY, "{kind:?}");
        }
    }
}
