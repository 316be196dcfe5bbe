//! Two pods with real applications and real Envoys, and the way that requests
//! take between them: without an iptables rule, without connection tracking,
//! without a packet rewritten.
//!
//! `cargo xtask demo` builds and runs it.
#![expect(
    unused_crate_dependencies,
    reason = "these are the dependencies of the harness"
)]
#![expect(clippy::print_stdout, reason = "it is there to be watched")]

mod picture;

use std::{net::SocketAddr, process::ExitCode};

use shunt_tests::{
    Agent, MeshPod, Node, envoy,
    interrupt::Interrupt,
    mesh::{ISTIO_DEFAULTS, Journey, Traces, moved},
};

use picture::Picture;

fn main() -> ExitCode {
    shunt_tests::require_root();
    match run(&Interrupt::watch()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Stopped::Interrupted) => {
            println!("\nInterrupted: everything is cleaned up.");
            ExitCode::from(130)
        }
        Err(Stopped::Failed(why)) => {
            println!("\nThe demo has failed: {why}");
            ExitCode::FAILURE
        }
    }
}

/// Why the demo ends before its end.
enum Stopped {
    Interrupted,
    Failed(String),
}

impl From<String> for Stopped {
    fn from(why: String) -> Self {
        Self::Failed(why)
    }
}

/// Says what comes next, unless somebody wants it not to come.
struct Steps<'a> {
    interrupt: &'a Interrupt,
    number: u32,
}

impl Steps<'_> {
    fn next(&mut self, what: &str) -> Result<(), Stopped> {
        if self.interrupt.is_wanted() {
            return Err(Stopped::Interrupted);
        }
        self.number += 1;
        println!("{}. {what}", self.number);
        Ok(())
    }
}

/// Everything that is made here undoes itself when this returns, in whichever
/// way.
fn run(interrupt: &Interrupt) -> Result<(), Stopped> {
    let mut steps = Steps {
        interrupt,
        number: 0,
    };
    steps.next("A node: a network namespace with a bridge, and the hosts outside as addresses.")?;
    let node = Node::new();
    println!("   {} ({})", node.netns().name(), Node::GATEWAY);

    steps
        .next("Two pods on the bridge, each with a web server (uid 1000) and Envoy (uid 1337).")?;
    let client = MeshPod::start(&node, "client");
    let server = MeshPod::start(&node, "server");
    for pod in [&client, &server] {
        println!("   {} ({})", pod.pod().netns().name(), pod.pod().ip());
    }

    steps.next("A request before anything is redirected: it goes past both Envoys.")?;
    show_request(&client, server.address())?;
    let before = [client.envoy().counters(), server.envoy().counters()];

    steps.next("The agent: it loads its programs and attaches them.")?;
    let agent = Agent::start(node.cgroup());
    println!("   {}", agent.log().lines().last().unwrap_or_default());

    steps.next("Both pods are enrolled, with the flags that Istio gives istio-iptables.")?;
    println!("   shunt enroll --netns POD {}", ISTIO_DEFAULTS.join(" "));
    client.enroll(&agent);
    server.enroll(&agent);

    steps.next("The same request again.")?;
    show_request(&client, server.address())?;
    let to_server = Journey::of(&client, server.address(), &server);

    steps.next("The client calls a service, whose endpoint happens to be its own pod.")?;
    show_request(&client, envoy::SERVICE)?;
    let to_itself = Journey::of(&client, envoy::SERVICE, &client);

    steps.next("What is there to see.")?;
    println!();
    print!("{}", Picture::of("client", "server", &to_server));
    print!("{}", Picture::of("client", "client", &to_itself));

    let after = [client.envoy().counters(), server.envoy().counters()];
    for (index, pod) in [&client, &server].into_iter().enumerate() {
        let moved = moved(&before[index], &after[index]);
        let count = |name: &str| moved.get(name).copied().unwrap_or(0);
        let traces = pod.traces();
        println!(
            "{}\n   Envoy's counters: {} out, {} in, {} that it could not place\n   \
             iptables-save: {} rules; conntrack: {} entries",
            pod.pod().netns().name(),
            count("tcp.out.downstream_cx_total") + count("tcp.service.downstream_cx_total"),
            count("tcp.in.downstream_cx_total"),
            count("tcp.blackhole.downstream_cx_total"),
            traces.rules,
            traces.conntrack,
        );
        if traces != Traces::NONE {
            return Err(Stopped::Failed(
                "something has left traces in a pod".to_owned(),
            ));
        }
    }
    println!();
    steps.next("Done: the agent ends, and everything is taken away again.")?;
    drop(agent.stop());
    Ok(())
}

fn show_request(client: &MeshPod, server: SocketAddr) -> Result<(), Stopped> {
    println!("   GET http://{server}/");
    let response = client.get(server)?;
    println!("   {} {}", response.status, response.body.trim_end());
    Ok(())
}
