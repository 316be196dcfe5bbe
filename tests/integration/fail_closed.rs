//! What has to be redirected and cannot be fails: nothing goes out directly.
//!
//! Each error that the programs count ([`ErrorCode`] in `shunt-abi`), which way
//! its connection goes, and how it is provoked here:
//!
//! | error | the connection | provoked by |
//! |---|---|---|
//! | `remember_failed` | connect() fails with ENOMEM | no memory for socket options |
//! | `owner_unknown` | is the application's, as iptables has it | a subflow that the kernel opens |
//! | `publish_failed` | reaches the proxy without original destination | `FLOWS` full |
//! | `keep_failed` | reaches the proxy without original destination | no memory for socket options |
//! | `listener_failed` | inbound is refused until the agent finds the listener | no memory, `LISTENERS` full |
//! | `proxy_away` | inbound is refused | no listener |
//! | `assign_failed` | inbound is refused | a listener for IPv6 only |
//! | `no_route` | connect() fails as without redirection | no route |
//!
//! Maps that the agent fills are full when a pod is enrolled: it is told, and
//! nothing has changed.
//!
//! [`ErrorCode`]: https://docs.rs/shunt-abi

mod enrolling;
mod handshakes;
mod listeners;

use std::{
    io::Read,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use nix::errno::Errno;
use serde_json::Value;
use shunt_tests::{
    Agent, Node, Owner, Pod, Responder,
    agent::Place,
    deadline::{DEADLINE, wait_until},
    mesh::ISTIO_DEFAULTS,
};
use socket2::{Domain, Socket, Type};

use crate::lab::{Lab, PORT};

const OUTSIDE: SocketAddr = SocketAddr::new(Node::OUTSIDE, PORT);

/// Starts an agent some of whose maps are of another size: `NAME=ENTRIES`.
fn agent_with(lab: &Lab, limits: &[&str]) -> Agent {
    let mut command = Place::new(lab.node.cgroup());
    for limit in limits {
        command = command.with_argument(&format!("--map-limit={limit}"));
    }
    Agent::start_in(command)
}

/// How often the pod with this index has met an error.
fn errors(agent: &Agent, name: &str) -> u64 {
    let status = agent.status();
    let pods = status["pods"].as_array().expect("status lists pods");
    pods.iter()
        .filter_map(|pod| pod["counters"]["errors"][name].as_u64())
        .sum()
}
