//! What a pod behaves like, tried out on this machine's kernel: one module for
//! each behaviour.
//!
//! Every test makes its own node, with namespaces, cgroup and agent, and runs
//! beside the others. All of them need root, and fail without it.
#![expect(
    unused_crate_dependencies,
    reason = "these are the dependencies of the harness"
)]

mod check;
mod cli;
mod cni;
mod containers;
mod differential;
mod dns;
mod envoy;
mod fail_closed;
mod lab;
mod lifecycle;
mod many;
mod memory;
mod network;
mod observe;
mod owner;
mod programs;
mod scale;
mod semantics;
mod sockets;
mod splice;
mod stress;
mod upgrade;
mod userns;
mod r#virtual;
