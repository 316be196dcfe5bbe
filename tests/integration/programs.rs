//! Real programs in the application's place, as clients of one pod and servers
//! of another, each with a real Envoy as its sidecar.
//!
//! What a program does is done once in every mode of splicing that an agent may
//! choose by itself, and must give the same as without splicing.

mod half_close;
mod host;
mod http;
mod relays;
mod servers;

use std::{
    fmt::Debug,
    net::{IpAddr, SocketAddr},
};

use shunt_tests::{Agent, Node, agent::Place, deadline::wait_until};

use self::host::Host;

/// The port of the server under test.
const PORT: u16 = 8080;

/// How an agent is started; the first is the one that the others are compared
/// with.
const MODES: [Mode; 1] = [Mode {
    name: "off",
    arguments: &[],
}];

/// A mode of splicing.
#[derive(Clone, Copy, Debug)]
struct Mode {
    name: &'static str,
    /// What `shunt run` is given.
    arguments: &'static [&'static str],
}

/// Two pods of the mesh.
struct World {
    client: Host,
    server: Host,
    _agent: Agent,
    _node: Node,
}

impl World {
    fn start(mode: Mode) -> Self {
        let node = Node::new();
        let [client, server] = ["client", "server"].map(|name| Host::start(&node, name));
        let agent = Agent::start_told(Place::new(node.cgroup()), mode.arguments);
        for host in [&client, &server] {
            host.enroll(&agent);
        }
        Self {
            client,
            server,
            _agent: agent,
            _node: node,
        }
    }

    /// Where the client reaches the server.
    fn address(&self) -> SocketAddr {
        (self.ip(), PORT).into()
    }

    fn ip(&self) -> IpAddr {
        self.server.pod().ip()
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}/{path}", self.address())
    }

    /// What both sidecars have seen: so many connections, and at least so many
    /// bytes.
    fn traffic(&self) -> Traffic {
        wait_until("both sidecars to have seen the same", || {
            let out = Traffic::of(&self.client, "out");
            let into = Traffic::of(&self.server, "in");
            let same = out.connections == into.connections;
            let over = out.open + into.open == 0;
            (same && over)
                .then_some(Traffic {
                    bytes: out.bytes.min(into.bytes),
                    ..out
                })
                .ok_or_else(|| format!("{out:?} left, {into:?} came in"))
        })
    }
}

/// What a sidecar has passed on.
#[derive(Clone, Copy, Debug)]
struct Traffic {
    connections: u64,
    /// Those that are open.
    open: u64,
    /// Of both ways.
    bytes: u64,
}

impl Traffic {
    fn of(host: &Host, direction: &str) -> Self {
        let counters = host.envoy().counters();
        let counter = |name: &str| {
            let name = format!("tcp.{direction}.downstream_cx_{name}");
            counters.get(&name).copied().unwrap_or(0)
        };
        Self {
            connections: counter("total"),
            open: counter("active"),
            bytes: counter("rx_bytes_total") + counter("tx_bytes_total"),
        }
    }
}

/// Plays `scene` in every mode; what it gives must always be the same. All that
/// it sends must have gone through both sidecars: at least so many connections
/// and bytes, both ways together.
#[track_caller]
fn in_every_mode<T: Debug + PartialEq>(least: (u64, u64), scene: impl Fn(&World) -> T) {
    let mut first = None;
    for mode in MODES {
        let world = World::start(mode);
        let seen = scene(&world);
        let traffic = world.traffic();
        assert!(
            traffic.connections >= least.0 && traffic.bytes >= least.1,
            "{}: not everything went through the sidecars: {traffic:?}",
            mode.name
        );
        match &first {
            None => first = Some(seen),
            Some(first) => assert_eq!(&seen, first, "{} and {}", mode.name, MODES[0].name),
        }
    }
}

/// So many bytes without a pattern, always the same for one `seed`.
fn bytes(seed: u64, count: usize) -> Vec<u8> {
    // A linear congruential generator, of which the upper bits are good enough.
    let mut state = seed;
    let next = || {
        state = state
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(0x1405_7b7e_f767_814f);
        state.to_be_bytes()[0]
    };
    std::iter::repeat_with(next).take(count).collect()
}

/// Millions of bytes that differ are not worth printing.
#[track_caller]
fn assert_same_bytes(what: &str, seen: &[u8], expected: &[u8]) {
    let first = seen.iter().zip(expected).position(|(a, b)| a != b);
    assert!(
        first.is_none() && seen.len() == expected.len(),
        "{what}: {} bytes where {} were sent; the first that differs is {first:?}",
        seen.len(),
        expected.len()
    );
}
