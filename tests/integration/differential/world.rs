//! A node with a pod of each kind, in which redirection can be set up again and
//! again; and two of them side by side.

use std::{
    collections::HashSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
    sync::Arc,
    thread,
};

use shunt_tests::{
    Agent, Answer, Families, Netns, Node, Owner, Pod, Probe, Responder, Source, Stack,
    command::output_of, deadline::wait_until, iptables, leftovers::temp_dir, probe_all,
};
use tempfile::TempDir;

use super::{
    probes::{From, PORTS, Question},
    setting::Setting,
};

/// Where proxies listen, whatever the setting.
pub(crate) const PROXY_PORTS: [u16; 7] = [15001, 15006, 15053, 16001, 16006, 4140, 4143];
/// The interface to the machine.
pub(crate) const VIRTUAL: &str = "vif0";
/// The addresses of the pod on that interface.
pub(crate) const GATEWAYS: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(10, 44, 0, 1)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0x44, 0, 0, 0, 0, 0, 1)),
];
/// The machine's.
pub(crate) const MACHINE: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(10, 44, 0, 2)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0x44, 0, 0, 0, 0, 0, 2)),
];
/// `::6`
pub(crate) const SIX6: IpAddr = IpAddr::V6(Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6));

/// The kinds of pods, in the order in which a node gets them.
const STACKS: [Stack; 3] = [Stack::V4, Stack::V6, Stack::Dual];

/// The addresses of the pod of that kind, on every node.
pub(crate) fn addresses(stack: Stack) -> Vec<IpAddr> {
    let v4 = |last| IpAddr::V4(Ipv4Addr::new(10, 42, 0, last));
    let v6 = |last| IpAddr::V6(Ipv6Addr::new(0xfd00, 0x42, 0, 0, 0, 0, 0, last));
    match stack {
        Stack::V4 => vec![v4(2)],
        Stack::V6 => vec![v6(3)],
        Stack::Dual => vec![v4(4), v6(4)],
    }
}

/// Pods in which everybody listens on every port, a machine behind the one of
/// both families, and the hosts outside.
pub(crate) struct World {
    _responders: Vec<Responder>,
    machine: Netns,
    pods: Vec<Pod>,
    node: Node,
}

impl World {
    pub(crate) fn new() -> Self {
        let node = Node::new();
        let pods: Vec<_> = STACKS
            .into_iter()
            .map(|stack| {
                let pod = node.pod_with("pod", stack);
                assert_eq!(pod.addresses(), addresses(stack));
                pod
            })
            .collect();
        let machine = node.machine("machine");
        let world = Self {
            _responders: responders(&node, &pods),
            machine,
            pods,
            node,
        };
        world.plug_machine();
        world
    }

    fn plug_machine(&self) {
        let pod = self.pod(Stack::Dual);
        for parameter in ["net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"] {
            pod.sysctl(parameter, "1");
        }
        let ([gateway, gateway6], [machine, machine6]) = (GATEWAYS, MACHINE);
        pod.netns().ip(&format!(
            "link add {VIRTUAL} type veth peer name eth0 netns {}\n\
             addr add {gateway}/24 dev {VIRTUAL}\n\
             addr add {gateway6}/64 dev {VIRTUAL} nodad\n\
             link set {VIRTUAL} up\n",
            self.machine.name()
        ));
        self.machine.ip(&format!(
            "addr add {machine}/24 dev eth0\n\
             addr add {machine6}/64 dev eth0 nodad\n\
             link set eth0 up\n\
             route add default via {gateway}\n\
             route add default via {gateway6}\n"
        ));
        for (machine, pod) in MACHINE.iter().zip(pod.addresses()) {
            let route = format!("route add {machine} via {pod}\n");
            self.node.netns().ip(&route);
        }
    }

    fn pod(&self, stack: Stack) -> &Pod {
        let index = STACKS.iter().position(|other| *other == stack);
        &self.pods[index.expect("every kind is there")]
    }

    /// The answers, in the order of the questions.
    fn ask(&self, stack: Stack, questions: &[Question]) -> Vec<Answer> {
        let mut answers: Vec<Option<Answer>> = questions.iter().map(|_| None).collect();
        for (from, netns) in [
            (From::Pod, &**self.pod(stack).netns()),
            (From::Outside, self.node.netns()),
            (From::Machine, &self.machine),
        ] {
            let indices = questions.iter().enumerate();
            let (indices, probes): (Vec<_>, Vec<Probe>) = indices
                .filter(|(_, question)| question.from == from)
                .map(|(index, question)| (index, question.probe))
                .unzip();
            let asked = probe_all(netns, &probes);
            for (index, answer) in indices.into_iter().zip(asked) {
                answers[index] = Some(answer);
            }
        }
        let answers = answers.into_iter();
        answers.map(|a| a.expect("all were asked")).collect()
    }
}

fn responders(node: &Node, pods: &[Pod]) -> Vec<Responder> {
    let app: Vec<u16> = PORTS
        .into_iter()
        .filter(|port| !PROXY_PORTS.contains(port))
        .collect();
    let mut responders = vec![Responder::start_for(
        Families::Split,
        node.netns(),
        Owner::APP,
        &PORTS,
    )];
    for (stack, pod) in STACKS.into_iter().zip(pods) {
        // Proxies of either kind.
        let families = match stack {
            Stack::V4 | Stack::V6 => Families::Split,
            Stack::Dual => Families::Dual,
        };
        let netns: &Arc<Netns> = pod.netns();
        responders.push(Responder::start_for(
            families,
            netns,
            Owner::PROXY,
            &PROXY_PORTS,
        ));
        responders.push(Responder::start_for(
            Families::Split,
            netns,
            Owner::APP,
            &app,
        ));
    }
    responders
}

