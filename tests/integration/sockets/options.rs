//! getsockopt() and the names of both ends, on sockets of all kinds.

use std::{
    net::{Ipv4Addr, Shutdown, SocketAddr},
    os::fd::AsFd,
};

use nix::{errno::Errno, libc};
use shunt_tests::{
    Node, Owner,
    deadline::wait_until,
    syscall::{OptionAnswer, UNTOUCHED, option},
};
use socket2::Socket;

use super::{OUTSIDE, OWN, Redirection, Seen, Side, Sides, address, call, connect, errno, open};

/// `SO_ORIGINAL_DST`, which is `IP6T_SO_ORIGINAL_DST` on the level of IPv6.
const SO_ORIGINAL_DST: i32 = 80;

/// A listener of the pod that is not a responder: the test accepts.
fn listen(owner: Owner, port: u16, backlog: i32) -> Socket {
    let listener = open(owner);
    listener.set_reuse_address(true).expect("an open socket");
    let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
    listener.bind(&any.into()).expect("a free port");
    listener.listen(backlog).expect("a bound socket");
    listener
}

/// The two ends of a connection.
struct Ends {
    client: Socket,
    server: Socket,
}

impl Ends {
    /// One that the proxy has taken.
    fn redirected() -> Self {
        let listener = listen(Owner::PROXY, 15001, 8);
        let client = open(Owner::APP);
        connect(&client, OUTSIDE).expect("the proxy listens");
        let (server, _) = listener.accept().expect("a client has connected");
        Self { client, server }
    }

    /// One that goes to the application directly.
    fn direct() -> Self {
        let listener = listen(Owner::APP, OWN.port() + 1, 8);
        let client = open(Owner::APP);
        connect(&client, (Node::FIRST_POD, OWN.port() + 1).into()).expect("it listens");
        let (server, _) = listener.accept().expect("a client has connected");
        Self { client, server }
    }
}

/// `struct sockaddr_in` of an address.
fn sockaddr(of: SocketAddr) -> Vec<u8> {
    let SocketAddr::V4(v4) = of else {
        panic!("{of} is not IPv4");
    };
    let family = u16::try_from(libc::AF_INET).expect("a family is small");
    let mut bytes = family.to_ne_bytes().to_vec();
    bytes.extend(v4.port().to_be_bytes());
    bytes.extend(v4.ip().octets());
    bytes.extend([0; 8]);
    bytes
}

/// An answer into a buffer of this length, which stays as it is behind the
/// address.
fn answered(address: SocketAddr, length: u32) -> OptionAnswer {
    let mut buffer = sockaddr(address);
    buffer.resize(length as usize, UNTOUCHED);
    OptionAnswer {
        result: Ok(()),
        length,
        buffer,
    }
}

fn refused(errno: Errno, length: u32) -> OptionAnswer {
    OptionAnswer {
        result: Err(errno),
        length,
        buffer: vec![UNTOUCHED; length as usize],
    }
}

/// A caller's buffer may be larger than an address, and keeps its length. What
/// is behind the address is the caller's own with rules; a program's answer
/// comes as a copy of all of the buffer, with zeros there. Of a buffer of more
/// than a page a program has the first page only, and tells the length of its
/// answer.
#[test]
fn the_original_destination_is_told_into_any_buffer_that_holds_it() {
    const LENGTHS: [u32; 8] = [0, 8, 15, 16, 28, 128, 4096, 8192];
    let sides = Sides::without_proxy();
    let found = sides.ask(|_| {
        let ends = Ends::redirected();
        LENGTHS.map(|length| {
            let length = length as usize;
            let mut answer = option(&ends.server, libc::SOL_IP, SO_ORIGINAL_DST, length);
            answer.buffer.truncate(16);
            (answer.result, answer.length, answer.buffer)
        })
    });
    let too_small = |length| (Err(Errno::EINVAL), length, vec![UNTOUCHED; length as usize]);
    let told = |length| (Ok(()), length, sockaddr(OUTSIDE));
    let expected = LENGTHS.map(|length| match length {
        0..16 => too_small(length),
        _ => told(length),
    });
    let mut enrolled = expected.clone();
    enrolled[7] = told(16);
    found.assert_each(&expected, &enrolled);
}

