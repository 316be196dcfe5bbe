//! Many connections: nothing is left of them, all of them work, and the
//! workers of a proxy share them.

use std::net::SocketAddr;

use shunt_tests::{
    Agent, Envoy, Families, Node, Outcome, Owner, Probe, Process, Responder, Source, agent::Place,
    bpf, connect_all, deadline::DEADLINE, envoy, mesh::ISTIO_DEFAULTS, node::Stack, probe,
    probe_all,
};

use crate::lab::{Lab, PORT};

#[test]
fn ten_thousand_connections_leave_nothing_behind() {
    let lab = Lab::new();
    let _proxy = lab.proxy();
    let agent = lab.enrolled();
    lab.assert_redirected();
    let before = bpf::entries_by_map(&agent.status());

    let outbound = Probe::new(Owner::APP, (Node::OUTSIDE, PORT));
    let hairpin = Probe::new(Owner::PROXY, (lab.pod.ip(), PORT));
    let inbound = Probe::new(Owner::APP, (lab.pod.ip(), PORT));
    let mut answers = probe_all(lab.pod.netns(), &[outbound; 5_000]);
    answers.extend(probe_all(lab.pod.netns(), &[hairpin; 2_500]));
    answers.extend(probe_all(lab.node.netns(), &[inbound; 2_500]));

    let answered = |port| {
        let of_port = |outcome: &Outcome| outcome.to_string() == format!("pod:{port}");
        answers.iter().filter(|a| of_port(&a.outcome)).count()
    };
    assert_eq!((answered(15001), answered(15006)), (5_000, 5_000));
    let after = bpf::entries_by_map(&agent.status());
    assert_eq!(after, before);
    assert_eq!(bpf::under_way(&after), 0);
}

#[test]
fn open_connections_leave_nothing_in_any_map() {
    open_connections(Families::Split, &[]);
}

/// What is published under two keys, because the proxy may be reached in two ways,
/// is gone as soon as the connection is accepted.
#[test]
fn open_connections_that_had_no_slot_leave_nothing_in_any_map() {
    open_connections(Families::Split, &["--map-limit=FLOW_SLOTS=1"]);
}

/// What is sent to the pod's own address is brought to a listener at loopback.
#[test]
fn a_proxy_at_loopback_is_reached() {
    open_connections(Families::Loopback, &[]);
}

#[test]
fn a_proxy_at_loopback_is_reached_without_a_slot() {
    open_connections(Families::Loopback, &["--map-limit=FLOW_SLOTS=1"]);
}

/// Of the two kinds that are sent to the pod's own address: from a socket that is bound to a
/// port and no address, and over IPv6.
#[track_caller]
fn open_connections(families: Families, arguments: &[&str]) {
    const EACH: u16 = 500;
    let node = Node::new();
    let pod = node.pod_with("pod", Stack::Dual);
    let _proxy = Responder::start_for(families, pod.netns(), Owner::PROXY, &[15001, 15006]);
    let agent = Agent::start_with(Place::new(node.cgroup()), arguments);
    let flags = [&ISTIO_DEFAULTS[..], &["--dual-stack=true"]].concat();
    agent.enroll(pod.netns(), &flags);
    // Routes and addresses of IPv6 are known when this is redirected.
    let over_ipv6 = Probe::new(Owner::APP, (Node::OUTSIDE6, PORT));
    assert_eq!(
        probe(pod.netns(), &over_ipv6).outcome.to_string(),
        "pod:15001"
    );
    let before = bpf::entries_by_map(&agent.status());

    let bound = |number| {
        let probe = Probe::new(Owner::APP, (Node::OUTSIDE, PORT));
        probe.from(Source::Port(17_000 + number))
    };
    let mut calls: Vec<Probe> = (0..EACH).map(bound).collect();
    calls.extend([over_ipv6; EACH as usize]);
    let open = connect_all(pod.netns(), &calls);

    for (call, (answer, stream)) in calls.iter().zip(&open) {
        assert_eq!(answer.outcome.to_string(), "pod:15001");
        assert_eq!(answer.greeting().original_dst, Ok(call.destination));
        assert!(stream.is_some());
    }
    assert_eq!(bpf::entries_by_map(&agent.status()), before);
    drop(open);
    assert_eq!(bpf::entries_by_map(&agent.status()), before);
}

