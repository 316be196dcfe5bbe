//! Real programs in the application's place, as clients of one pod and servers
//! of another, each with a real Envoy as its sidecar.
//!
//! What a program does is done once in every mode of splicing that an agent may
//! choose by itself, and must give the same as without splicing.

mod half_close;
mod host;
mod http;
mod iperf3;
mod relays;
mod servers;

use std::{
    fmt::Debug,
    net::{IpAddr, SocketAddr},
    path::Path,
};

use shunt_tests::{Agent, Node, agent::Place, deadline::wait_until, envoy::WORKERS};

use self::host::Host;

/// The port of the server under test.
const PORT: u16 = 8080;

/// The modes of splicing that an agent may be in without being forced; the first
/// is the one that the others are compared with.
const MODES: [&str; 2] = ["off", "auto"];

/// More of them, separated by commas: to see what a forced one breaks.
const MORE_MODES: &str = "SHUNT_TEST_SPLICE";

/// Two pods of the mesh.
struct World {
    client: Host,
    server: Host,
    agent: Agent,
    _node: Node,
}

impl World {
    /// Sidecars have so many workers.
    fn start(mode: &str, workers: usize) -> Self {
        let node = Node::new();
        let [client, server] = ["client", "server"]
            // So that what a failed test prints names the mode.
            .map(|name| Host::start(&node, &format!("{name}-{mode}"), workers));
        let agent = Agent::start_with(Place::new(node.cgroup()), &["--splice", mode]);
        for host in [&client, &server] {
            host.enroll(&agent);
        }
        Self {
            client,
            server,
            agent,
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

    /// What went through both sidecars, when all of it has.
    fn traffic(&self) -> Traffic {
        wait_until("both sidecars to have seen the same connections", || {
            let out = Traffic::of(&self.client, "out");
            let into = Traffic::of(&self.server, "in");
            let over = out.open + into.open == 0;
            (over && out.connections == into.connections)
                .then_some(Traffic {
                    bytes: out.bytes.min(into.bytes),
                    ..out
                })
                .ok_or_else(|| format!("{out:?} left, {into:?} came in"))
        })
    }

    /// Bytes that were spliced on their way from the client to the server, and on
    /// the way back.
    fn spliced(&self) -> [u64; 2] {
        let status = self.agent.status();
        [&self.client, &self.server].map(|host| {
            let path = host.pod().netns().path();
            let pods = status["pods"].as_array().into_iter().flatten();
            pods.filter(|pod| pod["netns"].as_str().map(Path::new) == Some(&path))
                .filter_map(|pod| pod["counters"]["splice"]["bytes"].as_u64())
                .sum()
        })
    }

    /// Whether the agent splices at all.
    fn splices(&self) -> bool {
        let mode = &self.agent.status()["splice"]["mode"];
        mode.as_str().is_some_and(|mode| mode != "off")
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

/// What must have gone through both sidecars after a scene.
#[derive(Clone, Copy, Debug)]
struct Least {
    connections: usize,
    /// Both ways together.
    bytes: usize,
    /// In a mode that splices.
    spliced: Spliced,
}

/// Which ways have to have been spliced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spliced {
    /// At least one of the two, in one of several plays: a connection may be over before it
    /// is worth it.
    AtLast,
    /// At least one of the two, which is busy for so long that an agent that splices cannot
    /// miss it.
    OneWay,
    /// To the server and back, in the same way.
    BothWays,
}

impl Spliced {
    /// How often a scene is played in a mode that splices, until enough of it was spliced.
    fn plays(self) -> usize {
        match self {
            Self::AtLast => 10,
            Self::OneWay | Self::BothWays => 1,
        }
    }

    /// How many of the two ways.
    fn ways(self) -> usize {
        match self {
            Self::AtLast | Self::OneWay => 1,
            Self::BothWays => 2,
        }
    }
}

impl Least {
    /// Everything must have gone through the sidecars. Whether enough of it was spliced; or
    /// else what was.
    #[track_caller]
    fn check(self, mode: &str, world: &World) -> Result<(), String> {
        let (traffic, spliced) = (world.traffic(), world.spliced());
        let seen = format!("{mode}: {traffic:?}, spliced {spliced:?}");
        assert!(
            traffic.connections >= self.connections as u64 && traffic.bytes >= self.bytes as u64,
            "not everything went through the sidecars: {seen}, {self:?}"
        );
        if !world.splices() {
            assert_eq!(spliced, [0; 2], "{seen}");
            return Ok(());
        }
        let busy = spliced.iter().filter(|bytes| **bytes > 0).count();
        if busy >= self.spliced.ways() {
            Ok(())
        } else {
            Err(seen)
        }
    }
}

/// Plays `scene` in every mode, with bytes that are spliced in those that do; what it gives
/// must always be the same.
#[track_caller]
fn in_every_mode<T: Debug + PartialEq>(least: Least, scene: impl Fn(&World) -> T) {
    in_every_mode_with(WORKERS, least, scene);
}

/// The same with sidecars that have so many workers. One worker passes connections on in their
/// order; of several each has its own.
fn in_every_mode_with<T: Debug + PartialEq>(
    workers: usize,
    least: Least,
    scene: impl Fn(&World) -> T,
) {
    let more = std::env::var(MORE_MODES).unwrap_or_default();
    let more = more.split(',').filter(|mode| !mode.is_empty());
    let mut first = None;
    for mode in MODES.into_iter().chain(more) {
        let mut missed = Vec::new();
        while missed.len() < least.spliced.plays() {
            let world = World::start(mode, workers);
            let seen = scene(&world);
            match &first {
                None => first = Some(seen),
                Some(first) => assert_eq!(&seen, first, "{mode} and {}", MODES[0]),
            }
            match least.check(mode, &world) {
                Ok(()) => break,
                Err(seen) => missed.push(seen),
            }
        }
        assert!(
            missed.len() < least.spliced.plays(),
            "not enough was spliced: {missed:#?}, {least:?}"
        );
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
