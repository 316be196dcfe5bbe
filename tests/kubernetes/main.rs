//! A real node: a pod's life from the API server to its connections, with
//! Kubernetes' own programs, containerd, and Envoy as sidecar.
//!
//! All scenarios run on one cluster, one after the other. `cargo xtask test
//! --kubernetes` builds what is needed and runs this.
#![expect(
    unused_crate_dependencies,
    reason = "these are the dependencies of the harness"
)]
#![expect(clippy::print_stdout, reason = "it says what cargo's test runner says")]

mod api;
mod cluster;
mod image;
mod isolation;
mod network;

use std::process::ExitCode;

fn main() -> ExitCode {
    isolation::on_a_node(|arguments| {
        let cluster = cluster::Cluster::start();
        println!("up {arguments:?}");
        drop(cluster);
        ExitCode::SUCCESS
    })
}
