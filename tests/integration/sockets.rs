//! Sockets that are used in uncommon ways. Each test does the same in two pods,
//! one with Istio's real rules and one that is enrolled with the settings that
//! mean the same, and says what has to be seen: in both, or in each where they
//! differ, and then why.

mod bound;
mod connecting;
mod multipath;
mod options;
mod owners;
mod ports;
mod untouched;

use std::{
    fmt::Debug,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use shunt_tests::{
    Agent, Greeting, Node, Owner, Pod, Responder, deadline::DEADLINE, iptables, iptables::RuleSet,
};
use socket2::{Domain, Socket, Type};

use crate::lab::PORT;

const RULES: RuleSet = RuleSet {
    name: "istio-1.21.rules",
    text: include_str!("../oracle/istio-1.21.rules"),
};

/// A host outside, where somebody listens.
const OUTSIDE: SocketAddr = SocketAddr::new(Node::OUTSIDE, PORT);
/// Another one.
const FAR_OUTSIDE: SocketAddr = SocketAddr::new(Node::FAR_OUTSIDE, PORT);
/// The application itself, at the pod's address: never redirected.
const OWN: SocketAddr = SocketAddr::new(Node::FIRST_POD, PORT);
/// The application itself, at loopback: never redirected.
const LOOPBACK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), PORT);
/// The ports of the proxy.
const PROXY_PORTS: [u16; 2] = [15001, 15006];

/// The two pods.
struct Sides {
    rules: Side,
    enrolled: Side,
}

impl Sides {
    /// Two pods, each with its redirection and a proxy that answers itself.
    fn new() -> Self {
        let sides = Self::without_proxy();
        Self {
            rules: sides.rules.with_proxy(),
            enrolled: sides.enrolled.with_proxy(),
        }
    }

    /// The same, and nobody listens on the proxy's ports.
    fn without_proxy() -> Self {
        let sides = Self::plain();
        sides.rules.redirect();
        sides.enrolled.redirect();
        sides
    }

    /// Two pods that are not redirected yet.
    fn plain() -> Self {
        let rules = Side::new(|_| Redirection::Rules);
        let enrolled = Side::new(|node| Redirection::Agent(Agent::start(node.cgroup())));
        Self { rules, enrolled }
    }

    /// What `work` finds out in the namespace of each pod.
    fn ask<T: Send>(&self, work: impl Fn(&Side) -> T + Sync) -> Found<T> {
        let ask = |side: &Side| side.pod.netns().run(|| work(side));
        Found {
            rules: ask(&self.rules),
            enrolled: ask(&self.enrolled),
        }
    }
}

/// What was found out in each of two pods.
struct Found<T> {
    rules: T,
    enrolled: T,
}

impl<T: Debug + PartialEq> Found<T> {
    /// Both are this.
    #[track_caller]
    fn assert_both(&self, expected: &T) {
        self.assert(expected, expected);
    }

    /// They differ: the rules give one, the enrolment the other.
    #[track_caller]
    fn assert_each(&self, with_rules: &T, enrolled: &T) {
        assert_ne!(with_rules, enrolled, "there is no difference to state");
        self.assert(with_rules, enrolled);
    }

    #[track_caller]
    fn assert(&self, with_rules: &T, enrolled: &T) {
        let Self {
            rules: seen_with_rules,
            enrolled: seen_enrolled,
        } = self;
        assert!(
            (seen_with_rules, seen_enrolled) == (with_rules, enrolled),
            "with rules: {seen_with_rules:?}\n  expected: {with_rules:?}\n  \
             enrolled: {seen_enrolled:?}\n  expected: {enrolled:?}"
        );
    }
}

/// A pod with an application in it, and a host outside.
struct Side {
    redirection: Redirection,
    outside: Responder,
    _application: Responder,
    _proxy: Option<Responder>,
    pod: Pod,
    node: Node,
}

/// Who redirects.
enum Redirection {
    Rules,
    Agent(Agent),
}

impl Side {
    fn new(redirection: impl FnOnce(&Node) -> Redirection) -> Self {
        let node = Node::new();
        let pod = node.pod("pod");
        Self {
            redirection: redirection(&node),
            outside: Responder::start(node.netns(), Owner::APP, &[PORT]),
            _application: Responder::start(pod.netns(), Owner::APP, &[PORT]),
            _proxy: None,
            pod,
            node,
        }
    }

