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
mod install;
mod isolation;
mod load;
mod network;
mod pods;
mod scenarios;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    process::ExitCode,
    time::Instant,
};

use shunt_tests::{Process, envoy, netns::node_command};

use crate::{cluster::Cluster, image::Image, scenarios::Scenario};

fn main() -> ExitCode {
    isolation::on_a_node(|filter| {
        let wanted: Vec<_> = scenarios::ALL
            .iter()
            .filter(|scenario| is_wanted(scenario, filter))
            .collect();
        run(&wanted)
    })
}

fn is_wanted(scenario: &Scenario, filter: &[String]) -> bool {
    let mut words = filter
        .iter()
        .filter(|word| !word.starts_with('-'))
        .peekable();
    words.peek().is_none() || words.any(|word| scenario.name.contains(word.as_str()))
}

/// Runs them on a cluster, and says so as cargo's test runner does.
fn run(wanted: &[&Scenario]) -> ExitCode {
    let start = Instant::now();
    println!("\nrunning {} tests", wanted.len());
    let mut failed = 0;
    if !wanted.is_empty() {
        let (cluster, outside) = furnish();
        println!(
            "(the node is ready after {:.1} s)",
            start.elapsed().as_secs_f64()
        );
        for scenario in wanted {
            if !passes(scenario, &cluster) {
                failed += 1;
            }
        }
        drop(outside);
        cluster.end();
    }
    println!(
        "\ntest result: {}. {} passed; {failed} failed; 0 ignored; 0 measured; {} filtered out; finished in {:.2}s",
        if failed == 0 { "ok" } else { "FAILED" },
        wanted.len() - failed,
        scenarios::ALL.len() - wanted.len(),
        start.elapsed().as_secs_f64(),
    );
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn passes(scenario: &Scenario, cluster: &Cluster) -> bool {
    let start = Instant::now();
    // The cluster is as it was left, which the next scenario copes with.
    let passed = catch_unwind(AssertUnwindSafe(|| (scenario.run)(cluster))).is_ok();
    println!(
        "test {} ... {} ({:.1} s)",
        scenario.name,
        if passed { "ok" } else { "FAILED" },
        start.elapsed().as_secs_f64()
    );
    if !passed {
        println!(
            "{}\n--- the agent\n{}",
            cluster.logs(),
            install::log(cluster).join("\n")
        );
        cluster.clear();
    }
    passed
}

/// A cluster with the images, and the server outside.
fn furnish() -> (Cluster, Process) {
    let cluster = Cluster::start();
    cluster.import(
        &Image::new(image::TOOL, &["/pod-tool", "stay"])
            .with_program(Path::new(env!("CARGO_BIN_EXE_pod-tool")), "/pod-tool")
            .with_program(&envoy::binary(), "/envoy")
            .with_directory("/tmp"),
    );
    install::import(&cluster);
    let mut command = node_command("ip");
    command
        .args(["netns", "exec", network::OUTSIDE_NETNS])
        .arg(env!("CARGO_BIN_EXE_pod-tool"))
        .args(["serve", &pods::PORT.to_string()]);
    // Its process has a /sys of its own, which it does not look at.
    let outside = Process::spawn("the server outside", &mut command);
    outside.wait_for_line("serving", shunt_tests::deadline::DEADLINE);
    (cluster, outside)
}
