//! What it costs everybody else, and whether it costs more when there is more
//! of it.

use std::{net::Ipv4Addr, time::Instant};

use shunt::settings::Field;
use shunt_tests::{
    Agent, Netns, Node, Owner, Pod, Process, deadline::DEADLINE, interrupt::Interrupt,
};

use crate::{
    Interrupted,
    client::Client,
    figures::{ENROL, OPEN_CALL, OPEN_CPU, OUTSIDE as CONNECT_OUTSIDE},
    go_on,
    load::{Done, Job, Latency},
    proxy::OUTBOUND_PORT,
    report::Report,
    role::{self, Cores, Role, cpu_time, on_core},
    rounds::{AT_ONCE, Effort, each},
    say,
    world::{Way, bench_pod, many_connections, redirect},
};

/// The setting of a process outside the mesh.
pub(crate) const OUTSIDE: &str = "outside the mesh";
/// Its row on a machine without an agent.
pub(crate) const NO_AGENT: &str = "no agent";
/// Its row on a node without an agent, while others of the machine have one: the kernel's
/// switches for programs (`cgroup_bpf_enabled_key`) are the machine's.
const ELSEWHERE: &str = "an agent elsewhere";
/// Its row on a node with so many enrolled pods.
pub(crate) const PODS_1000: &str = "1,000 pods";
/// The setting of connections while others are open.
pub(crate) const OPEN: &str = "open connections";
/// Its row with few of them.
pub(crate) const OPEN_FEW: &str = "shunt, 10 open";
/// Its row with many.
pub(crate) const OPEN_MANY: &str = "shunt, 100,000 open";
/// The setting of enrolling another pod.
pub(crate) const ENROLLING: &str = "enrolling";
/// Its row on a node with nine pods.
pub(crate) const POD_10: &str = "10th pod";
/// Its row on a node with 999 pods.
pub(crate) const POD_1000: &str = "1,000th pod";

/// Where the process outside the mesh calls.
const PORT: u16 = 8080;

/// A node with some enrolled pods and one process that is in none of them.
struct Neighbour {
    row: &'static str,
    _server: Process,
    agent: Option<Agent>,
    /// All but the last are enrolled for good.
    pods: Vec<Netns>,
    client: Client,
    _outside: Netns,
    _node: Node,
}

impl Neighbour {
    /// `pods` is `None` where there is no agent at all.
    fn start(row: &'static str, pods: Option<usize>, cores: Cores, rate: u32) -> Self {
        say(format_args!("  {row}"));
        let node = Node::new();
        let outside = node.machine("outside");
        many_connections(&outside);
        let server = on_core(cores.client, || {
            Role::Server(PORT).start(&outside, Owner::APP)
        });
        let agent = pods.and_then(|_| redirect(Way::Shunt(None), &node, &[]));
        let number = pods.unwrap_or(0);
        let pods: Vec<_> = (0..number).map(|_| node.machine("pod")).collect();
        if let Some(agent) = &agent {
            for pod in &pods {
                enrol(agent, pod);
            }
        }
        let to = (Ipv4Addr::LOCALHOST, PORT).into();
        Self {
            row,
            _server: server,
            agent,
            pods,
            client: Client::start(&outside, cores.client, Job::Connects { to, rate }),
            _outside: outside,
            _node: node,
        }
    }

    fn connect(&mut self, effort: &Effort, report: &mut Report) {
        let took: Latency = self.client.work(effort.connects_at_once());
        let call = took.calls.micro(0.5);
        report.add(OUTSIDE, CONNECT_OUTSIDE, self.row, call);
    }

    /// Turns in which nobody else has one.
    fn connect_in_turns(
        &mut self,
        turns: usize,
        effort: &Effort,
        interrupt: &Interrupt,
        report: &mut Report,
    ) -> Result<(), Interrupted> {
        for _ in 0..turns {
            go_on(interrupt)?;
            self.connect(effort, report);
        }
        Ok(())
    }

    /// The row of its last pod, where the benchmark enrols that one again and again.
    fn row_of_last(&self) -> Option<&'static str> {
        match self.pods.len() {
            10 => Some(POD_10),
            1000 => Some(POD_1000),
            _ => None,
        }
    }

    /// Enrols the last pod.
    fn enrol_last(&self, row: &'static str, report: &mut Report) {
        let (Some(agent), Some(last)) = (&self.agent, self.pods.last()) else {
            return;
        };
        let start = Instant::now();
        enrol(agent, last);
        report.add(ENROLLING, ENROL, row, start.elapsed().as_secs_f64() * 1e3);
    }

    /// Takes it out again, so that it can come once more.
    fn unenrol_last(&self) {
        if let (Some(agent), Some(last)) = (&self.agent, self.pods.last()) {
            agent.unenroll(last);
        }
    }
}

/// With what `--mesh istio` stands for; without a process of the command line.
fn enrol(agent: &Agent, pod: &Netns) {
    let everything = "*".to_owned();
    agent.enroll_written(
        pod,
        [
            (Field::InboundInclude, everything.clone()),
            (Field::InboundExclude, "15090,15021,15020".to_owned()),
            (Field::OutboundInclude, everything),
        ],
    );
}

