//! Ports of the application at which the proxy holds connections: what somebody calls
//! from outside is steered, so the proxy's sockets have the port that was called.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::atomic::{AtomicU16, Ordering},
};

use nix::errno::Errno;
use shunt_tests::{
    Agent, Greeting, Node, Owner,
    agent::{self, Place},
    deadline::wait_until,
};
use socket2::{Domain, Socket};

use super::{OUTSIDE, RULES, Side, Sides, errno, open, open_for};

/// A port of the application, for one use: a program that another test starts has every
/// file of this process between fork() and exec(), and so keeps the port of a socket that
/// was closed.
fn port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(8080);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Where the proxy is called for it.
const INBOUND: u16 = 15006;

/// A connection from outside to the application's port, that the proxy holds.
fn held_by_proxy(side: &Side, port: u16) -> Socket {
    let called = SocketAddr::new(Node::FIRST_POD, port);
    let client = side.node.netns().run(|| {
        let client = open(Owner::ROOT);
        client.connect(&called.into()).expect("the proxy listens");
        client
    });
    assert_eq!(Greeting::read(&client).listener, INBOUND);
    client
}

/// What an application asks for before it binds a listener.
type Wish = fn(&Socket);

const NOTHING: Wish = |_| {};
const REUSE_ADDRESS: Wish = |socket| socket.set_reuse_address(true).expect("an open socket");
const REUSE_PORT: Wish = |socket| socket.set_reuse_port(true).expect("an open socket");

fn bound(address: impl Into<IpAddr>, port: u16, wish: Wish) -> Result<Socket, Errno> {
    let address = SocketAddr::new(address.into(), port);
    let socket = open_for(Domain::for_address(address), Owner::APP);
    wish(&socket);
    errno(socket.bind(&address.into())).map(|()| socket)
}

fn listening(address: impl Into<IpAddr>, port: u16, wish: Wish) -> Result<Socket, Errno> {
    let socket = bound(address, port, wish)?;
    errno(socket.listen(16)).map(|()| socket)
}

/// Every address, of IPv4 alone or of both families.
const ANY: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::UNSPECIFIED),
    IpAddr::V6(Ipv6Addr::UNSPECIFIED),
];

/// How it went, and whether SO_REUSEADDR says what was wished.
fn told(socket: Result<Socket, Errno>) -> Result<bool, Errno> {
    socket.map(|socket| socket.reuse_address().expect("an open socket"))
}

/// It may start while the proxy has callers for it already.
#[test]
fn an_application_starts_while_the_proxy_has_callers() {
    let sides = Sides::new();
    for (wish, reuses) in [(NOTHING, false), (REUSE_ADDRESS, true), (REUSE_PORT, false)] {
        let found = sides.ask(|side| {
            ANY.map(|any| {
                let port = port();
                let _caller = held_by_proxy(side, port);
                told(listening(any, port, wish))
            })
        });
        found.assert_both(&[Ok(reuses), Ok(reuses)]);
    }
}

/// Two of a group share a port, as in a restart without a gap; nobody else has a part
/// in it.
#[test]
fn an_application_is_restarted_while_the_proxy_has_callers() {
    let sides = Sides::new();
    let found = sides.ask(|side| {
        let port = port();
        let _caller = held_by_proxy(side, port);
        let _old = listening(ANY[0], port, REUSE_PORT).expect("the port is free");
        [REUSE_PORT, NOTHING, REUSE_ADDRESS].map(|wish| told(listening(ANY[0], port, wish)))
    });
    found.assert_both(&[Ok(false), Err(Errno::EADDRINUSE), Err(Errno::EADDRINUSE)]);
}

/// The application's own connections keep it from its port, as ever.
#[test]
fn an_application_without_reuse_waits_for_its_connections() {
    let sides = Sides::new();
    let found = sides.ask(|_| {
        let called = |wish| {
            let port = port();
            let listener = listening(ANY[0], port, wish).expect("the port is free");
            let client = open(Owner::PROXY);
            let own = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
            client.connect(&own.into()).expect("it listens");
            let (accepted, _) = listener.accept().expect("it was called");
            (port, client, accepted)
        };
        let (port, _client, _accepted) = called(NOTHING);
        let without = told(listening(ANY[0], port, NOTHING));
        let (port, _client, _accepted) = called(REUSE_ADDRESS);
        // See `port`.
        let with = wait_until("the listener to be gone", || {
            told(listening(ANY[0], port, REUSE_ADDRESS)).map_err(|errno| errno.to_string())
        });
        (without, with)
    });
    found.assert_both(&(Err(Errno::EADDRINUSE), true));
}

