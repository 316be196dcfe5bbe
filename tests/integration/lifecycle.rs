//! Agents, proxies and enrolments come and go, in any order.

use std::{
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, TcpListener, TcpStream},
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use shunt_tests::{
    Agent, Netns, Node, Owner, Probe, Responder, bpf, connect_all, deadline::wait_until,
    held::Held, mesh::ISTIO_DEFAULTS, probe, probe_all,
};

use crate::lab::{Lab, PORT};

#[test]
fn a_proxy_that_listened_before_the_agent_started_is_found() {
    let lab = Lab::new();
    let _proxy = lab.proxy();
    lab.assert_direct();
    let _agent = lab.enrolled();
    lab.assert_redirected();
}

#[test]
fn a_proxy_that_listened_before_the_enrolment_is_found() {
    let lab = Lab::new();
    let agent = lab.agent();
    let _proxy = lab.proxy();
    lab.assert_direct();
    agent.enroll(lab.pod.netns(), &ISTIO_DEFAULTS);
    lab.assert_redirected();
}

#[test]
fn a_proxy_that_listens_after_the_enrolment_is_found() {
    let lab = Lab::new();
    let _agent = lab.enrolled();
    let _proxy = lab.proxy();
    lab.assert_redirected();
}

#[test]
fn a_proxy_that_restarts_is_followed() {
    let lab = Lab::new();
    let _agent = lab.enrolled();
    for _ in 0..5 {
        let proxy = lab.proxy();
        lab.assert_redirected();
        drop(proxy);
        lab.assert_refused();
    }
}

/// While no proxy listens, nothing steps around it: not even where somebody
/// would answer.
#[test]
fn connections_are_refused_while_no_proxy_listens() {
    let lab = Lab::new();
    let _agent = lab.enrolled();
    lab.assert_refused();
}

/// A process may sit in the kernel with the lock of a socket, for as long as it likes:
/// nobody who looks for listeners waits for it.
#[test]
fn a_listener_that_is_in_use_for_ever_is_found() {
    let lab = Lab::new();
    let agent = lab.agent();
    let listener = lab.pod.netns().run(|| {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 15006)).expect("a free port");
        // Who calls has been put there when its call is over.
        listener.set_nonblocking(true).expect("it is open");
        listener
    });
    let held = Held::new(&listener);
    agent.enroll(lab.pod.netns(), &ISTIO_DEFAULTS);
    held.release();
    let inbound = (lab.pod.ip(), PORT);
    let _call = lab
        .node
        .netns()
        .run(|| TcpStream::connect(inbound).expect("somebody listens"));
    listener.accept().expect("it was called");
}

/// A proxy has one listener for each worker; any of them may be closed first.
#[test]
fn a_listener_that_is_closed_leaves_the_others_of_its_group() {
    let lab = Lab::new();
    let _agent = lab.enrolled();
    for first_to_go in 0..3 {
        let mut workers = vec![lab.proxy(), lab.proxy(), lab.proxy()];
        let mut order = [first_to_go, 0, 0].into_iter();
        while !workers.is_empty() {
            let calls = [Probe::new(Owner::APP, (lab.pod.ip(), PORT)); 30];
            for answer in probe_all(lab.node.netns(), &calls) {
                assert_eq!(answer.outcome.to_string(), "pod:15006");
            }
            assert_eq!(lab.outbound(), "pod:15001");
            let next = order.next().expect("one for each worker");
            drop(workers.remove(next));
        }
        lab.assert_refused();
    }
}

/// The same for a group that the agent has not seen come to be.
#[test]
fn a_listener_that_is_closed_leaves_the_others_that_listened_before_the_agent() {
    let lab = Lab::new();
    for first_to_go in [0, 1] {
        let mut workers = vec![lab.proxy(), lab.proxy()];
        let _agent = lab.enrolled();
        lab.assert_redirected();
        drop(workers.remove(first_to_go));
        lab.assert_redirected();
        workers.clear();
        lab.assert_refused();
    }
}

#[test]
fn enrolling_again_replaces_the_settings() {
    let lab = Lab::new();
    let _proxy = lab.proxy();
    let agent = lab.enrolled();
    lab.assert_redirected();

    let other = ["-b", "*", "-d", "80", "-i", "203.0.113.0/24"];
    agent.enroll(lab.pod.netns(), &other);
    assert_eq!(lab.outbound(), "node:80");
    assert_eq!(lab.inbound(), "pod:80");
    assert_eq!(lab.hairpin(), "pod:15006");

    agent.enroll(lab.pod.netns(), &ISTIO_DEFAULTS);
    lab.assert_redirected();
    let pods = agent.status()["pods"].as_array().map(Vec::len);
    assert_eq!(pods, Some(1));
}

#[test]
fn other_ports_of_the_proxy_are_followed_when_enrolling_again() {
    let lab = Lab::new();
    let _proxy = lab.proxy();
    let agent = lab.enrolled();
    lab.assert_redirected();

    agent.enroll(
        lab.pod.netns(),
        &["-p", "80", "-z", "80", "-b", "*", "-i", "*"],
    );

    // The application listens there.
    assert_eq!(lab.outbound(), "pod:80");
    let far = Probe::new(Owner::APP, (lab.pod.ip(), 9));
    assert_eq!(probe(lab.node.netns(), &far).outcome.to_string(), "pod:80");
}

