//! Many connections: nothing is left of them, all of them work, and the
//! workers of a proxy share them.

use std::{
    io::{Read, Write},
    net::SocketAddr,
};

use shunt_tests::{
    Envoy, Node, Outcome, Owner, Probe, Responder, bpf, connect_all, envoy, file_limit, probe_all,
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
    assert_eq!(after["FLOWS"], 0);
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
    assert_eq!(after["FLOWS"], 0);
}

#[test]
fn twenty_thousand_connections_are_open_at_once() {
    const OPEN: u16 = 20_000;
    // Both ends of each are files of this process.
    file_limit::raise(60_000);
    let lab = Lab::new();
    let _proxy = lab.proxy();
    let _agent = lab.enrolled();
    // Each asks for another destination, and must find its own.
    let probes: Vec<Probe> = (0..OPEN)
        .map(|n| Probe::new(Owner::APP, (Node::OUTSIDE, 1_000 + n)))
        .collect();

    let connections = connect_all(lab.pod.netns(), &probes);

    for (probe, (answer, _)) in probes.iter().zip(&connections) {
        assert_eq!(answer.outcome.to_string(), "pod:15001", "{probe}");
        assert_eq!(answer.greeting().original_dst, Ok(probe.destination));
    }
    let streams = connections.into_iter().filter_map(|(_, stream)| stream);
    let mut streams: Vec<_> = streams.collect();
    assert_eq!(streams.len(), usize::from(OPEN));
    for (number, stream) in streams.iter_mut().enumerate() {
        let message = number.to_be_bytes();
        stream.write_all(&message).expect("it is open");
        let mut echo = [0; size_of::<usize>()];
        stream.read_exact(&mut echo).expect("the proxy answers");
        assert_eq!(echo, message);
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
        assert!(answers.iter().all(|a| a.outcome.to_string() == place));
    }
    for listener in [envoy::OUTBOUND, envoy::INBOUND] {
        let shares = envoy.connections_by_worker(listener);
        assert_eq!(shares.iter().sum::<u64>(), CONNECTIONS as u64, "{listener}");
        for share in &shares {
            assert!(*share >= CONNECTIONS as u64 / 4, "{listener}: {shares:?}");
        }
    }
}