/// Measures connect() outside the mesh, and enrolling, beside few pods and many.
pub(crate) fn neighbours(
    outside: bool,
    enrolling: bool,
    effort: &Effort,
    interrupt: &Interrupt,
    report: &mut Report,
) -> Result<(), Interrupted> {
    let cores = Cores::choose();
    say(format_args!("Setting up nodes with pods:"));
    // Half of its turns are before those of the others, and half after.
    let mut alone = outside.then(|| Neighbour::start(NO_AGENT, None, cores, effort.rate));
    if let Some(alone) = &mut alone {
        alone.connect_in_turns(effort.turns.div_ceil(2), effort, interrupt, report)?;
    }
    let mut nodes = Vec::new();
    for (row, pods, needed) in [
        (ELSEWHERE, None, outside),
        ("0 pods", Some(0), outside),
        ("10 pods", Some(10), enrolling),
        ("100 pods", Some(100), outside),
        (PODS_1000, Some(1000), true),
    ] {
        go_on(interrupt)?;
        if needed {
            nodes.push(Neighbour::start(row, pods, cores, effort.rate));
        }
    }
    let last_of = |node: &Neighbour| enrolling.then(|| node.row_of_last()).flatten();
    for node in nodes.iter().filter(|node| last_of(node).is_some()) {
        node.unenrol_last();
    }
    for _ in 0..effort.turns {
        for node in &mut nodes {
            go_on(interrupt)?;
            let last = last_of(node);
            if let Some(row) = last {
                node.enrol_last(row, report);
            }
            if outside {
                node.connect(effort, report);
            }
            if last.is_some() {
                node.unenrol_last();
            }
        }
        nodes.rotate_left(1);
    }
    drop(nodes);
    if let Some(alone) = &mut alone {
        alone.connect_in_turns(effort.turns / 2, effort, interrupt, report)?;
    }
    Ok(())
}

/// As many processes hold the two ends of all connections: one may not have
/// that many files.
const PROCESSES: u8 = 7;

/// A pod with open connections of its application to its proxy, which is a
/// server that answers by itself.
struct Crowd {
    row: &'static str,
    _clients: Vec<Process>,
    proxies: Vec<Process>,
    connects: Client,
    cycles: Client,
    _agent: Option<Agent>,
    _pod: Pod,
    _node: Node,
}

impl Crowd {
    fn start(row: &'static str, way: Way, open: usize, cores: Cores, rate: u32) -> Self {
        say(format_args!("  {row}"));
        let node = Node::new();
        let pod = bench_pod(&node, "crowd");
        for number in 0..PROCESSES {
            let address = Self::source(number);
            pod.netns().ip(&format!("addr add {address}/32 dev eth0\n"));
        }
        let agent = redirect(way, &node, &[&pod]);
        let proxy = Role::Server(OUTBOUND_PORT);
        let start = || proxy.start(pod.netns(), Owner::PROXY);
        let proxies = on_core(cores.client, || (0..PROCESSES).map(|_| start()).collect());
        // The first of them holds what is left over.
        let (each, rest) = (open / usize::from(PROCESSES), open % usize::from(PROCESSES));
        let clients: Vec<_> = (0..PROCESSES)
            .map(|number| Self::hold(&pod, number, each + if number == 0 { rest } else { 0 }))
            .collect();
        for client in &clients {
            client.wait_for_line(role::READY, DEADLINE);
        }
        let (to, threads) = (Self::target(), AT_ONCE);
        let start = |job| Client::start(pod.netns(), cores.client, job);
        Self {
            row,
            _clients: clients,
            proxies,
            connects: start(Job::Connects { to, rate }),
            cycles: start(Job::Cycles { to, threads }),
            _agent: agent,
            _pod: pod,
            _node: node,
        }
    }

    /// Each process has an address of its own: one has not enough ports.
    fn source(number: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 42, 1, number + 1)
    }

    fn hold(pod: &Pod, number: u8, count: usize) -> Process {
        let job = Job::Hold {
            to: Self::target(),
            count,
            from: Some(Self::source(number).into()),
            requests: 1,
        };
        Role::Client(job).spawn(pod.netns(), Owner::APP)
    }

    fn target() -> std::net::SocketAddr {
        (Node::OUTSIDE, PORT).into()
    }

    fn measure(&mut self, effort: &Effort, report: &mut Report) {
        let took: Latency = self.connects.work(effort.connects_at_once());
        report.add(OPEN, OPEN_CALL, self.row, took.calls.micro(0.5));

        let before = self.cpu();
        let done: Done = self.cycles.work(effort.flood);
        let proxies = self.cpu().saturating_sub(before);
        let cpu = each(proxies, done.cpu, done.count);
        report.add(OPEN, OPEN_CPU, self.row, cpu);
    }

    fn cpu(&self) -> std::time::Duration {
        let proxies = self.proxies.iter();
        proxies.map(|proxy| cpu_time(proxy.pid())).sum()
    }
}

/// Measures connections while few and many others are open.
pub(crate) fn open(
    effort: &Effort,
    interrupt: &Interrupt,
    report: &mut Report,
) -> Result<(), Interrupted> {
    const FEW: usize = 10;
    const MANY: usize = 100_000;
    let cores = Cores::choose();
    let rules = Way::Iptables("iptables-nft-restore");
    say(format_args!("Opening connections:"));
    let mut crowds = Vec::new();
    for (row, way, open) in [
        (OPEN_FEW, Way::Shunt(None), FEW),
        (OPEN_MANY, Way::Shunt(None), MANY),
        ("iptables-nft, 10 open", rules, FEW),
        ("iptables-nft, 100,000 open", rules, MANY),
    ] {
        go_on(interrupt)?;
        crowds.push(Crowd::start(row, way, open, cores, effort.rate));
    }
    for _ in 0..effort.turns {
        for crowd in &mut crowds {
            go_on(interrupt)?;
            crowd.measure(effort, report);
        }
        crowds.rotate_left(1);
    }
    Ok(())
}
