//! The parts that integration tests, demo and benchmark are written with: a node and
//! its pods, as network namespaces of one machine, with real processes in them.
//!
//! ```text
//! let node = Node::new();                       // a bridge, and hosts outside the mesh
//! let pod = node.pod("client");                 // a namespace on that bridge
//! let agent = Agent::start(node.cgroup());      // the real binary
//! agent.enroll(pod.netns(), &["-b", "*", "-i", "*"]);
//! let _proxy = Responder::start(pod.netns(), Owner::PROXY, &[15001, 15006]);
//! let answer = probe(pod.netns(), &Probe::new(Owner::APP, (OUTSIDE, 80)));
//! ```
//!
//! Everything has a name of its own, made of the process id and a number, so
//! that tests run side by side; everything undoes itself when it is dropped,
//! also while a test panics. What a killed process left behind is taken away
//! by the next one (see [`leftovers`]).
//!
//! These are tools of tests: a step that fails panics with the command, its
//! output and the remedy where there is one.

pub mod actor;
pub mod agent;
mod assembled;
pub mod blocked;
pub mod bpf;
pub mod cgroup;
pub mod command;
pub mod deadline;
pub mod dns;
pub mod empty_programs;
pub mod end;
pub mod envoy;
pub mod header_options;
pub mod held;
pub mod http;
pub mod interrupt;
pub mod iptables;
pub mod leftovers;
pub mod load;
pub mod memory_cgroup;
pub mod mesh;
pub mod netns;
pub mod node;
pub mod owner;
pub mod pattern;
pub mod probe;
pub mod process;
pub mod proxy;
pub mod responder;
mod service;
pub mod syscall;
pub mod uring;

use std::sync::Once;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
// The integration tests and the benchmark use them, which have the dependencies
// of this package.
use {
    anyhow as _, clap as _, hdrhistogram as _, kube as _, plotters as _, rand as _, shunt_abi as _,
    shunt_istio_rules as _,
};

pub use agent::{Agent, Splice};
pub use blocked::Blocked;
pub use cgroup::Cgroup;
pub use dns::DnsServer;
pub use end::{End, Record};
pub use envoy::Envoy;

pub use mesh::MeshPod;
pub use netns::Netns;
pub use node::{Node, Pod, Stack};
pub use owner::Owner;
pub use pattern::Pattern;
pub use probe::{Answer, Outcome, Probe, Source, connect_all, connect_all_here, probe, probe_all};
pub use process::Process;
pub use proxy::Proxy;
pub use responder::{Greeting, Responder};
pub use service::Families;

/// Panics unless this process is root: a test that cannot run has failed. The
/// first call in a process also makes it ready for tests.
///
/// # Panics
///
/// When the effective user is not root.
pub fn require_root() {
    static READY: Once = Once::new();
    assert!(
        nix::unistd::geteuid().is_root(),
        "this needs root, for network namespaces and BPF programs: run `cargo xtask test` as root"
    );
    READY.call_once(|| {
        leftovers::sweep();
        allow_many_files();
    });
}

/// Hundreds of connections of several tests are open at once, with both ends in
/// this process; 1024 files, as many shells allow, are not enough.
fn allow_many_files() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a process has this limit");
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("up to the hard limit it is free");
}
