//! Where a question goes: by who asks, whom, and over which protocol.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
};

use shunt_tests::{
    Greeting, Owner,
    deadline::DEADLINE,
    dns::{Capture, Reply, question},
};
use socket2::{Domain, Socket, Type};

use super::{
    LOCAL, POD, RESOLVER, SECOND, STRANGER, World, addresses, resolvers, same_with_rules, who,
};

const OWNERS: [Owner; 5] = [
    Owner::APP,
    Owner::ROOT,
    Owner::PROXY,
    Owner::PROXY_UID,
    Owner::PROXY_GID,
];

/// A way to ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Tcp,
    /// A connected UDP socket.
    Connected,
    /// Another UDP socket.
    Unconnected,
}

/// Who answers: an address, `15053` or `pod:15001`, `pod:15006`, or the error.
fn ask(way: Way, server: impl Into<IpAddr>) -> String {
    let server = SocketAddr::new(server.into(), 53);
    let answer = match way {
        Way::Tcp => ask_tcp(server),
        Way::Connected => ask_connected(server),
        Way::Unconnected => ask_unconnected(server),
    };
    answer.unwrap_or_else(|error| error.kind().to_string())
}

fn ask_tcp(server: SocketAddr) -> io::Result<String> {
    let mut stream = TcpStream::connect(server)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    assert_eq!(stream.peer_addr()?, server);
    let (id, message) = question();
    let length = u16::try_from(message.len()).expect("a question is short");
    stream.write_all(&[&length.to_be_bytes(), &message[..]].concat())?;
    let mut heard = vec![0; 2];
    stream.read_exact(&mut heard)?;
    if heard[0] == b'{' {
        // No answer is that long: this is a responder.
        while !heard.ends_with(b"\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            heard.extend(byte);
        }
        let greeting: Greeting = serde_json::from_slice(&heard).expect("a greeting");
        assert_eq!(greeting.destination(), server);
        return Ok(format!("{}:{}", greeting.place, greeting.listener));
    }
    let mut message = vec![0; u16::from_be_bytes([heard[0], heard[1]]).into()];
    stream.read_exact(&mut message)?;
    let reply = Reply::parse(&message);
    assert_eq!(reply.id, id);
    Ok(who(reply.answer))
}

fn socket(server: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(server), Type::DGRAM, None)?;
    socket.set_read_timeout(Some(DEADLINE))?;
    Ok(socket.into())
}

fn ask_connected(server: SocketAddr) -> io::Result<String> {
    let socket = socket(server)?;
    socket.connect(server)?;
    let (id, message) = question();
    socket.send(&message)?;
    assert_eq!(socket.peer_addr()?, server);
    hear(&socket, id, server)
}

fn ask_unconnected(server: SocketAddr) -> io::Result<String> {
    let socket = socket(server)?;
    let (id, message) = question();
    socket.send_to(&message, server)?;
    hear(&socket, id, server)
}

fn hear(socket: &UdpSocket, id: u16, server: SocketAddr) -> io::Result<String> {
    let mut message = [0; 512];
    let (length, from) = socket.recv_from(&mut message)?;
    assert_eq!(from, server);
    let reply = Reply::parse(&message[..length]);
    assert_eq!(reply.id, id);
    Ok(who(reply.answer))
}

/// Who answers whom, for every owner, server and way.
struct Table(Vec<Row>);

/// Who asks whom how, and who answers.
type Row = (Owner, IpAddr, Way, String);

impl Table {
    fn with(capture: &Capture) -> Self {
        Self(same_with_rules(capture, |world| {
            OWNERS
                .iter()
                .flat_map(|&owner| rows(world, owner))
                .collect()
        }))
    }

    #[track_caller]
    fn is(&self, owner: Owner, servers: &[Ipv4Addr], ways: &[Way], expected: &str) {
        for &server in servers {
            for ip in addresses(server) {
                for &way in ways {
                    let wanted = |row: &&Row| (row.0, row.1, row.2) == (owner, ip, way);
                    let answer = &self.0.iter().find(wanted).expect("it was asked").3;
                    let expected = match expected {
                        "direct" => &server.to_string(),
                        _ => expected,
                    };
                    assert_eq!(answer, expected, "{owner} asks {ip}, {way:?}");
                }
            }
        }
    }
}

fn rows(world: &World, owner: Owner) -> Vec<Row> {
    world.as_owner(owner, || {
        let servers = EVERY_SERVER.into_iter().flat_map(addresses);
        servers
            .flat_map(|server| BOTH.map(|way| (owner, server, way, ask(way, server))))
            .collect()
    })
}