/// No connection meets settings that are neither the old nor the new: neither
/// where the proxy's ports change, nor where the excluded interface does. Both
/// versions capture what is asked for here; what the one excludes, the other has not
/// to look at.
#[test]
fn settings_are_replaced_without_a_gap() {
    const OTHER_PORTS: [&str; 12] = [
        "-p", "15101", "-z", "15106", "-b", "*", "-i", "*", "-c", "unused1", "-o", "9",
    ];
    const ROUNDS: usize = 20;
    let lab = Lab::new();
    let _proxies = [
        lab.proxy(),
        Responder::start(lab.pod.netns(), Owner::PROXY, &[15101, 15106]),
    ];
    lab.pod.netns().ip("link add unused0 type bridge\n\
         link add unused1 type bridge\n");
    let agent = lab.agent();
    let first = [&ISTIO_DEFAULTS[..], &["-c", "unused0"]].concat();
    agent.enroll(lab.pod.netns(), &first);
    let done = AtomicBool::new(false);
    let redirected_to = |from: &Netns, destination: (IpAddr, u16), ports: [&str; 2]| {
        let calls = [Probe::new(Owner::APP, destination); 16];
        let mut asked = 0_u64;
        while !done.load(Ordering::Relaxed) {
            for answer in probe_all(from, &calls) {
                let by = answer.outcome.to_string();
                assert!(ports.contains(&by.as_str()), "{by}, after {asked} others");
                assert_eq!(answer.greeting().destination(), destination.into());
                asked += 1;
            }
        }
        asked
    };
    let (pod, node) = (lab.pod.netns(), lab.node.netns());
    thread::scope(|scope| {
        let outbound =
            scope.spawn(|| redirected_to(pod, (Node::OUTSIDE, PORT), ["pod:15001", "pod:15101"]));
        let inbound =
            scope.spawn(|| redirected_to(node, (lab.pod.ip(), PORT), ["pod:15006", "pod:15106"]));
        for _ in 0..ROUNDS {
            agent.enroll(pod, &OTHER_PORTS);
            agent.enroll(pod, &first);
        }
        done.store(true, Ordering::Relaxed);
        for side in [outbound, inbound] {
            match side.join() {
                Ok(asked) => assert!(asked > 0, "no connection was tried"),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
    });
}

#[test]
fn unenrolling_ends_the_redirection() {
    let lab = Lab::new();
    let _proxy = lab.proxy();
    let agent = lab.enrolled();
    lab.assert_redirected();
    agent.unenroll(lab.pod.netns());
    lab.assert_direct();
    assert_eq!(agent.status()["pods"].as_array().map(Vec::len), Some(0));
    agent.enroll(lab.pod.netns(), &ISTIO_DEFAULTS);
    lab.assert_redirected();
}

#[test]
fn a_pod_that_is_not_enrolled_is_left_alone() {
    let lab = Lab::new();
    let _proxy = lab.proxy();
    let neighbour = lab.node.pod("neighbour");
    let _proxy_of_neighbour = Responder::start(neighbour.netns(), Owner::PROXY, &[15001, 15006]);
    let agent = lab.agent();
    agent.enroll(neighbour.netns(), &ISTIO_DEFAULTS);
    lab.assert_direct();
    let call = Probe::new(Owner::APP, (Node::OUTSIDE, PORT));
    let answer = probe(neighbour.netns(), &call);
    assert_eq!(answer.outcome.to_string(), "neighbour:15001");
}

#[test]
fn an_agent_that_ends_takes_everything_with_it() {
    let lab = Lab::new();
    let _proxy = lab.proxy();
    let agent = lab.enrolled();
    lab.assert_redirected();
    let programs = bpf::programs(&agent.status());
    assert!(bpf::attached_to_cgroup(lab.node.cgroup().path()) > 0);
    let call = Probe::new(Owner::APP, (Node::OUTSIDE, PORT));
    let open = connect_all(lab.pod.netns(), &[call]).remove(0).1;
    let mut open = open.expect("the proxy has answered");

    let place = agent.stop();

    assert_eq!(bpf::attached_to_cgroup(lab.node.cgroup().path()), 0);
    // The kernel frees a program some time after its last user is gone.
    for (name, id) in programs {
        wait_until(&format!("{name} to be gone"), || {
            (!bpf::program_exists(id))
                .then_some(())
                .ok_or_else(|| id.to_string())
        });
    }
    assert!(!place.socket().exists(), "the control socket is left");
    let pins = std::fs::read_dir(place.bpffs()).map_or(0, Iterator::count);
    assert_eq!(pins, 0, "pins are left");
    lab.assert_direct();

    // A connection that was open does not notice.
    open.write_all(b"still there?").expect("it is open");
    let mut echo = [0; 12];
    open.read_exact(&mut echo).expect("it is open");
    assert_eq!(&echo, b"still there?");
}

#[test]
fn the_next_agent_takes_over_the_place_of_one_that_was_killed() {
    let lab = Lab::new();
    let _proxy = lab.proxy();
    let agent = lab.enrolled();
    lab.assert_redirected();

    let agent = Agent::start_in(agent.kill());
    agent.enroll(lab.pod.netns(), &ISTIO_DEFAULTS);
    lab.assert_redirected();

    let agent = Agent::start_in(agent.stop());
    agent.enroll(lab.pod.netns(), &ISTIO_DEFAULTS);
    lab.assert_redirected();
}