/// By what a world's pods are redirected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    Nothing,
    Rules,
    Agent,
    Both,
}

/// What is to be in force in a pod.
pub(crate) struct Wanted {
    pub(crate) stack: Stack,
    pub(crate) ipv4_rules: String,
    pub(crate) ipv6_rules: String,
    /// Whether Istio's init container adds `::6`.
    pub(crate) has_six: bool,
    pub(crate) flags: Vec<String>,
    pub(crate) nameservers: Vec<IpAddr>,
}

impl std::convert::From<&Setting> for Wanted {
    fn from(setting: &Setting) -> Self {
        Self {
            stack: setting.stack,
            ipv4_rules: setting.ipv4_rules(),
            ipv6_rules: setting.ipv6_rules(),
            has_six: setting.has_six(),
            flags: setting.flags(),
            nameservers: setting.resolvers().to_vec(),
        }
    }
}

/// A world and what redirects in it.
pub(crate) struct Side {
    by: By,
    agent: Option<Agent>,
    world: World,
    directory: TempDir,
}

impl Side {
    pub(crate) fn new(by: By) -> Self {
        let world = World::new();
        let agent = match by {
            By::Agent | By::Both => Some(Agent::start(world.node.cgroup())),
            By::Nothing | By::Rules => None,
        };
        Self {
            by,
            agent,
            world,
            directory: temp_dir("differential"),
        }
    }

    /// Asks while `wanted` is in force. Nothing of it is there before or after,
    /// so that no answer depends on what was asked earlier.
    fn ask(&self, wanted: &Wanted, questions: &[Question]) -> Vec<Answer> {
        assert_no_port_twice(questions);
        let netns = self.world.pod(wanted.stack).netns();
        if matches!(self.by, By::Rules | By::Both) {
            iptables::restore(netns, &wanted.ipv4_rules);
            iptables::restore6(netns, &wanted.ipv6_rules);
            if wanted.has_six {
                add_six(netns);
            }
        }
        if let Some(agent) = &self.agent {
            let resolv_conf = resolv_conf(self.directory.path(), &wanted.nameservers);
            let flags = wanted.flags.iter().chain(&resolv_conf);
            agent.enroll(netns, &flags.map(String::as_str).collect::<Vec<_>>());
        }
        let answers = self.world.ask(wanted.stack, questions);
        if let Some(agent) = &self.agent {
            agent.unenroll(netns);
        }
        if wanted.has_six && self.by != By::Nothing {
            netns.ip(&format!("addr del {SIX6}/128 dev lo"));
        }
        if matches!(self.by, By::Rules | By::Both) {
            iptables::forget(netns);
        }
        answers
    }
}

/// Connection tracking remembers connections that have ended: behind the rules a second one
/// from the same port could look like the first.
fn assert_no_port_twice(questions: &[Question]) {
    let mut ports = HashSet::new();
    for Question { probe, .. } in questions {
        if let Source::Port(port) = probe.source {
            assert!(ports.insert(port), "two questions are from port {port}");
        }
    }
}

/// Gives lo `::6`, as Istio's init container does.
fn add_six(netns: &Netns) {
    netns.ip(&format!("addr add {SIX6}/128 dev lo nodad"));
    // The kernel takes packets to it in a moment later.
    wait_until("the route to ::6", || {
        let mut command = netns.command("ip", Owner::ROOT);
        let route = output_of(command.args(["-6", "route", "get", &SIX6.to_string()]));
        let is_local = route.starts_with("local");
        is_local.then_some(()).ok_or(route)
    });
}

/// Writes a resolv.conf, and gives the flag that names it.
pub(crate) fn resolv_conf(directory: &Path, nameservers: &[IpAddr]) -> Vec<String> {
    let path = directory.join("resolv.conf");
    let lines = nameservers.iter().map(|ip| format!("nameserver {ip}\n"));
    std::fs::write(&path, lines.collect::<String>()).expect("a directory of this test");
    let path = path.to_str().expect("a path of this test");
    vec!["--resolv-conf".to_owned(), path.to_owned()]
}

/// Two worlds that should not be told apart.
pub(crate) struct Pair {
    one: Side,
    other: Side,
}

impl Pair {
    pub(crate) fn new(one: By, other: By) -> Self {
        // An agent ends with the thread that starts it: not on one for each.
        Self {
            one: Side::new(one),
            other: Side::new(other),
        }
    }

    /// What both answer when `one` and `other` are in force in them.
    pub(crate) fn ask(
        &self,
        (one, other): (&Wanted, &Wanted),
        questions: &[Question],
    ) -> Vec<(Answer, Answer)> {
        let (one, other) = both(
            || self.one.ask(one, questions),
            || self.other.ask(other, questions),
        );
        one.into_iter().zip(other).collect()
    }
}

/// Does both at once.
fn both<A: Send, B: Send>(
    one: impl FnOnce() -> A + Send,
    other: impl FnOnce() -> B + Send,
) -> (A, B) {
    thread::scope(|scope| {
        let other = scope.spawn(other);
        let one = one();
        let other = other
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        (one, other)
    })
}
