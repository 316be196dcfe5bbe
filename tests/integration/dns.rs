//! DNS capture: real programs ask real servers, in a pod that carries Istio's
//! own rules and in one that is enrolled. Both must hear the same.

mod others;
mod sockets;
mod tools;
mod verdicts;

use std::{
    fmt::Debug,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
};

use shunt_tests::{
    Agent, DnsServer, Families, Node, Owner, Pod, Responder, Stack, dns::Capture,
    leftovers::temp_dir,
};
use tempfile::TempDir;

/// What the proxy's server answers; the others answer with their own address.
const PROXY: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 53);
/// The first of the pod's resolvers.
const RESOLVER: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
/// The second.
const SECOND: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 11);
/// A server that is none of them.
const STRANGER: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 12);
/// The pod.
const POD: Ipv4Addr = Ipv4Addr::new(10, 42, 0, 2);
/// Where the pod has a server of its own.
const LOCAL: [Ipv4Addr; 3] = [POD, Ipv4Addr::LOCALHOST, Ipv4Addr::new(127, 0, 0, 2)];

/// Everybody has an address of each family and is called by that of IPv4; this
/// is the other. Only 127.0.0.2 has none.
fn ipv6(ip: Ipv4Addr) -> Option<Ipv6Addr> {
    match ip.octets() {
        [10, 96, 0, host] => Some(Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, host.into())),
        [10, 42, 0, host] => Some(Ipv6Addr::new(0xfd00, 0x42, 0, 0, 0, 0, 0, host.into())),
        [127, 0, 0, 1] => Some(Ipv6Addr::LOCALHOST),
        _ => None,
    }
}

/// The addresses of somebody who is called by this one.
fn addresses(ip: Ipv4Addr) -> Vec<IpAddr> {
    let ipv6 = ipv6(ip).map(IpAddr::V6);
    [IpAddr::V4(ip)].into_iter().chain(ipv6).collect()
}

/// Capture of what goes to the two resolvers.
fn resolvers() -> Capture {
    Capture {
        resolvers: [RESOLVER, SECOND].map(addresses).concat(),
        ..Capture::default()
    }
}

/// A pod with a proxy that answers DNS, and the servers that it may ask.
struct World {
    _agent: Option<Agent>,
    _proxy: Option<DnsServer>,
    servers: Vec<DnsServer>,
    _tcp_proxy: Responder,
    directory: TempDir,
    pod: Pod,
    node: Node,
}

impl World {
    /// Nothing is redirected yet, and nobody answers for the proxy.
    fn new(capture: &Capture) -> Self {
        let node = Node::new();
        let outside = [RESOLVER, SECOND, STRANGER];
        for ip in outside.map(addresses).concat() {
            node.netns().ip(&format!("addr add {ip} dev lo"));
        }
        let pod = node.pod_with("pod", Stack::Dual);
        let directory = temp_dir("dns");
        std::fs::write(directory.path().join("resolv.conf"), capture.resolv_conf())
            .expect("a new file");
        let outside = outside.map(|ip| (node.netns(), ip));
        let local = LOCAL.map(|ip| (&**pod.netns(), ip));
        Self {
            _agent: None,
            _proxy: None,
            servers: outside
                .into_iter()
                .chain(local)
                .map(|(netns, ip)| DnsServer::start(netns, Owner::ROOT, (&addresses(ip), 53), ip))
                .collect(),
            _tcp_proxy: Responder::start_for(
                Families::Split,
                pod.netns(),
                Owner::PROXY,
                &[15001, 15006],
            ),
            directory,
            pod,
            node,
        }
    }

    fn with_proxy(self) -> Self {
        let address = (&addresses(Ipv4Addr::LOCALHOST)[..], 15053);
        let proxy = DnsServer::start(self.pod.netns(), Owner::PROXY, address, PROXY);
        Self {
            _proxy: Some(proxy),
            ..self
        }
    }

    /// With the mesh's own rules.
    fn with_rules(self, capture: &Capture) -> Self {
        capture.load_rules(self.pod.netns());
        self
    }

    /// With an agent, and settings that mean the same.
    fn enrolled(self, capture: &Capture) -> Self {
        let agent = Agent::start(self.node.cgroup());
        let flags = capture.flags(&self.resolv_conf());
        let flags: Vec<_> = flags.iter().map(String::as_str).collect();
        agent.enroll(self.pod.netns(), &flags);
        Self {
            _agent: Some(agent),
            ..self
        }
    }

    fn resolv_conf(&self) -> PathBuf {
        self.directory.path().join("resolv.conf")
    }

    /// Does `work` in the pod, with sockets of `owner`.
    fn as_owner<T: Send>(&self, owner: Owner, work: impl FnOnce() -> T + Send) -> T {
        self.pod.netns().run(|| {
            owner.assume();
            work()
        })
    }

    /// How many questions have come to the servers, the proxy's left out.
    fn asked_past_the_proxy(&self) -> usize {
        self.servers.iter().map(|s| s.asked_by().len()).sum()
    }
}

/// What `look` sees in an enrolled pod, which must be what it sees in one with
/// rules.
#[track_caller]
fn same_with_rules<T: PartialEq + Debug>(capture: &Capture, look: impl Fn(&World) -> T) -> T {
    let ruled = look(&World::new(capture).with_proxy().with_rules(capture));
    let enrolled = look(&World::new(capture).with_proxy().enrolled(capture));
    assert_eq!(enrolled, ruled, "enrolled on the left, rules on the right");
    enrolled
}

/// A word for whoever gives this answer.
fn who(answer: Ipv4Addr) -> String {
    if answer == PROXY {
        "15053".to_owned()
    } else {
        IpAddr::from(answer).to_string()
    }
}
