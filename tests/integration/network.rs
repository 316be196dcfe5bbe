//! What the agent knows of a pod's network, and how it stays current.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::unix::fs::symlink,
    path::Path,
    process::Command,
};

use shunt_tests::{
    Agent, Greeting, Netns, Node, Owner, Probe, Responder, agent::run, bpf, command::output_of,
    deadline::wait_until, mesh::ISTIO_DEFAULTS, probe,
};
use socket2::{Domain, Socket, Type};

use crate::lab::{Lab, PORT};

/// An address that no pod has at first, and that the node routes nowhere.
const NEW: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 99, 0, 9));
/// The pod's second network.
const SECOND: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 43, 0, 2));

/// Who answers when `owner` in `from` calls `to`.
fn call(from: &Netns, owner: Owner, to: IpAddr) -> String {
    probe(from, &Probe::new(owner, (to, PORT)))
        .outcome
        .to_string()
}

/// Waits until `answer` is what is expected.
#[track_caller]
fn becomes(expected: &str, mut answer: impl FnMut() -> String) {
    wait_until(expected, || {
        let seen = answer();
        if seen == expected { Ok(()) } else { Err(seen) }
    });
}

/// How many pods an agent knows.
fn pods(agent: &Agent) -> usize {
    agent.status()["pods"].as_array().map_or(0, Vec::len)
}

/// Waits until an agent knows this many pods.
#[track_caller]
fn become_pods(agent: &Agent, expected: usize) {
    becomes(&expected.to_string(), || pods(agent).to_string());
}

/// Gives the pod a second interface, `eth1`, to hosts beyond the node.
fn add_second_interface(lab: &Lab) {
    lab.node.netns().ip(&format!(
        "link add second type veth peer name eth1 netns {}\n\
         addr add 10.43.0.1/24 dev second\n\
         link set second up\n",
        lab.pod.netns().name()
    ));
    lab.pod.netns().ip(&format!(
        "addr add {SECOND}/24 dev eth1\n\
         link set eth1 up\n\
         route add {}/32 via 10.43.0.1\n\
         route add default via 10.43.0.1 dev eth1 metric 500\n",
        Node::FAR_OUTSIDE
    ));
}

#[test]
fn an_address_that_is_added_is_the_pods_own_until_it_is_removed() {
    let lab = Lab::new();
    let _proxy = lab.proxy();
    let _agent = lab.enrolled();
    let pod = lab.pod.netns();
    assert_eq!(call(pod, Owner::APP, NEW), "pod:15001");

    pod.ip(&format!("addr add {NEW}/32 dev lo"));
    becomes("pod:80", || call(pod, Owner::APP, NEW));
    assert_eq!(call(pod, Owner::PROXY, NEW), "pod:15006");

    pod.ip(&format!("addr del {NEW}/32 dev lo"));
    becomes("pod:15001", || call(pod, Owner::APP, NEW));
    lab.assert_redirected();
}

#[test]
fn what_is_routed_to_lo_is_the_pods_own() {
    let lab = Lab::new();
    let _proxy = lab.proxy();
    let _agent = lab.enrolled();
    let pod = lab.pod.netns();
    pod.ip("route add local 10.99.0.0/16 dev lo");
    becomes("pod:80", || call(pod, Owner::APP, NEW));
    assert_eq!(call(pod, Owner::PROXY, NEW), "pod:15006");
}

/// The first notification must not stand for those that come while it is dealt
/// with.
#[test]
fn of_many_changes_none_is_lost() {
    let lab = Lab::new();
    let _proxy = lab.proxy();
    let _agent = lab.enrolled();
    let pod = lab.pod.netns();
    for verb in ["add", "del"] {
        let batch: String = (0..1000)
            .map(|i| format!("addr {verb} 10.98.{}.{}/32 dev lo\n", i / 250, i % 250))
            .collect();
        pod.ip(&batch);
        let expected = if verb == "add" { "pod:80" } else { "pod:15001" };
        for host in [[10, 98, 0, 0], [10, 98, 1, 249], [10, 98, 3, 249]] {
            becomes(expected, || call(pod, Owner::APP, host.into()));
        }
    }
}

#[test]
fn what_goes_through_an_excluded_interface_is_direct() {
    let lab = Lab::new();
    let _proxy = lab.proxy();
    let agent = lab.agent();
    // The interface is not there yet.
    let flags = [&ISTIO_DEFAULTS[..], &["-c", "eth1"]].concat();
    agent.enroll(lab.pod.netns(), &flags);
    lab.assert_redirected();

    add_second_interface(&lab);
    let (pod, node) = (lab.pod.netns(), lab.node.netns());
    becomes("node:80", || call(pod, Owner::APP, Node::FAR_OUTSIDE));
    becomes("pod:80", || call(node, Owner::APP, SECOND));
    // The agent may have heard of the interface before it had its address.
    becomes("pod:15006", || call(pod, Owner::PROXY, SECOND));
    lab.assert_redirected();

    // By another name it is another interface.
    pod.ip("link set eth1 down\nlink set eth1 name eth2\nlink set eth2 up");
    becomes("pod:15006", || call(node, Owner::APP, SECOND));
}

#[test]
fn a_socket_bound_to_an_excluded_interface_is_direct() {
    let lab = Lab::new();
    let _proxy = lab.proxy();
    add_second_interface(&lab);
    let agent = lab.agent();
    let flags = [&ISTIO_DEFAULTS[..], &["-c", "eth1"]].concat();
    agent.enroll(lab.pod.netns(), &flags);
    assert_eq!(
        call(lab.pod.netns(), Owner::APP, Node::OUTSIDE),
        "pod:15001"
    );

    let place = lab.pod.netns().run(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a new socket");
        socket.bind_device(Some(b"eth1")).expect("this is root");
        let outside = SocketAddr::from((Node::OUTSIDE, PORT));
        socket.connect(&outside.into()).expect("somebody answers");
        Greeting::read(&socket).place
    });
    assert_eq!(place, "node");
}