/// A port of loopback is taken by whoever binds first, without a listener too: some
/// programs see to it so that there is only one of them.
#[test]
fn a_bound_port_of_loopback_is_taken() {
    let sides = Sides::new();
    let found = sides.ask(|_| {
        let port = port();
        let _first = bound(Ipv4Addr::LOCALHOST, port, NOTHING).expect("the port is free");
        told(bound(Ipv4Addr::LOCALHOST, port, NOTHING))
    });
    found.assert_both(&Err(Errno::EADDRINUSE));
}

/// Elsewhere two may be bound to one port that do not ask for it; only one of them can
/// listen there.
#[test]
fn a_bound_port_is_taken_by_listening() {
    let sides = Sides::new();
    let two = |_: &Side| {
        let port = port();
        let first = bound(ANY[0], port, NOTHING).expect("the port is free");
        let second = bound(ANY[0], port, NOTHING)?;
        errno(first.listen(16)).and_then(|()| errno(second.listen(16)))
    };
    sides.ask(two).assert_both(&Err(Errno::EADDRINUSE));
    let found = sides.ask(|_| {
        let port = port();
        let _first = bound(ANY[0], port, NOTHING).expect("the port is free");
        told(bound(ANY[0], port, NOTHING))
    });
    found.assert_each(&Err(Errno::EADDRINUSE), &Ok(true));
}

/// Who calls bind() for something that cannot be has the options that it asked for, too.
#[test]
fn a_refused_bind_leaves_the_options() {
    let sides = Sides::new();
    let found = sides.ask(|_| {
        let taken_port = port();
        let listener = listening(ANY[0], taken_port, NOTHING).expect("the port is free");
        let again = errno(listener.bind(&SocketAddr::new(ANY[0], port()).into()));
        let client = open(Owner::APP);
        let taken = errno(client.bind(&SocketAddr::new(ANY[0], taken_port).into()));
        errno(client.connect(&OUTSIDE.into())).expect("somebody listens");
        (again, told(Ok(listener)), taken, told(Ok(client)))
    });
    found.assert_both(&(
        Err(Errno::EINVAL),
        Ok(false),
        Err(Errno::EADDRINUSE),
        Ok(false),
    ));
}

/// What a socket was lent is taken back where its pod is not enrolled any more, and by the
/// agent that comes after one that was killed.
#[test]
fn what_was_lent_is_taken_back_whatever_happens_meanwhile() {
    let node = Node::new();
    let pod = node.pod("pod");
    let start = |place| Agent::start_persistent(place, &agent::binary(), &[]);
    let mut agent = start(Place::new(node.cgroup()));
    agent.enroll(pod.netns(), &RULES.settings());
    let lent = || {
        let bind = || bound(ANY[0], port(), NOTHING).expect("the port is free");
        let socket = pod.netns().run(bind);
        assert_eq!(socket.reuse_address().ok(), Some(true));
        socket
    };
    let socket = lent();
    agent = start(agent.kill());
    socket.listen(16).expect("nobody listens there");
    assert_eq!(told(Ok(socket)), Ok(false));
    let socket = lent();
    agent.unenroll(pod.netns());
    // Nobody listens outside, which is no matter.
    let _ = socket.connect(&OUTSIDE.into());
    assert_eq!(told(Ok(socket)), Ok(false));
}

/// A client that has chosen its port has the options that it asked for.
#[test]
fn a_client_with_a_port_has_its_options() {
    let sides = Sides::new();
    let called = |wish| {
        let client = bound(ANY[0], port(), wish)?;
        errno(client.connect(&OUTSIDE.into()))?;
        told(Ok(client))
    };
    let found = sides.ask(|_| [NOTHING, REUSE_ADDRESS].map(called));
    found.assert_both(&[Ok(false), Ok(true)]);
}
