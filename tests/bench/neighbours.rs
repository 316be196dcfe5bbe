//! What it costs everybody else on the node, and what it takes to enrol one pod more.

use std::{
    mem,
    net::Ipv4Addr,
    thread,
    time::{Duration, Instant},
};

use shunt::settings::Field;
use shunt_tests::{
    Agent, Cgroup, Netns, Node, Owner, Process, empty_programs::EmptyPrograms, interrupt::Interrupt,
};

use crate::{
    Interrupted,
    client::Client,
    figures::{ENROL, OUTSIDE as CONNECT_OUTSIDE},
    go_on,
    load::{Job, Latency},
    report::Report,
    role::{Cores, Role, on_core},
    rounds::{Effort, take_turns},
    say,
    times::Times,
    world::{Way, many_connections, redirect},
};

/// The setting of a process outside the mesh.
pub(crate) const OUTSIDE: &str = "outside the mesh";
/// Its row on a machine without an agent.
pub(crate) const NO_AGENT: &str = "no agent";
/// Its row on such a machine while programs that do nothing hang on another cgroup. The kernel's
/// switches for programs (`cgroup_bpf_enabled_key`) are the machine's.
const EMPTY_ELSEWHERE: &str = "empty programs elsewhere";
/// Its row while they hang on its own node's cgroup.
const EMPTY: &str = "empty programs";
/// Its row on a node without an agent, while others of the machine have one.
const ELSEWHERE: &str = "an agent elsewhere";
/// Its row on a node with so many enrolled pods.
pub(crate) const PODS_1000: &str = "1,000 pods";
/// The setting of enrolling another pod.
pub(crate) const ENROLLING: &str = "enrolling";
/// Its row on a node with nine pods.
pub(crate) const POD_10: &str = "10th pod";
/// Its row on a node with 999 pods.
pub(crate) const POD_1000: &str = "1,000th pod";

/// Where the process outside the mesh calls.
const PORT: u16 = 8080;

/// A node with a process that is in no pod.
struct Neighbour {
    _server: Process,
    client: Client,
    /// Of this turn.
    calls: Times,
    _outside: Netns,
    node: Node,
}

impl Neighbour {
    fn start(cores: Cores, rate: u32) -> Self {
        let node = Node::new();
        let outside = node.machine("outside");
        many_connections(&outside);
        let server = on_core(cores.client, || {
            Role::Server(PORT).start(&outside, Owner::APP)
        });
        let to = (Ipv4Addr::LOCALHOST, PORT).into();
        Self {
            _server: server,
            client: Client::start(&outside, cores.client, Job::Connects { to, rate }),
            calls: Times::new(),
            _outside: outside,
            node,
        }
    }

    /// A piece of a turn.
    fn piece(&mut self, effort: &Effort) {
        let took: Latency = self.client.work(effort.connects.1);
        self.calls.add(&took.calls);
    }

    /// Says what all pieces of a turn were, and begins anew.
    fn end_turn(&mut self, row: &'static str, report: &mut Report) {
        let calls = mem::replace(&mut self.calls, Times::new());
        report.add(OUTSIDE, CONNECT_OUTSIDE, row, calls.micro(0.5));
    }
}

/// Where programs that do nothing hang while a node without an agent has its piece of a turn.
#[derive(Clone, Copy)]
enum Place {
    Nowhere,
    /// On another cgroup.
    Elsewhere,
    /// On the node's own.
    Here,
}

/// What each node without an agent is in a turn; in the next one it is what the one beside it was.
/// Two are there for the processor's caches alone, which are as cold as later: in a full run as
/// many nodes are beside agents.
const ROWS: [(Option<&str>, Place); 5] = [
    (Some(NO_AGENT), Place::Nowhere),
    (Some(EMPTY_ELSEWHERE), Place::Elsewhere),
    (Some(EMPTY), Place::Here),
    (None, Place::Nowhere),
    (None, Place::Nowhere),
];

/// Nodes without an agent, on a machine without one. What hanging on the hooks costs by itself
/// is told apart here: programs that do nothing come and go between two pieces, which no agent
/// can.
struct Alone {
    neighbours: [Neighbour; ROWS.len()],
    programs: EmptyPrograms,
    /// Where they hang when it is on another cgroup.
    elsewhere: Cgroup,
}

impl Alone {
    fn start(cores: Cores, rate: u32) -> Self {
        say(format_args!("  {NO_AGENT}"));
        Self {
            neighbours: ROWS.map(|_| Neighbour::start(cores, rate)),
            programs: EmptyPrograms::new(),
            elsewhere: Cgroup::new(),
        }
    }