#[test]
fn what_comes_in_through_a_virtual_interface_goes_out_through_the_proxy() {
    let lab = Lab::new();
    let _proxy = lab.proxy();
    let agent = lab.agent();
    let flags = [&ISTIO_DEFAULTS[..], &["-k", "eth+"]].concat();
    agent.enroll(lab.pod.netns(), &flags);
    assert_eq!(lab.inbound(), "pod:15001");
    add_second_interface(&lab);
    becomes("pod:15001", || call(lab.node.netns(), Owner::APP, SECOND));
}

/// Nothing of the agent keeps the namespace, and nothing of it stays in a map.
#[test]
fn a_pod_that_is_deleted_is_forgotten() {
    let lab = Lab::new();
    let agent = lab.enrolled();
    let before = bpf::entries_by_map(&agent.status());
    for _ in 0..3 {
        let gone = lab.node.pod("gone");
        let flags = [&ISTIO_DEFAULTS[..], &["-c", "eth0", "-x", "10.0.0.0/8"]].concat();
        agent.enroll(gone.netns(), &flags);
        assert_eq!(pods(&agent), 2);
        let peer = gone.netns().run(|| peer_of("eth0"));
        drop(gone);
        become_pods(&agent, 1);
        let left = || lab.node.netns().run(|| has_interface(peer));
        becomes("false", || left().to_string());
    }
    wait_until("the maps to be as before", || {
        let now = bpf::entries_by_map(&agent.status());
        if now == before {
            Ok(())
        } else {
            Err(format!("{now:?}, and before {before:?}"))
        }
    });
    let programs = bpf::programs(&agent.status());
    assert!(programs.contains_key("shunt_lookup"), "{programs:?}");
}

/// The index of the other end of a veth pair.
fn peer_of(interface: &str) -> u64 {
    let json = output_of(Command::new("ip").args(["-j", "link", "show", interface]));
    let links: serde_json::Value = serde_json::from_str(&json).expect("ip writes JSON");
    let peer = &links[0]["link_index"];
    peer.as_u64().unwrap_or_else(|| panic!("no peer: {json}"))
}

fn has_interface(index: u64) -> bool {
    let json = output_of(Command::new("ip").args(["-j", "link"]));
    let links: serde_json::Value = serde_json::from_str(&json).expect("ip writes JSON");
    let links = links.as_array().expect("a list of interfaces");
    links.iter().any(|link| link["ifindex"] == index)
}

/// Takes the name of a namespace away, and waits until the agent says, for the `times`th time, that
/// it cannot look at one whose network has changed.
fn lose_name(pod: &Netns, agent: &Agent, times: usize) {
    output_of(Command::new("ip").args(["netns", "del", pod.name()]));
    let add = format!("ip addr add {NEW}/32 dev lo");
    output_of(pod.command("sh", Owner::ROOT).args(["-c", &add]));
    wait_until("the agent to say that it cannot look", || {
        let log = agent.log();
        if log.matches("goes by what was known before").count() >= times {
            Ok(())
        } else {
            Err(log)
        }
    });
}

/// As long as somebody is in it a namespace without a name lives.
#[test]
fn a_pod_whose_name_is_gone_stays_redirected() {
    let lab = Lab::new();
    let _proxy = lab.proxy();
    let agent = lab.enrolled();
    let pod = lab.pod.netns();
    lose_name(pod, &agent, 1);
    lab.assert_redirected();
    // What the agent cannot know errs towards the proxy.
    assert_eq!(call(pod, Owner::APP, NEW), "pod:15001");

    let unenroll = |path: &Path| run(agent.cli().arg("unenroll").arg("--netns").arg(path));
    let ran = unenroll(&pod.path());
    assert!(ran.status.success(), "{}", ran.stderr);
    lab.assert_direct();
}

/// The kernel says that an id is free when another namespace may have been given it.
#[test]
fn a_pod_whose_id_was_anothers_stays_redirected() {
    let lab = Lab::new();
    let agent = lab.agent();
    for round in 1..=10 {
        let former = lab.node.pod("former");
        agent.enroll(former.netns(), &ISTIO_DEFAULTS);
        let pod = lab.node.pod("pod");
        let _proxy = Responder::start(pod.netns(), Owner::PROXY, &[15001]);
        drop(former);
        agent.enroll(pod.netns(), &ISTIO_DEFAULTS);
        lose_name(pod.netns(), &agent, round);
        assert_eq!(call(pod.netns(), Owner::APP, Node::OUTSIDE), "pod:15001");
    }
}

/// A pod that is made anew has the place, and may have the id, of the former.
#[test]
fn a_pod_that_is_rebuilt_in_the_same_place_takes_over() {
    let lab = Lab::new();
    let agent = lab.agent();
    let directory = tempfile::tempdir().expect("a directory");
    let place = directory.path().join("pod");
    for _ in 0..5 {
        let rebuilt = lab.node.pod("rebuilt");
        symlink(rebuilt.netns().path(), &place).expect("a new name");
        let enrolled = run(&mut agent.enroll_command(&place, &ISTIO_DEFAULTS));
        assert!(enrolled.status.success(), "{}", enrolled.stderr);
        let _proxy = Responder::start(rebuilt.netns(), Owner::PROXY, &[15001]);
        assert_eq!(
            call(rebuilt.netns(), Owner::APP, Node::OUTSIDE),
            "rebuilt:15001"
        );
        std::fs::remove_file(&place).expect("the name is there");
    }
    become_pods(&agent, 0);
}