/// IPv6's own option has no answer on an IPv4 socket.
#[test]
fn the_original_destination_of_the_other_family_is_not_told() {
    let sides = Sides::without_proxy();
    let found = sides.ask(|_| {
        let ends = Ends::redirected();
        option(&ends.server, libc::SOL_IPV6, SO_ORIGINAL_DST, 28)
    });
    found.assert_both(&refused(Errno::EOPNOTSUPP, 28));
}

/// Connection tracking knows every connection of a pod with rules, redirected
/// or not and from both ends. Without, the kernel knows none, which is its
/// answer in a pod that was never enrolled; proxies take that as "not
/// redirected".
#[test]
fn a_socket_that_was_not_redirected_gets_the_kernels_own_answer() {
    let ask = |socket: &Socket| option(socket, libc::SOL_IP, SO_ORIGINAL_DST, 16);
    let to = SocketAddr::from((Node::FIRST_POD, OWN.port() + 1));
    let work = |_: &Side| {
        let (direct, redirected) = (Ends::direct(), Ends::redirected());
        let unconnected = open(Owner::APP);
        [
            ask(&direct.server),
            ask(&direct.client),
            ask(&redirected.client),
            ask(&unconnected),
        ]
    };
    let none = refused(Errno::ENOENT, 16);
    Sides::without_proxy().ask(work).assert_each(
        &[
            answered(to, 16),
            answered(to, 16),
            answered(OUTSIDE, 16),
            none.clone(),
        ],
        &[(); 4].map(|()| none.clone()),
    );

    let plain = Side::new(|_| Redirection::Rules);
    let direct = plain.pod.netns().run(|| ask(&Ends::direct().server));
    assert_eq!(direct, none, "in a pod that nobody has touched");
}

/// The socket of a connection that is over still has the answer, as long as the
/// proxy has it open.
#[test]
fn a_client_that_is_gone_before_it_is_accepted_leaves_its_destination() {
    let sides = Sides::without_proxy();
    let found = sides.ask(|_| {
        let listener = listen(Owner::PROXY, 15001, 8);
        [None, Some(std::time::Duration::ZERO)].map(|linger| {
            let client = open(Owner::APP);
            connect(&client, OUTSIDE).expect("the proxy listens");
            let source = address(client.local_addr());
            // With no time to linger it is reset.
            client.set_linger(linger).expect("an open socket");
            drop(client);
            let (server, peer) = listener.accept().expect("a client has connected");
            let original = option(&server, libc::SOL_IP, SO_ORIGINAL_DST, 16);
            (peer.as_socket() == source.ok(), original)
        })
    });
    // Of a client that has reset its connection accept() tells no address that
    // is worth comparing; but it tells the destination.
    found.assert_both(&[(true, answered(OUTSIDE, 16)), (true, answered(OUTSIDE, 16))]);
}

/// Options that programs ask for, with what they answer on every socket alike.
const OPTIONS: [(i32, i32, usize); 22] = [
    (libc::SOL_SOCKET, libc::SO_TYPE, 4),
    (libc::SOL_SOCKET, libc::SO_PROTOCOL, 4),
    (libc::SOL_SOCKET, libc::SO_DOMAIN, 4),
    (libc::SOL_SOCKET, libc::SO_ERROR, 4),
    (libc::SOL_SOCKET, libc::SO_ACCEPTCONN, 4),
    (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 4),
    (libc::SOL_SOCKET, libc::SO_LINGER, 8),
    (libc::SOL_SOCKET, libc::SO_MARK, 4),
    (libc::SOL_SOCKET, libc::SO_PRIORITY, 4),
    (libc::SOL_SOCKET, libc::SO_REUSEADDR, 4),
    (libc::SOL_SOCKET, libc::SO_REUSEPORT, 4),
    (libc::SOL_SOCKET, libc::SO_BINDTODEVICE, 16),
    (libc::SOL_SOCKET, libc::SO_RCVTIMEO, 16),
    (libc::SOL_IP, libc::IP_TOS, 4),
    (libc::SOL_IP, libc::IP_TTL, 4),
    (libc::SOL_IP, libc::IP_TRANSPARENT, 4),
    (libc::SOL_IP, libc::IP_FREEBIND, 4),
    (libc::SOL_IP, libc::IP_BIND_ADDRESS_NO_PORT, 4),
    (libc::IPPROTO_TCP, libc::TCP_NODELAY, 4),
    (libc::IPPROTO_TCP, libc::TCP_CONGESTION, 16),
    // No such option, and a buffer without room.
    (libc::SOL_IP, 9999, 4),
    (libc::SOL_SOCKET, libc::SO_TYPE, 0),
];

