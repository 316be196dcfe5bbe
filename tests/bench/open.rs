//! Whether connections cost more while many others are open.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use shunt_tests::{Agent, Node, Owner, Pod, Process, deadline::DEADLINE, interrupt::Interrupt};

use crate::{
    Interrupted,
    client::Client,
    figures::{OPEN_CALL, OPEN_CPU},
    go_on,
    load::{Done, Job, Latency},
    proxy::OUTBOUND_PORT,
    report::Report,
    role::{self, Cores, Role, cpu_time, on_core},
    rounds::{AT_ONCE, Effort, each},
    say,
    world::{Way, bench_pod, redirect},
};

/// The setting of connections while others are open.
pub(crate) const OPEN: &str = "open connections";
/// Its row with few of them.
pub(crate) const FEW_OPEN: &str = "shunt, 10 open";
/// Its row with many.
pub(crate) const MANY_OPEN: &str = "shunt, 100,000 open";

/// Where the application calls.
const PORT: u16 = 8080;

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

    fn target() -> SocketAddr {
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

    fn cpu(&self) -> Duration {
        let proxies = self.proxies.iter();
        proxies.map(|proxy| cpu_time(proxy.pid())).sum()
    }
}

/// Measures connections while few and many others are open.
pub(crate) fn connections(
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
        (FEW_OPEN, Way::Shunt(None), FEW),
        (MANY_OPEN, Way::Shunt(None), MANY),
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