    /// From now on its connections are redirected.
    fn redirect(&self) {
        match &self.redirection {
            Redirection::Rules => iptables::restore(self.pod.netns(), RULES.text),
            Redirection::Agent(agent) => agent.enroll(self.pod.netns(), &RULES.settings()),
        }
    }

    fn with_proxy(self) -> Self {
        Self {
            _proxy: Some(self.start_proxy()),
            ..self
        }
    }

    fn start_proxy(&self) -> Responder {
        Responder::start(self.pod.netns(), Owner::PROXY, &PROXY_PORTS)
    }

    /// Sets a kernel parameter of the pod and of the hosts outside.
    fn sysctl(&self, name: &str, value: &str) {
        self.pod.sysctl(name, value);
        self.node.netns().sysctl(name, value);
    }
}

/// What a client and whoever answered it saw of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Seen {
    /// Who answered, as `pod:15001`.
    who: String,
    /// What that one takes for the destination.
    asked: SocketAddr,
    /// The address that the client has, by getsockname().
    source: IpAddr,
    /// The client's getpeername().
    peer: SocketAddr,
}

impl Seen {
    /// An application's connection to `asked` that went to the proxy.
    fn redirected(asked: SocketAddr) -> Self {
        Self {
            who: "pod:15001".to_owned(),
            asked,
            source: Node::FIRST_POD,
            peer: asked,
        }
    }

    /// A connection from the pod that reached the host outside that it asked
    /// for.
    fn direct(asked: SocketAddr) -> Self {
        Self {
            who: "node:80".to_owned(),
            ..Self::redirected(asked)
        }
    }

    /// A connection to the application in the pod itself: its address is the
    /// source as well.
    fn inside(asked: SocketAddr) -> Self {
        Self {
            who: "pod:80".to_owned(),
            source: asked.ip(),
            ..Self::redirected(asked)
        }
    }

    fn from(self, source: IpAddr) -> Self {
        Self { source, ..self }
    }
}

/// A new TCP socket, opened by `owner`.
fn open(owner: Owner) -> Socket {
    open_for(Domain::IPV4, owner)
}

/// The same of this family.
fn open_for(domain: Domain, owner: Owner) -> Socket {
    patient(owned_by(owner, || {
        Socket::new(domain, Type::STREAM, None).expect("a new socket")
    }))
}

/// Opens a socket as `owner`, and becomes root again.
fn owned_by(owner: Owner, open: impl FnOnce() -> Socket) -> Socket {
    owner.assume();
    let socket = open();
    Owner::ROOT.assume();
    socket
}

/// The socket, with the patience of tests.
fn patient(socket: Socket) -> Socket {
    socket
        .set_read_timeout(Some(DEADLINE))
        .expect("an open socket");
    // A connect() waits as long as a send() may.
    socket
        .set_write_timeout(Some(DEADLINE))
        .expect("an open socket");
    socket
}

/// Connects and listens to the answer.
fn call(socket: &Socket, to: SocketAddr) -> Result<Seen, Errno> {
    connect(socket, to)?;
    Ok(seen(socket))
}

fn connect(socket: &Socket, to: SocketAddr) -> Result<(), Errno> {
    errno(socket.connect(&to.into()))
}

/// What is to be seen of a connected socket.
fn seen(socket: &Socket) -> Seen {
    let greeting = Greeting::read(socket);
    let sockname = address(socket.local_addr()).expect("a connected socket");
    let peer = address(socket.peer_addr()).expect("a connected socket");
    assert_eq!(
        (greeting.peer.ip(), greeting.peer.port()),
        (sockname.ip().to_canonical(), sockname.port()),
        "the server sees the client's own address"
    );
    Seen {
        who: format!("{}:{}", greeting.place, greeting.listener),
        asked: greeting.destination(),
        source: sockname.ip(),
        peer,
    }
}

fn address(answer: io::Result<socket2::SockAddr>) -> Result<SocketAddr, Errno> {
    errno(answer).map(|addr| addr.as_socket().expect("an address of IPv4 or IPv6"))
}

fn errno<T>(result: io::Result<T>) -> Result<T, Errno> {
    result.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))
}