const UDP: [Way; 2] = [Way::Connected, Way::Unconnected];
const BOTH: [Way; 3] = [Way::Tcp, Way::Connected, Way::Unconnected];
const LOCALHOST: Ipv4Addr = LOCAL[1];
const LOCALHOST_2: Ipv4Addr = LOCAL[2];
const EVERY_SERVER: [Ipv4Addr; 6] = [RESOLVER, SECOND, STRANGER, POD, LOCALHOST, LOCALHOST_2];

#[test]
fn what_goes_to_the_resolvers_is_captured() {
    let table = Table::with(&resolvers());
    for app in [Owner::APP, Owner::ROOT] {
        table.is(app, &[RESOLVER, SECOND], &BOTH, "15053");
        table.is(app, &[STRANGER], &[Way::Tcp], "pod:15001");
        table.is(app, &[STRANGER], &UDP, "direct");
        table.is(app, &[POD, LOCALHOST_2], &[Way::Tcp], "pod:15001");
        table.is(app, &[POD, LOCALHOST_2], &UDP, "direct");
        table.is(app, &[LOCALHOST], &BOTH, "direct");
    }
    for proxy in [Owner::PROXY, Owner::PROXY_UID, Owner::PROXY_GID] {
        table.is(proxy, &EVERY_SERVER, &UDP, "direct");
        table.is(proxy, &[RESOLVER, SECOND, STRANGER], &[Way::Tcp], "direct");
        table.is(proxy, &[LOCALHOST], &[Way::Tcp], "direct");
    }
    // What a uid is spared a gid is not.
    table.is(Owner::PROXY_GID, &[POD], &[Way::Tcp], "pod:15006");
}

#[test]
fn capture_of_all_dns_is_about_every_server() {
    let capture = Capture {
        all: true,
        ..resolvers()
    };
    let table = Table::with(&capture);
    for app in [Owner::APP, Owner::ROOT] {
        table.is(app, &EVERY_SERVER, &BOTH, "15053");
    }
    for proxy in [Owner::PROXY, Owner::PROXY_UID, Owner::PROXY_GID] {
        table.is(proxy, &EVERY_SERVER, &UDP, "direct");
    }
}

#[test]
fn a_resolver_may_be_the_pods_own() {
    let capture = Capture {
        resolvers: [LOCALHOST_2, POD].map(addresses).concat(),
        ..Capture::default()
    };
    let table = Table::with(&capture);
    table.is(Owner::APP, &[LOCALHOST_2, POD], &BOTH, "15053");
    table.is(Owner::APP, &[RESOLVER], &UDP, "direct");
    table.is(Owner::PROXY, &EVERY_SERVER, &UDP, "direct");
}

#[test]
fn an_excluded_port_53_is_left_alone() {
    for all in [false, true] {
        let capture = Capture {
            all,
            excluded_ports: vec![53],
            ..resolvers()
        };
        let table = Table::with(&capture);
        for owner in OWNERS {
            table.is(owner, &EVERY_SERVER, &BOTH, "direct");
        }
    }
}

/// With rules the proxy's absence does not show on UDP: the kernel's message is
/// tracked in another zone than the question. A question never gets past.
#[test]
fn without_a_proxy_no_question_gets_past() {
    let capture = resolvers();
    let ruled = World::new(&capture).with_rules(&capture);
    let enrolled = World::new(&capture).enrolled(&capture);
    for (world, refusals) in [
        (ruled, [Way::Tcp].as_slice()),
        (enrolled, &[Way::Tcp, Way::Connected]),
    ] {
        for ip in addresses(RESOLVER) {
            for &way in refusals {
                let answer = world.as_owner(Owner::APP, || ask(way, ip));
                assert_eq!(answer, "connection refused");
            }
            let sockets = world.as_owner(Owner::APP, || {
                let server = SocketAddr::new(ip, 53);
                let (unconnected, connected) = (socket(server), socket(server));
                let (unconnected, connected) = (unconnected.expect("new"), connected.expect("new"));
                connected.connect(server).expect("it has a way");
                let (_, message) = question();
                unconnected.send_to(&message, server).expect("it goes out");
                connected.send(&message).expect("it goes out");
                [unconnected, connected]
            });
            // A question that gets past is there before this one.
            let answer = world.as_owner(Owner::PROXY, || ask(Way::Unconnected, ip));
            assert_eq!(answer, RESOLVER.to_string());
            drop(sockets);
        }
        assert_eq!(world.asked_past_the_proxy(), addresses(RESOLVER).len());
        let world = world.with_proxy();
        let answer = world.as_owner(Owner::APP, || ask(Way::Connected, RESOLVER));
        assert_eq!(answer, "15053");
    }
}