    /// Turns in which nobody else has one.
    fn measure(
        &mut self,
        turns: usize,
        effort: &Effort,
        interrupt: &Interrupt,
        report: &mut Report,
    ) -> Result<(), Interrupted> {
        let Self {
            neighbours,
            programs,
            elsewhere,
        } = self;
        for turn in 0..turns {
            let rows = ROWS.iter().cycle().skip(turn);
            let mut nodes: Vec<_> = neighbours.iter_mut().zip(rows).collect();
            take_turns(turn, effort, &mut nodes, interrupt, |(node, (_, place))| {
                let (cgroup, stay) = match place {
                    Place::Nowhere => (&*elsewhere, false),
                    Place::Elsewhere => (&*elsewhere, true),
                    Place::Here => (node.node.cgroup(), true),
                };
                let _hanging = programs.attach(cgroup.path(), stay);
                node.piece(effort);
            })?;
            for (node, (row, _)) in nodes {
                match row {
                    Some(row) => node.end_turn(row, report),
                    None => node.calls = Times::new(),
                }
            }
        }
        Ok(())
    }
}

/// A node with enrolled pods, or, without an agent, one beside such nodes.
struct WithPods {
    row: &'static str,
    agent: Option<Agent>,
    /// All but the last are enrolled for good.
    pods: Vec<Netns>,
    neighbour: Neighbour,
}

impl WithPods {
    /// `pods` is `None` where there is no agent.
    fn start(row: &'static str, pods: Option<usize>, cores: Cores, rate: u32) -> Self {
        say(format_args!("  {row}"));
        let neighbour = Neighbour::start(cores, rate);
        let node = &neighbour.node;
        let agent = pods.and_then(|_| redirect(Way::Shunt(None), node, &[]));
        let number = pods.unwrap_or(0);
        let pods: Vec<_> = (0..number).map(|_| node.machine("pod")).collect();
        if let Some(agent) = &agent {
            for pod in &pods {
                enrol(agent, pod);
            }
        }
        Self {
            row,
            agent,
            pods,
            neighbour,
        }
    }

    /// Enrols the last pod, where the time that this takes is measured.
    fn enrol_last(&self, report: &mut Report) {
        let (Some(row), Some(agent), Some(last)) =
            (self.row_of_last(), &self.agent, self.pods.last())
        else {
            return;
        };
        let start = Instant::now();
        enrol(agent, last);
        report.add(ENROLLING, ENROL, row, start.elapsed().as_secs_f64() * 1e3);
    }

    /// Takes it out again, so that it can come once more.
    fn unenrol_last(&self) {
        if let (Some(_), Some(agent), Some(last)) =
            (self.row_of_last(), &self.agent, self.pods.last())
        {
            agent.unenroll(last);
        }
    }

    fn row_of_last(&self) -> Option<&'static str> {
        match self.pods.len() {
            10 => Some(POD_10),
            1000 => Some(POD_1000),
            _ => None,
        }
    }
}

/// After a pod was taken out, and before it is enrolled again: what is still done for the former
/// would be a part of the latter.
const REST: Duration = Duration::from_millis(100);

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
pub(crate) fn measure(
    outside: bool,
    enrolling: bool,
    effort: &Effort,
    interrupt: &Interrupt,
    report: &mut Report,
) -> Result<(), Interrupted> {
    let cores = Cores::choose();
    say(format_args!("Setting up nodes with pods:"));
    // Half of its turns are before those of the others, and half after.
    let mut alone = outside.then(|| Alone::start(cores, effort.rate));
    if let Some(alone) = &mut alone {
        alone.measure(effort.turns.div_ceil(2), effort, interrupt, report)?;
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
            nodes.push(WithPods::start(row, pods, cores, effort.rate));
        }
    }
    if enrolling {
        nodes.iter().for_each(WithPods::unenrol_last);
    }
    for turn in 0..effort.turns {
        go_on(interrupt)?;
        if enrolling {
            thread::sleep(REST);
            nodes.iter().for_each(|node| node.enrol_last(report));
        }
        if outside {
            let piece = |node: &mut WithPods| node.neighbour.piece(effort);
            take_turns(turn, effort, &mut nodes, interrupt, piece)?;
            for WithPods { row, neighbour, .. } in &mut nodes {
                neighbour.end_turn(row, report);
            }
        }
        if enrolling {
            nodes.iter().for_each(WithPods::unenrol_last);
        }
        nodes.rotate_left(1);
    }
    drop(nodes);
    if let Some(alone) = &mut alone {
        alone.measure(effort.turns / 2, effort, interrupt, report)?;
    }
    Ok(())
}
