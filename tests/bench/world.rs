//! Two pods on a node, for each way in which a connection can come to a proxy.
//!
//! ```text
//! pod "client"                     pod "server"
//! application ──► proxy ─────────► proxy ──► application
//! ```

use std::{
    net::{Ipv4Addr, SocketAddr},
    process::Command,
    time::Duration,
};

use nix::unistd::Pid;
use serde_json::Value;
use shunt_istio_rules::Rules;
use shunt_tests::{
    Agent, Envoy, Netns, Node, Owner, Pod, Process,
    agent::{self, Place},
    command::output_of,
    deadline::DEADLINE,
    envoy, iptables,
    mesh::ISTIO_DEFAULTS,
};

use crate::{
    client::Client,
    load::Job,
    proxy::{INBOUND_PORT, OUTBOUND_PORT, PASSED, Routes},
    role::{Cores, Placement, Role, cpu_time, keep_process, on_core},
};

/// How many requests a connection has made of which memory is measured: more than it
/// takes to be spliced.
const REQUESTS: usize = 4;

/// Where the application that is called listens.
const SERVER_PORT: u16 = envoy::APPLICATION_PORT;

/// How a connection comes to the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// There is no proxy.
    Direct,
    /// The application calls it.
    Explicit,
    /// Rules, by the tool of this name.
    Iptables(&'static str),
    /// The same rules, said to nftables itself.
    Nftables,
    /// The agent, with this mode of splicing; `None` when it knows none.
    Shunt(Option<&'static str>),
}

impl Way {
    pub(crate) const DIRECT: &str = "direct";
    pub(crate) const EXPLICIT: &str = "explicit proxy";
    pub(crate) const IPTABLES_NFT: &str = "iptables-nft";
    pub(crate) const SHUNT_OFF: &str = "shunt off";
    pub(crate) const SHUNT_BETWEEN: &str = "shunt between";
    pub(crate) const SHUNT_PROXY: &str = "shunt proxy";
    pub(crate) const SHUNT_ALL: &str = "shunt all";

    /// As it is called in tables.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Direct => Self::DIRECT,
            Self::Explicit => Self::EXPLICIT,
            Self::Iptables("iptables-nft-restore") => Self::IPTABLES_NFT,
            Self::Iptables(_) => "iptables-legacy",
            Self::Nftables => "nftables",
            Self::Shunt(None | Some("off")) => Self::SHUNT_OFF,
            Self::Shunt(Some("between")) => Self::SHUNT_BETWEEN,
            Self::Shunt(Some("proxy")) => Self::SHUNT_PROXY,
            Self::Shunt(Some(_)) => Self::SHUNT_ALL,
        }
    }
}

/// Modes of splicing, the least first.
const MODES: [&str; 4] = ["off", "between", "proxy", "all"];

/// The modes to compare, as far as the agent at hand knows them.
///
/// # Panics
///
/// When there is no agent.
pub(crate) fn shunt_ways() -> Vec<Way> {
    let help = agent::run(Command::new(agent::binary()).args(["run", "--help"])).stdout;
    let known = known_modes(&help);
    if known.is_empty() {
        return vec![Way::Shunt(None)];
    }
    known
        .into_iter()
        .map(|mode| Way::Shunt(Some(mode)))
        .collect()
}

/// The modes in a list of what `--splice` takes; none where there is no such
/// flag.
fn known_modes(help: &str) -> Vec<&'static str> {
    let about = help.split_once("--splice").map_or("", |(_, rest)| rest);
    let is_known = |mode: &&str| about.contains(&format!("- {mode}:"));
    MODES.into_iter().filter(is_known).collect()
}

/// Whether an agent splices as it was asked to, by what its status says.
fn does_as_asked(asked: &str, splice: &Value) -> Result<(), String> {
    match splice["mode"].as_str() {
        Some(mode) if mode != asked => Err(format!(
            "the agent was started with `--splice {asked}` and is in the mode `{mode}`: {}",
            splice["reason"].as_str().unwrap_or("it does not say why")
        )),
        _ => Ok(()),
    }
}

/// Who the proxies are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// [`crate::proxy`]
    Minimal,
    /// The real one.
    Envoy,
}

impl Kind {
    /// As it is called in headings.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Minimal => "minimal proxy",
            Self::Envoy => "two Envoys",
        }
    }

    /// How many of so many connections it takes at once: Envoy's limit is 1024 for each
    /// destination (`circuit_breakers`), and some may be about to end.
    pub(crate) fn takes_of(self, count: usize) -> usize {
        match self {
            Self::Minimal => count,
            Self::Envoy => count.min(1000),
        }
    }
}