/// A proxy may have more workers than are known by name: the kernel gives each of
/// them its share all the same, and each has to know where a connection was sent.
#[test]
fn any_number_of_workers_know_the_original_destination() {
    const WORKERS: usize = 20;
    let lab = Lab::new();
    let early: Vec<Responder> = (0..WORKERS / 2).map(|_| lab.proxy()).collect();
    let _agent = lab.enrolled();
    let late: Vec<Responder> = (0..WORKERS / 2).map(|_| lab.proxy()).collect();
    for (from, to, port) in [
        (lab.node.netns(), lab.pod.ip(), 15006),
        (lab.pod.netns(), Node::OUTSIDE, 15001),
    ] {
        let calls = [Probe::new(Owner::APP, (to, PORT)); 400];
        for answer in probe_all(from, &calls) {
            assert_eq!(answer.outcome.to_string(), format!("pod:{port}"));
            let greeting = answer.greeting();
            assert_eq!(greeting.original_dst, Ok((to, PORT).into()), "{greeting:?}");
        }
    }
    let idle = early.iter().chain(&late).filter(|one| one.accepted() == 0);
    assert_eq!(idle.count(), 0, "the kernel spreads over all of them");
}

/// A connection that is refused has been published, and nobody accepts it.
#[test]
fn refused_connections_leave_nothing_behind() {
    let lab = Lab::new();
    let agent = lab.enrolled();
    lab.assert_refused();
    let before = bpf::entries_by_map(&agent.status());

    let outbound = Probe::new(Owner::APP, (Node::OUTSIDE, PORT));
    let answers = probe_all(lab.pod.netns(), &[outbound; 2_000]);

    assert!(answers.iter().all(|a| a.outcome == Outcome::Refused));
    let after = bpf::entries_by_map(&agent.status());
    assert_eq!(after, before);
    assert_eq!(bpf::under_way(&after), 0);
}

#[test]
fn twenty_thousand_connections_are_open_at_once() {
    const NAME: &str = "many::twenty_thousand_connections_are_open_at_once";
    if crowd::is_member() {
        return crowd::act();
    }
    let lab = Lab::new();
    let agent = lab.enrolled();
    let before = bpf::entries_by_map(&agent.status());
    let _proxies: [Process; 4] = std::array::from_fn(|_| {
        let proxy = crowd::member(&lab, NAME, "proxy");
        proxy.wait_for_line(crowd::READY, DEADLINE);
        proxy
    });
    let mut clients: [Process; 4] = std::array::from_fn(|number| {
        // Each asks for destinations of its own.
        crowd::member(&lab, NAME, &(1_000 + 5_000 * number).to_string())
    });
    for client in &clients {
        // How long all of them take is the machine's affair, as long as there are more.
        for step in crowd::steps() {
            client.wait_for_line(&crowd::open(step.end), DEADLINE);
        }
    }
    // All of them are open now.
    for client in &mut clients {
        client.tell("talk");
    }
    for client in &clients {
        client.wait_for_line(crowd::DONE, DEADLINE);
    }
    // An open connection is in its sockets' storage, and nowhere else.
    let after = bpf::entries_by_map(&agent.status());
    assert_eq!(bpf::under_way(&after), bpf::under_way(&before));
}

/// The two ends of 20,000 connections are more files than one process may have
/// open: this test binary is started several times more, in the pod, to run the
/// same test in another role.
mod crowd {
    use std::{
        io::{Read, Write},
        net::TcpStream,
        ops::Range,
    };

    use shunt_tests::{Node, Owner, Probe, Process, Responder, connect_all_here};

    use crate::lab::Lab;

    /// What a member writes when it listens.
    pub(super) const READY: &str = "crowd: ready";
    /// What a member writes when each connection has carried something.
    pub(super) const DONE: &str = "crowd: done";

    const ROLE: &str = "SHUNT_TEST_CROWD";
    const CONNECTIONS: u16 = 5_000;
    /// How many a member opens before it says so.
    const STEP: u16 = 500;
    const _: () = assert!(CONNECTIONS.is_multiple_of(STEP));

    /// Which connections are opened with each step, counted from 0.
    pub(super) fn steps() -> impl Iterator<Item = Range<u16>> {
        (0..CONNECTIONS)
            .step_by(STEP.into())
            .map(|first| first..first + STEP)
    }

