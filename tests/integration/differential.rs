//! The agent against the kernel's own rules: two pods, one with real iptables
//! rules and one enrolled with the same settings, are asked the same questions,
//! and the answers must be equal.

use std::{
    fmt::Write,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use shunt_tests::{
    Agent, Answer, Node, Outcome, Owner, Pod, Probe, Responder, Source,
    iptables::{self, RuleSet},
    probe_all,
};

/// Every port that a rule speaks of, and two that none does.
const PORTS: [u16; 10] = [22, 53, 80, 8080, 15001, 15006, 15008, 15020, 15021, 15090];
/// A port on which nobody listens.
const CLOSED: u16 = 9;
/// Where bound source ports begin: below those that the kernel gives out.
const FIRST_SOURCE_PORT: u16 = 17000;

macro_rules! rule_sets {
    ($($test:ident: $file:literal,)*) => {$(
        #[test]
        fn $test() {
            let rules = RuleSet { name: $file, text: include_str!(concat!("../oracle/", $file)) };
            let real = World::with_rules(&rules);
            let enrolled = World::enrolled(&rules);
            let differences = differences(&real, &enrolled);
            assert!(
                differences.is_empty(),
                "{}: {} answers differ\n{}",
                rules.name,
                differences.len(),
                first(&differences)
            );
        }
    )*};
}

rule_sets! {
    rules_of_istio_1_1: "istio-1.1.rules",
    rules_of_istio_1_13: "istio-1.13.rules",
    rules_of_istio_1_21: "istio-1.21.rules",
    rules_of_istio_redirect: "istio-redirect.rules",
    rules_that_list_what_is_captured: "lists-include.rules",
    rules_that_list_what_is_left_alone: "lists-exclude.rules",
    rules_that_capture_nothing: "capture-nothing.rules",
    rules_that_capture_loopback: "capture-loopback.rules",
    rules_of_two_owners: "two-owners.rules",
}

const BASE: RuleSet = RuleSet {
    name: "istio-1.21.rules",
    text: include_str!("../oracle/istio-1.21.rules"),
};

/// A difference between two pods is one of their redirection, not of chance.
#[test]
fn the_same_rules_give_the_same_answers_twice() {
    let differences = differences(&World::with_rules(&BASE), &World::with_rules(&BASE));
    assert!(differences.is_empty(), "{}", first(&differences));
}

/// The comparison sees what it is there to see.
#[test]
fn a_pod_without_rules_gives_other_answers() {
    let differences = differences(&World::with_rules(&BASE), &World::plain());
    // Among others: an application's call to the outside.
    let wanted = Probe::new(Owner::APP, (Node::OUTSIDE, 80)).to_string();
    assert!(differences.iter().any(|text| text.contains(&wanted)));
}

/// A pod and everybody it may talk to.
struct World {
    _agent: Option<Agent>,
    _responders: [Responder; 3],
    pod: Pod,
    node: Node,
}

impl World {
    /// Everybody listens on every port, nothing is redirected.
    fn plain() -> Self {
        let node = Node::new();
        let pod = node.pod("pod");
        let is_proxy = |port: &u16| matches!(port, 15001 | 15006);
        let (proxy, app): (Vec<u16>, Vec<u16>) = PORTS.iter().partition(|port| is_proxy(port));
        Self {
            _agent: None,
            _responders: [
                Responder::start(pod.netns(), Owner::PROXY, &proxy),
                Responder::start(pod.netns(), Owner::APP, &app),
                Responder::start(node.netns(), Owner::APP, &PORTS),
            ],
            pod,
            node,
        }
    }

    /// The same with real rules.
    fn with_rules(rules: &RuleSet) -> Self {
        let world = Self::plain();
        iptables::restore(world.pod.netns(), rules.text);
        world
    }

    /// The same with an agent, and the settings that mean the same.
    fn enrolled(rules: &RuleSet) -> Self {
        let world = Self::plain();
        let agent = Agent::start(world.node.cgroup());
        agent.enroll(world.pod.netns(), &rules.settings());
        Self {
            _agent: Some(agent),
            ..world
        }
    }

    fn answers(&self, probes: &Probes) -> Vec<Answer> {
        let mut answers = probe_all(self.pod.netns(), &probes.inside);
        answers.extend(probe_all(self.node.netns(), &probes.outside));
        answers
    }
}

/// The questions.
struct Probes {
    /// From inside the pod.
    inside: Vec<Probe>,
    /// From the hosts outside.
    outside: Vec<Probe>,
}

impl Probes {
    fn all() -> Self {
        const POD: IpAddr = Node::FIRST_POD;
        let owners = [
            Owner::APP,
            Owner::ROOT,
            Owner::PROXY,
            Owner::PROXY_UID,
            Owner::PROXY_GID,
            Owner::new(1338, 1338),
        ];
        let inside = combine(
            &owners,
            &[
                Source::Unbound,
                Source::Addr(loopback(1)),
                Source::Addr(loopback(6)),
                Source::AddrLatePort(loopback(6)),
                Source::Addr(POD),
                Source::Port(0),
            ],
            &[
                Node::OUTSIDE,
                Node::FAR_OUTSIDE,
                Node::PRIVATE,
                POD,
                loopback(1),
                loopback(2),
                loopback(6),
                IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            ],
        );
        let outside = combine(
            &[Owner::APP, Owner::PROXY],
            &[
                Source::Unbound,
                Source::Addr(Node::OUTSIDE),
                Source::Addr(Node::FAR_OUTSIDE),
                Source::Port(0),
            ],
            &[POD],
        );
        Self { inside, outside }
    }

    fn iter(&self) -> impl Iterator<Item = &Probe> {
        self.inside.iter().chain(&self.outside)
    }
}

/// Every owner from every source to every port of every destination. A source
/// port is used once.
fn combine(owners: &[Owner], sources: &[Source], destinations: &[IpAddr]) -> Vec<Probe> {
    let mut probes = Vec::new();
    let mut source_port = FIRST_SOURCE_PORT;
    for &owner in owners {
        for &source in sources {
            for &ip in destinations {
                for port in PORTS.into_iter().chain([CLOSED]) {
                    let source = match source {
                        Source::Port(_) => {
                            source_port += 1;
                            Source::Port(source_port)
                        }
                        Source::Unbound | Source::Addr(_) | Source::AddrLatePort(_) => source,
                    };
                    probes.push(Probe::new(owner, (ip, port)).from(source));
                }
            }
        }
    }
    probes
}

const fn loopback(last: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(127, 0, 0, last))
}