/// The two proxies.
#[derive(Debug)]
enum Sidecars {
    None,
    Minimal([Process; 2]),
    Envoy([Envoy; 2]),
}

impl Sidecars {
    fn pids(&self) -> Vec<Pid> {
        match self {
            Self::None => Vec::new(),
            Self::Minimal(both) => both.iter().map(Process::pid).collect(),
            Self::Envoy(both) => both.iter().map(Envoy::pid).collect(),
        }
    }
}

/// What one way is measured in. It takes itself away when it is dropped, the
/// processes first.
#[derive(Debug)]
pub(crate) struct Site {
    way: Way,
    kind: Kind,
    cores: Cores,
    server: Process,
    sidecars: Sidecars,
    _agent: Option<Agent>,
    client_pod: Pod,
    server_pod: Pod,
    _node: Node,
}

impl Site {
    /// Sets it up; a request has gone the way when this returns.
    ///
    /// # Errors
    ///
    /// Why this machine cannot do it.
    ///
    /// # Panics
    ///
    /// When something does not start, or the request does not go the way.
    pub(crate) fn start(way: Way, kind: Kind, cores: Cores) -> Result<Self, String> {
        let node = Node::new();
        let client_pod = bench_pod(&node, "client");
        let server_pod = bench_pod(&node, "server");
        let agent = redirect(way, &node, &[&client_pod, &server_pod]);
        if let (Way::Shunt(Some(mode)), Some(agent)) = (way, &agent) {
            does_as_asked(mode, &agent.status()["splice"])?;
        }
        let server = on_core(cores.server, || {
            Role::Server(SERVER_PORT).start(server_pod.netns(), Owner::APP)
        });
        let sidecars = start_sidecars(way, kind, cores, &client_pod, &server_pod);
        let site = Self {
            way,
            kind,
            cores,
            server,
            sidecars,
            _agent: agent,
            client_pod,
            server_pod,
            _node: node,
        };
        site.try_out();
        Ok(site)
    }

    /// One connection, which both proxies must have seen.
    fn try_out(&self) {
        let _held = self.hold(1);
        match &self.sidecars {
            Sidecars::None => {}
            Sidecars::Minimal(both) => {
                for (proxy, passed) in both.iter().zip(PASSED) {
                    proxy.wait_for_line(passed, DEADLINE);
                }
            }
            Sidecars::Envoy(both) => {
                for (envoy, listener) in both.iter().zip([envoy::OUTBOUND, envoy::INBOUND]) {
                    let accepted: u64 = envoy.connections_by_worker(listener).iter().sum();
                    assert!(accepted > 0, "{}: it went past an Envoy", self.name());
                }
            }
        }
    }

    /// The name of its way.
    pub(crate) fn name(&self) -> &'static str {
        self.way.name()
    }

    /// Which proxies it has.
    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// Where the application connects to.
    pub(crate) fn target(&self) -> SocketAddr {
        match self.way {
            Way::Explicit => (Ipv4Addr::LOCALHOST, OUTBOUND_PORT).into(),
            Way::Direct | Way::Iptables(_) | Way::Nftables | Way::Shunt(_) => {
                (self.server_pod.ip(), SERVER_PORT).into()
            }
        }
    }

    /// Starts a client of its own for this job.
    ///
    /// # Panics
    ///
    /// When it cannot be started, or cannot connect.
    pub(crate) fn client(&self, job: Job) -> Client {
        Client::start(self.client_pod.netns(), self.cores.client, job)
    }

    /// Moves the pod that is called to where it is to work.
    ///
    /// # Panics
    ///
    /// When the kernel refuses.
    pub(crate) fn place(&self, placement: Placement) {
        let core = self.cores.of_server(placement);
        let sidecar = self.sidecars.pids().into_iter().nth(1);
        for pid in sidecar.into_iter().chain([self.server.pid()]) {
            keep_process(pid, core);
        }
    }

    /// CPU time that all on the way but the client have used.
    ///
    /// # Panics
    ///
    /// When one of them has ended.
    pub(crate) fn cpu(&self) -> Duration {
        let proxies = self.sidecars.pids();
        let all = proxies.into_iter().chain([self.server.pid()]);
        all.map(cpu_time).sum()
    }

    /// Opens connections all the way, which last until the result is dropped. Each has made
    /// [`REQUESTS`], after which it is spliced where that is done.
    ///
    /// # Panics
    ///
    /// When one of them fails.
    pub(crate) fn hold(&self, count: usize) -> Process {
        let job = Job::Hold {
            to: self.target(),
            count,
            from: None,
            requests: REQUESTS,
        };
        Role::Client(job).start(self.client_pod.netns(), Owner::APP)
    }

    /// Forgets the tracked connections that have ended, and all others.
    ///
    /// # Panics
    ///
    /// When `conntrack` fails.
    pub(crate) fn forget_tracked(&self) {
        for pod in [&self.client_pod, &self.server_pod] {
            output_of(pod.netns().command("conntrack", Owner::ROOT).arg("-F"));
        }
    }
}