    /// What a member writes when it has that many connections open.
    pub(super) fn open(connections: u16) -> String {
        format!("crowd: {connections} are open")
    }

    /// Starts a member: `proxy`, or the first port to connect to.
    pub(super) fn member(lab: &Lab, test: &str, role: &str) -> Process {
        let binary = std::env::current_exe().expect("this binary");
        let mut command = lab.pod.netns().command(binary, Owner::ROOT);
        command
            .args(["--exact", test, "--nocapture"])
            .env(ROLE, role);
        Process::spawn(&format!("crowd member {role}"), &mut command)
    }

    pub(super) fn is_member() -> bool {
        std::env::var_os(ROLE).is_some()
    }

    pub(super) fn act() {
        shunt_tests::require_root();
        let role = std::env::var(ROLE).expect("a member has a role");
        match role.parse() {
            Ok(first_port) => call(first_port),
            Err(_) => listen(),
        }
    }

    fn listen() {
        let _proxy = Responder::start_here("pod", Owner::PROXY, &[15001]);
        say(READY);
        wait();
    }

    fn call(first_port: u16) {
        // Kept until the last has been asked.
        let mut streams = Vec::new();
        for step in steps() {
            streams.extend(connect(first_port, &step));
            say(&open(step.end));
        }
        wait();
        for (number, stream) in streams.iter_mut().enumerate() {
            assert_echo(stream, &number.to_be_bytes());
        }
        say(DONE);
        wait();
    }

    /// Opens the connections with these numbers.
    fn connect(first_port: u16, numbers: &Range<u16>) -> Vec<TcpStream> {
        let probes: Vec<Probe> = numbers
            .clone()
            .map(|number| Probe::new(Owner::APP, (Node::OUTSIDE, first_port + number)))
            .collect();
        let connections = connect_all_here(&probes);
        for (probe, (answer, _)) in probes.iter().zip(&connections) {
            assert_eq!(answer.outcome.to_string(), "pod:15001", "{probe}");
            assert_eq!(answer.greeting().original_dst, Ok(probe.destination));
        }
        connections
            .into_iter()
            .filter_map(|(_, stream)| stream)
            .collect()
    }

    fn assert_echo(stream: &mut TcpStream, message: &[u8]) {
        stream.write_all(message).expect("it is open");
        let mut echo = vec![0; message.len()];
        stream.read_exact(&mut echo).expect("the proxy answers");
        assert_eq!(echo, message);
    }

    #[expect(clippy::print_stdout, reason = "it is how members tell their test")]
    fn say(line: &str) {
        println!("\n{line}");
    }

    /// For a line from the test, or its end.
    fn wait() {
        std::io::stdin()
            .read_line(&mut String::new())
            .expect("a test keeps the other end");
    }
}

#[test]
fn the_workers_of_envoy_share_the_connections() {
    const CONNECTIONS: usize = 400;
    let node = Node::new();
    let pod = node.pod("pod");
    let _application = Responder::start(pod.netns(), Owner::APP, &[PORT]);
    let _outside = Responder::start(node.netns(), Owner::APP, &[PORT]);
    let envoy = Envoy::start(&pod);
    let agent = shunt_tests::Agent::start(node.cgroup());
    agent.enroll(pod.netns(), &shunt_tests::mesh::ISTIO_DEFAULTS);
    let outbound = Probe::new(Owner::APP, SocketAddr::from((Node::OUTSIDE, PORT)));
    let inbound = Probe::new(Owner::APP, SocketAddr::from((pod.ip(), PORT)));

    let answers = [
        probe_all(pod.netns(), &[outbound; CONNECTIONS]),
        probe_all(node.netns(), &[inbound; CONNECTIONS]),
    ];

    let places = ["node:80", "pod:80"];
    for (answers, place) in answers.iter().zip(places) {
        for (number, answer) in answers.iter().enumerate() {
            assert_eq!(answer.outcome.to_string(), place, "connection {number}");
        }
    }
    for listener in [envoy::OUTBOUND, envoy::INBOUND] {
        let shares = envoy.connections_by_worker(listener);
        assert_eq!(shares.iter().sum::<u64>(), CONNECTIONS as u64, "{listener}");
        for share in &shares {
            assert!(*share >= CONNECTIONS as u64 / 4, "{listener}: {shares:?}");
        }
    }
}
