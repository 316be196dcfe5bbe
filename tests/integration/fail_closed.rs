//! What has to be redirected and cannot be fails: nothing goes out directly.
//!
//! Each error that the programs count (`shunt_abi::ErrorCode`), which way its
//! connection goes, and how it is provoked:
//!
//! | error | the connection | provoked by |
//! |---|---|---|
//! | `remember_failed` | its connect() fails with ENOMEM | no memory for socket storage |
//! | `bind_failed` | its connect() fails | an IPv6-only socket, an IPv4 destination |
//! | `owner_unknown` | is an application's, as iptables has it | an MPTCP subflow, which the kernel opens |
//! | `publish_failed` | reaches the proxy without original destination | `FLOWS` full |
//! | `keep_failed` | reaches the proxy without original destination | no memory for socket storage |
//! | `listener_failed` | inbound it is refused | no memory, and `LISTENERS` full |
//! | `proxy_away` | inbound it is refused | no listener |
//! | `proxy_away_outbound` | outbound it is refused | no listener |
//! | `assign_failed` | inbound it is refused | a listener that takes IPv6 only |
//! | `no_route` | its connect() fails as without redirection | no route |
//!
//! The maps that the agent fills are full when a pod is enrolled: that fails,
//! and changes nothing.

mod enrolling;
mod inbound;
mod outbound;

use std::net::SocketAddr;

use shunt_tests::{Agent, Node, Owner, agent::Place, mesh::ISTIO_DEFAULTS};
use socket2::{Domain, Socket, Type};

use crate::lab::{Lab, PORT};

const OUTSIDE: SocketAddr = SocketAddr::new(Node::OUTSIDE, PORT);

/// An agent some of whose maps are of another size, `NAME=ENTRIES`, and that has
/// enrolled the pod as Istio does.
fn enrolled_with(lab: &Lab, map_limits: &[&str]) -> Agent {
    let agent = agent_with(lab, map_limits);
    agent.enroll(lab.pod.netns(), &ISTIO_DEFAULTS);
    agent
}

fn agent_with(lab: &Lab, map_limits: &[&str]) -> Agent {
    let arguments: Vec<String> = map_limits
        .iter()
        .map(|limit| format!("--map-limit={limit}"))
        .collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    Agent::start_with(Place::new(lab.node.cgroup()), &arguments)
}

/// How much memory the options and the storage of one socket may take; a
/// parameter of each network namespace since Linux 6.8.
const SOCKET_MEMORY: &str = "net.core.optmem_max";
const NO_MEMORY: &str = "16";
const MEMORY: &str = "131072";

/// A new TCP socket, opened by `owner`.
fn open(domain: Domain, owner: Owner) -> Socket {
    owner.assume();
    let socket = Socket::new(domain, Type::STREAM, None).expect("a new socket");
    Owner::ROOT.assume();
    socket
}
