//! What it costs everybody else on the node, and what it takes to enrol one pod more.

use std::{mem, net::Ipv4Addr, time::Instant};

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
/// Its row on such a machine while programs that do nothing hang on another node's cgroup. The
/// kernel's switches for programs (`cgroup_bpf_enabled_key`) are the machine's.
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

/// A node with some enrolled pods and one process that is in none of them.
struct Neighbour {
    _server: Process,
    agent: Option<Agent>,
    /// All but the last are enrolled for good.
    pods: Vec<Netns>,
    client: Client,
    calls: Calls,
    _outside: Netns,
    node: Node,
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
            _server: server,
            agent,
            pods,
            client: Client::start(&outside, cores.client, Job::Connects { to, rate }),
            calls: Calls::of(row),
            _outside: outside,
            node,
        }
    }

    /// A piece of a turn.
    fn piece(&mut self, effort: &Effort) {
        self.calls.add(&self.client.work(effort.connects.1));
    }

    /// Enrols the last pod, where the time that this takes is measured.
    fn enrol_last(&self, report: &mut Report) {
        let (Some(row), Some(agent), Some(last)) = (self.last_of(), &self.agent, self.pods.last())
        else {
            return;
        };
        let start = Instant::now();
        enrol(agent, last);
        report.add(ENROLLING, ENROL, row, start.elapsed().as_secs_f64() * 1e3);
    }

    /// Takes it out again, so that it can come once more.
    fn unenrol_last(&self) {
        if let (Some(_), Some(agent), Some(last)) = (self.last_of(), &self.agent, self.pods.last())
        {
            agent.unenroll(last);
        }
    }

    /// The row of its last pod.
    fn last_of(&self) -> Option<&'static str> {
        match self.pods.len() {
            10 => Some(POD_10),
            1000 => Some(POD_1000),
            _ => None,
        }
    }
}

/// How long the calls of a row took, in the pieces of a turn.
struct Calls {
    row: &'static str,
    times: Times,
}

impl Calls {
    /// None yet.
    fn of(row: &'static str) -> Self {
        let times = Times::new();
        Self { row, times }
    }

    /// Takes in those of a piece.
    fn add(&mut self, took: &Latency) {
        self.times.add(&took.calls);
    }

    /// Says what all of them were, and begins anew.
    fn end_turn(&mut self, report: &mut Report) {
        let times = mem::replace(&mut self.times, Times::new());
        report.add(OUTSIDE, CONNECT_OUTSIDE, self.row, times.micro(0.5));
    }
}

/// A node without an agent, on a machine without one. What hanging on the hooks costs by itself
/// is told apart here: programs that do nothing come and go between two pieces, which no agent
/// can.
struct Alone {
    neighbour: Neighbour,
    programs: EmptyPrograms,
    /// Where else they may hang.
    elsewhere: Cgroup,
}

impl Alone {
    fn start(cores: Cores, rate: u32) -> Self {
        Self {
            neighbour: Neighbour::start(NO_AGENT, None, cores, rate),
            programs: EmptyPrograms::new(),
            elsewhere: Cgroup::new(),
        }
    }

    /// Turns in which nobody else has one.
    fn take_turns(
        &mut self,
        turns: usize,
        effort: &Effort,
        interrupt: &Interrupt,
        report: &mut Report,
    ) -> Result<(), Interrupted> {
        let Self {
            neighbour: Neighbour { client, node, .. },
            programs,
            elsewhere,
        } = self;
        let mut rows = [
            (Calls::of(NO_AGENT), None),
            (Calls::of(EMPTY_ELSEWHERE), Some(&*elsewhere)),
            (Calls::of(EMPTY), Some(node.cgroup())),
        ];
        for turn in 0..turns {
            take_turns(turn, effort, &mut rows, interrupt, |(calls, cgroup)| {
                let _hanging = cgroup.map(|cgroup| programs.attach(cgroup.path()));
                calls.add(&client.work(effort.connects.1));
            })?;
            for (calls, _) in &mut rows {
                calls.end_turn(report);
            }
        }
        Ok(())
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
        alone.take_turns(effort.turns.div_ceil(2), effort, interrupt, report)?;
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
    if enrolling {
        nodes.iter().for_each(Neighbour::unenrol_last);
    }
    for turn in 0..effort.turns {
        go_on(interrupt)?;
        if enrolling {
            nodes.iter().for_each(|node| node.enrol_last(report));
        }
        if outside {
            take_turns(turn, effort, &mut nodes, interrupt, |node| {
                node.piece(effort)
            })?;
            nodes
                .iter_mut()
                .for_each(|node| node.calls.end_turn(report));
        }
        if enrolling {
            nodes.iter().for_each(Neighbour::unenrol_last);
        }
        nodes.rotate_left(1);
    }
    drop(nodes);
    if let Some(alone) = &mut alone {
        alone.take_turns(effort.turns / 2, effort, interrupt, report)?;
    }
    Ok(())
}