/// In particular IP_BIND_ADDRESS_NO_PORT, TRANSPARENT and the like: redirection
/// leaves no trace in a socket.
#[test]
fn other_options_are_what_they_are_without_redirection() {
    let sides = Sides::without_proxy();
    let found = sides.ask(|_| {
        let ends = Ends::redirected();
        let unconnected = open(Owner::APP);
        [&ends.client, &ends.server, &unconnected]
            .map(|socket| OPTIONS.map(|(level, name, length)| option(socket, level, name, length)))
    });
    assert!(found.rules[0][0].result.is_ok(), "SO_TYPE is answered");
    let expected = found.rules.clone();
    found.assert_both(&expected);
}

/// What is longer than a page, of which a program sees the first only: the
/// members of a group, here as a filter of a socket.
#[test]
fn an_answer_of_more_than_a_page_arrives_whole() {
    let sides = Sides::without_proxy();
    let found = sides.ask(|side| {
        let members = members_of_many_groups(side);
        let ends = Ends::redirected();
        // No option of TCP is that long; the caller's buffer may be.
        let long = option(
            &ends.server,
            libc::IPPROTO_TCP,
            libc::TCP_CONGESTION,
            10_000,
        );
        (members, (long.result, long.length, long.buffer))
    });
    let (length, buffer) = (&found.rules.0.length, &found.rules.0.buffer);
    assert_eq!((*length as usize, buffer.len()), (GROUPS * 4, GROUPS * 4));
    let expected = found.rules.clone();
    found.assert_both(&expected);
    let groups: Vec<u8> = (0..GROUPS).flat_map(|n| group(n).to_ne_bytes()).collect();
    assert_eq!(expected.0.buffer, groups);
}

const GROUPS: usize = 3000;

fn group(n: usize) -> u32 {
    100_000 + u32::try_from(n).expect("few")
}

/// SO_PEERGROUPS of a Unix socket whose peer is in many groups.
fn members_of_many_groups(_: &Side) -> OptionAnswer {
    let groups: Vec<u32> = (0..GROUPS).map(group).collect();
    shunt_tests::syscall::set_groups(&groups);
    let (one, _other) = std::os::unix::net::UnixStream::pair().expect("two sockets");
    option(
        one.as_fd(),
        libc::SOL_SOCKET,
        libc::SO_PEERGROUPS,
        GROUPS * 4,
    )
}

#[test]
fn a_socket_without_a_peer_has_no_peers_name() {
    let sides = Sides::new();
    let found = sides.ask(|_| {
        let socket = open(Owner::APP);
        let never = address(socket.peer_addr());
        let listener = listen(Owner::APP, 18000, 1);
        (never, address(listener.peer_addr()))
    });
    found.assert_both(&(Err(Errno::ENOTCONN), Err(Errno::ENOTCONN)));
}

/// Half closed it still has its peer; closed by both ends it has none.
#[test]
fn a_socket_that_was_shut_down_has_its_peers_name_as_long_as_it_has_a_peer() {
    let sides = Sides::without_proxy();
    let found = sides.ask(|_| {
        let Ends { client, server } = Ends::redirected();
        client.shutdown(Shutdown::Write).expect("it is connected");
        let half = address(client.peer_addr());
        errno(client.shutdown(Shutdown::Read)).expect("it is connected");
        let whole = address(client.peer_addr());
        drop(server);
        wait_until("the server's FIN", || match address(client.peer_addr()) {
            Ok(peer) => Err(peer.to_string()),
            Err(_) => Ok(()),
        });
        let end = std::io::Read::read(&mut &client, &mut [0]).expect("the end of the stream");
        (half, whole, end, address(client.peer_addr()))
    });
    found.assert_both(&(Ok(OUTSIDE), Ok(OUTSIDE), 0, Err(Errno::ENOTCONN)));
}

#[test]
fn the_proxys_side_is_named_as_with_rules() {
    let sides = Sides::without_proxy();
    let found = sides.ask(|_| {
        let Ends { client, server } = Ends::redirected();
        let [local, peer] = [server.local_addr(), server.peer_addr()].map(address);
        (
            local.map(|addr| addr.port()),
            peer == address(client.local_addr()),
        )
    });
    found.assert_both(&(Ok(15001), true));
    let calls = Sides::new().ask(|_| call(&open(Owner::APP), OUTSIDE));
    calls.assert_both(&Ok(Seen::redirected(OUTSIDE)));
}