/// What of an answer must be equal.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    outcome: SeenOutcome,
    peername: Option<SocketAddr>,
    sockname: Option<SocketAddr>,
}

#[derive(Debug, PartialEq, Eq)]
enum SeenOutcome {
    Answered {
        place: String,
        listener: u16,
        peer: SocketAddr,
        destination: SocketAddr,
        knows_destination: bool,
    },
    Otherwise(Outcome),
}

impl Seen {
    fn new(probe: &Probe, answer: &Answer) -> Self {
        // A port that the kernel gave out is another one each time.
        let comparable = |addr: SocketAddr| match probe.source {
            Source::Port(_) => addr,
            Source::Unbound | Source::Addr(_) | Source::AddrLatePort(_) => {
                SocketAddr::new(addr.ip(), 0)
            }
        };
        let outcome = match &answer.outcome {
            Outcome::Answered(greeting) => SeenOutcome::Answered {
                place: greeting.place.clone(),
                listener: greeting.listener,
                peer: comparable(greeting.peer),
                destination: greeting.destination(),
                knows_destination: greeting.knows_destination(),
            },
            Outcome::Refused | Outcome::Closed | Outcome::Silent | Outcome::Failed(_) => {
                SeenOutcome::Otherwise(answer.outcome.clone())
            }
        };
        Self {
            outcome,
            peername: answer.peername,
            sockname: answer.sockname.map(comparable),
        }
    }
}

/// Asks both worlds everything; a text for each question with two answers.
fn differences(one: &World, other: &World) -> Vec<String> {
    let probes = Probes::all();
    let answers = one.answers(&probes).into_iter().zip(other.answers(&probes));
    let outside = probes.inside.len();
    probes
        .iter()
        .zip(answers)
        .enumerate()
        .filter_map(|(index, (probe, (one, other)))| {
            let from = if index < outside { "pod" } else { "outside" };
            let (one, other) = (Seen::new(probe, &one), Seen::new(probe, &other));
            (one != other).then(|| format!("{from}: {probe}\n   one: {one:?}\n other: {other:?}"))
        })
        .collect()
}

/// Enough of the differences to see what is wrong.
fn first(differences: &[String]) -> String {
    differences
        .iter()
        .take(40)
        .fold(String::new(), |mut text, difference| {
            writeln!(text, "{difference}").expect("a string takes everything");
            text
        })
}
