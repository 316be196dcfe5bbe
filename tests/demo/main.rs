//! Two pods with real applications and real Envoys, and the way that requests
//! take between them: without an iptables rule, without connection tracking,
//! without a packet rewritten.
//!
//! `cargo xtask demo` builds and runs it. With `--stay` everything stays for as long as a
//! shell runs that knows the pods: so it is used by `cargo xtask vm`.
#![expect(
    unused_crate_dependencies,
    reason = "these are the dependencies of the harness"
)]
#![expect(clippy::print_stdout, reason = "it is there to be watched")]

mod picture;
mod stay;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::PathBuf,
    process::{ExitCode, ExitStatus},
};

use clap::Parser;
use shunt_tests::{
    Agent, MeshPod, Node, envoy,
    interrupt::Interrupt,
    mesh::{ISTIO_DEFAULTS, Journey, Traces, moved},
};

use picture::Picture;

/// What the demo takes.
#[derive(Debug, Parser)]
struct Arguments {
    /// Leave everything as it is until a shell ends
    #[arg(long)]
    stay: bool,
    /// Run the commands in this file instead of a shell; the exit code is theirs
    #[arg(long, value_name = "FILE", requires = "stay")]
    run: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    shunt_tests::require_root();
    match run(&arguments, &Interrupt::watch()) {
        Ok(code) => code,
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
fn run(arguments: &Arguments, interrupt: &Interrupt) -> Result<ExitCode, Stopped> {
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
    if before.iter().any(|counters| sum(counters, ARRIVALS) > 0) {
        return Err(Stopped::Failed("it did not go past them".to_owned()));
    }

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

    for (pod, before) in [&client, &server].into_iter().zip(&before) {
        show_evidence(pod, before)?;
    }
    println!();
    let mut code = ExitCode::SUCCESS;
    if arguments.stay {
        steps.next("Everything stays.")?;
        let pods = [&client, &server];
        let ended = stay::shell(&node, &agent, pods, arguments.run.as_deref())
            .map_err(|error| format!("cannot start bash: {error}"))?;
        code = exit_code(ended);
    }
    steps.next("Done: the agent ends, and everything is taken away again.")?;
    drop(agent.stop());
    Ok(code)
}

/// That of a process that has ended; one that a signal has ended is a failure.
fn exit_code(ended: ExitStatus) -> ExitCode {
    let code = ended.code().and_then(|code| u8::try_from(code).ok());
    code.map_or(ExitCode::FAILURE, ExitCode::from)
}

/// Envoy's counters of connections that came to it to be passed on.
const ARRIVALS: &[&str] = &[
    "tcp.out.downstream_cx_total",
    "tcp.service.downstream_cx_total",
    "tcp.in.downstream_cx_total",
    "tcp.blackhole.downstream_cx_total",
];

fn sum(counters: &BTreeMap<String, u64>, names: &[&str]) -> u64 {
    names.iter().filter_map(|&name| counters.get(name)).sum()
}

/// What Envoy has counted since `before`, and what there is not.
fn show_evidence(pod: &MeshPod, before: &BTreeMap<String, u64>) -> Result<(), Stopped> {
    let moved = moved(before, &pod.envoy().counters());
    let (outbound, rest) = ARRIVALS.split_at(2);
    let (inbound, unplaced) = rest.split_at(1);
    let unplaced = sum(&moved, unplaced);
    let Traces { rules, conntrack } = pod.traces();
    println!("{} ({})", pod.pod().netns().purpose(), pod.pod().ip());
    println!(
        "   Envoy has counted     {} connections out, {} in, {unplaced} without a destination",
        sum(&moved, outbound),
        sum(&moved, inbound),
    );
    println!("   iptables-save has     {rules} rules");
    println!("   conntrack has         {conntrack} entries");
    if unplaced > 0 || rules > 0 || conntrack > 0 {
        return Err(Stopped::Failed("that is not how it should be".to_owned()));
    }
    Ok(())
}

fn show_request(client: &MeshPod, server: SocketAddr) -> Result<(), Stopped> {
    println!("   GET http://{server}/");
    let response = client.get(server)?;
    println!("   {} {}", response.status, response.body.trim_end());
    Ok(())
}