/// A pod in which hundreds of thousands of connections can come and go.
///
/// # Panics
///
/// When it cannot be made.
pub(crate) fn bench_pod(node: &Node, name: &str) -> Pod {
    let pod = node.pod(name);
    many_connections(pod.netns());
    pod
}

/// Ports for many connections that follow each other: a port whose connection
/// has ended can be used after a second. They begin above every listener.
///
/// # Panics
///
/// When the kernel refuses.
pub(crate) fn many_connections(netns: &Netns) {
    netns.sysctl("net.ipv4.tcp_tw_reuse", "1");
    netns.sysctl("net.ipv4.ip_local_port_range", "20000 65000");
}

/// Sets up the redirection of these pods.
///
/// # Panics
///
/// When it is refused.
pub(crate) fn redirect(way: Way, node: &Node, pods: &[&Pod]) -> Option<Agent> {
    let splice = match way {
        Way::Shunt(splice) => splice,
        Way::Direct | Way::Explicit => return None,
        Way::Iptables(tool) => {
            let rules = Rules::istio().ipv4();
            for pod in pods {
                iptables::restore_with(tool, pod.netns(), &rules);
            }
            return None;
        }
        Way::Nftables => {
            for pod in pods {
                iptables::load_nft(pod.netns(), include_str!("sidecar.nft"));
            }
            return None;
        }
    };
    let flags = splice.map_or_else(Vec::new, |mode| vec!["--splice", mode]);
    let agent = Agent::start_with(Place::new(node.cgroup()), &flags);
    for pod in pods {
        agent.enroll(pod.netns(), &ISTIO_DEFAULTS);
    }
    Some(agent)
}

fn start_sidecars(way: Way, kind: Kind, cores: Cores, client: &Pod, server: &Pod) -> Sidecars {
    let pods = [(client, cores.client), (server, cores.server)];
    match (way, kind) {
        (Way::Direct, _) => Sidecars::None,
        (_, Kind::Minimal) => Sidecars::Minimal(pods.map(|(pod, core)| {
            let proxy = Role::Proxy(routes(way, server));
            on_core(core, || proxy.start(pod.netns(), Owner::PROXY))
        })),
        (_, Kind::Envoy) => Sidecars::Envoy(pods.map(|(pod, core)| {
            let config = envoy_config(way, pod, server);
            on_core(core, || Envoy::start_with(pod, &config))
        })),
    }
}

/// The sidecar's, without its log: a line for each connection would be a part
/// of what a connection costs.
fn envoy_config(way: Way, pod: &Pod, server: &Pod) -> String {
    if way == Way::Explicit {
        let config = include_str!("envoy-explicit.yaml");
        return config.replace("SERVER_IP", &server.ip().to_string());
    }
    let config = envoy::config(pod);
    let lines = config.lines();
    let silent = lines.filter(|line| !line.trim_start().starts_with("access_log:"));
    silent.collect::<Vec<_>>().join("\n")
}

fn routes(way: Way, server: &Pod) -> Routes {
    if way == Way::Explicit {
        Routes::Fixed {
            outbound: (server.ip(), INBOUND_PORT).into(),
            inbound: (server.ip(), SERVER_PORT).into(),
        }
    } else {
        Routes::OriginalDestination
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_that_does_not_splice_is_found_out() {
        let status = serde_json::json!({"mode": "off", "reason": "no BTF"});
        let why = does_as_asked("all", &status).expect_err("it is off");
        assert!(why.ends_with("in the mode `off`: no BTF"), "{why}");
        assert_eq!(does_as_asked("off", &status), Ok(()));
        assert_eq!(does_as_asked("off", &Value::Null), Ok(()));
    }

    #[test]
    fn modes_are_those_of_the_flag() {
        let help = "  --cgroup <PATH>  not at all\n  --splice <MODE>\n    - off:  Not at all\n    - all:  x\n";
        assert_eq!(known_modes(help), ["off", "all"]);
        assert!(known_modes("  --cgroup <PATH>\n    - off: no\n").is_empty());
    }
}
