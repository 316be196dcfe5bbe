//! Connections from pod to pod in great numbers, used in every way at once, for
//! as long as `SHUNT_TEST_STRESS` says (`cargo xtask test --stress SECONDS`), 90
//! seconds without it. `SHUNT_TEST_SEED` repeats a run as far as chance allows,
//! and `SHUNT_TEST_SPLICE` names another mode than the one that the agent picks, where
//! that is asked for.

use std::{
    net::SocketAddr,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use shunt_tests::{
    Agent, Envoy, Node, Owner, Pod, Proxy, Splice,
    load::{Load, Rules, Sum},
    mesh::ISTIO_DEFAULTS,
};
use socket2::{Domain, Socket, Type};

/// How many connections are open at once, and to which port; each is a part of a run. A port
/// of its own: the listener before may live on for a moment after it was closed, in a child
/// that another test has just begun, or in the hands of whoever looks at open files.
const PARTS: [(usize, u16); 3] = [(1, 8080), (16, 8081), (256, 8082)];
/// How many tests share the time.
const TESTS: u32 = 3;

/// The client ends first. Where the server has ended before, Envoy now and then closes
/// the connection to it before it has passed on all that the client has sent: also with
/// the rules of iptables and no agent at all (in 2 of 9 runs of a minute on a busy
/// machine), and never through the small proxies.
#[test]
fn every_byte_arrives_through_two_envoys() {
    run(Splice::tried(), Envoy::start, true);
}

#[test]
fn every_byte_arrives_through_two_small_proxies() {
    run(Splice::tried(), |pod| Proxy::start(pod.netns()), false);
}

/// The same in the mode that has to be asked for before applications have a part in it.
#[test]
fn every_byte_arrives_that_an_application_splices() {
    run(Some(Splice::Proxy), |pod| Proxy::start(pod.netns()), false);
}

/// Loads two pods that have proxies like this, and an agent in this mode, or the one that it
/// picks.
#[track_caller]
fn run<P>(mode: Option<Splice>, proxy: fn(&Pod) -> P, client_ends_first: bool) {
    let seed = seed();
    let rules = Rules {
        seed,
        client_ends_first,
    };
    say(&format!("SHUNT_TEST_SEED={seed} repeats this"));
    let node = Node::new();
    let [client, server] = ["client", "server"].map(|name| node.pod(name));
    let agent = Agent::start_splicing(node.cgroup(), mode);
    let _proxies = [&client, &server].map(proxy);
    for pod in [&client, &server] {
        agent.enroll(pod.netns(), &ISTIO_DEFAULTS);
    }
    let parts = u32::try_from(PARTS.len()).expect("few") * TESTS;
    let time = time() / parts;
    let mut first = 0;
    for (at_once, port) in PARTS {
        let to = SocketAddr::from((server.ip(), port));
        let listener = server.netns().run(|| listen(port));
        let sum = load(&client, (listener, to), rules, first, at_once, time);
        let sum = sum.unwrap_or_else(|error| panic!("with seed {seed}: {error}"));
        say(&format!("{at_once} at once: {sum}"));
        assert!(sum.connections > 0, "nothing was tried");
        first += 1 << 32;
    }
    let spliced = agent.spliced_bytes(client.netns()) + agent.spliced_bytes(server.netns());
    let mode = agent.splices();
    say(&format!(
        "{} MB spliced, mode {mode:?}",
        spliced / 1_000_000
    ));
    assert_eq!(spliced > 0, mode != Splice::Off, "{spliced} bytes spliced");
}

/// Has so many connections to a listener open at once for `time`; what both ends have done.
fn load(
    client: &Pod,
    (listener, to): (Socket, SocketAddr),
    rules: Rules,
    first: u64,
    at_once: usize,
    time: Duration,
) -> Result<Sum, String> {
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let answering =
            scope.spawn(|| Load::answer(listener, rules, || is_over.load(Ordering::Relaxed)));
        let called = client.netns().run(|| {
            Owner::APP.assume();
            Load::call(to, rules, first, at_once, time)
        });
        is_over.store(true, Ordering::Relaxed);
        let answered = answering
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        match (called, answered) {
            // Each connection has two ends, and bytes have been read at both.
            (Ok(mut sum), Ok(other)) => {
                sum.bytes += other.bytes;
                sum.rests += other.rests;
                Ok(sum)
            }
            (called, answered) => Err(format!("client: {called:?}; server: {answered:?}")),
        }
    })
}

fn listen(port: u16) -> Socket {
    Owner::APP.assume();
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a new socket");
    listener.set_reuse_address(true).expect("an open socket");
    let address = SocketAddr::from(([0, 0, 0, 0], port));
    listener.bind(&address.into()).expect("a free port");
    listener.listen(4096).expect("a bound socket");
    listener
}

/// How long all tests here take together.
fn time() -> Duration {
    Duration::from_secs(number("SHUNT_TEST_STRESS").unwrap_or(90))
}

fn seed() -> u64 {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH);
    number("SHUNT_TEST_SEED").unwrap_or_else(|| now().map_or(0, |since| since.as_secs()))
}

/// The number in a variable of the environment.
fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    let number = text.parse();
    Some(number.unwrap_or_else(|_| panic!("{variable}={text} is no number")))
}

#[expect(clippy::print_stderr, reason = "the figures of a run")]
fn say(text: &str) {
    eprintln!("{text}");
}
