//! Maps that have no room for another pod.

use shunt_tests::{
    Agent, Netns, Node, Owner, Pod, Probe, agent, bpf, command::output_of, mesh::ISTIO_DEFAULTS,
    node::Stack, probe,
};

use super::agent_with;
use crate::lab::{Lab, PORT};

/// Enrols the lab's pod, tries to enrol a second one, and looks at both.
#[track_caller]
fn assert_room_for_one(limit: &str, flags: &[&str], complaint: &str) {
    let lab = Lab::new();
    let second = lab.node.pod("second");
    for pod in [&lab.pod, &second] {
        settle(pod);
    }
    let _proxy = lab.proxy();
    let agent = agent_with(&lab, &[limit]);
    agent.enroll(lab.pod.netns(), flags);
    lab.assert_redirected();
    let before = bpf::entries_by_map(&agent.status());

    assert_refused(&agent, second.netns(), flags, complaint);

    lab.assert_redirected();
    assert_eq!(outbound(second.netns()), "node:80");
    assert_eq!(bpf::entries_by_map(&agent.status()), before);
    let pods = agent.status()["pods"].as_array().map(Vec::len);
    assert_eq!(pods, Some(1));

    // The first one makes room.
    agent.unenroll(lab.pod.netns());
    lab.assert_direct();
}

/// Leaves a pod nothing that the kernel adds later, as it does with addresses of
/// IPv6, and gives it an interface that nobody uses.
fn settle(pod: &Pod) {
    pod.sysctl("net.ipv6.conf.all.disable_ipv6", "1");
    pod.netns().ip("link add unused type bridge\n");
}

/// Enrolling fails with one clear sentence.
#[track_caller]
fn assert_refused(agent: &Agent, netns: &Netns, flags: &[&str], complaint: &str) {
    let ran = agent::run(&mut agent.enroll_command(&netns.path(), flags));
    assert_eq!(ran.status.code(), Some(1), "{}", ran.stderr);
    assert!(ran.stderr.contains(complaint), "{}", ran.stderr);
    // The map, its size, and what to do.
    assert!(
        ran.stderr.contains(" entries for all pods"),
        "{}",
        ran.stderr
    );
    assert!(ran.stderr.contains("unenroll pods"), "{}", ran.stderr);
    assert_eq!(ran.stderr.trim().lines().count(), 1, "{}", ran.stderr);
}

/// Who answers when the application of a pod without a responder calls out.
fn outbound(netns: &Netns) -> String {
    let call = Probe::new(Owner::APP, (Node::OUTSIDE, PORT));
    probe(netns, &call).outcome.to_string()
}

#[test]
fn there_is_no_room_for_another_pods_settings() {
    assert_room_for_one("PODS=1", &ISTIO_DEFAULTS, "no room for another pod");
}

#[test]
fn there_is_no_room_for_another_pods_counters() {
    assert_room_for_one("COUNTERS=1", &ISTIO_DEFAULTS, "no room for the counters");
}

/// The three ports of Istio's default lie close together, in one entry.
#[test]
fn there_is_no_room_for_another_pods_ports() {
    assert_room_for_one("PORTS=1", &ISTIO_DEFAULTS, "no room for the port lists");
}

#[test]
fn there_is_no_room_for_another_pods_address_ranges() {
    let flags = ["-b", "*", "-i", "198.51.100.0/24,203.0.113.0/24"];
    assert_room_for_one("CIDRS=2", &flags, "no room for the address ranges");
}

#[test]
fn there_is_no_room_for_another_pods_interfaces() {
    let flags = ["-b", "*", "-i", "*", "-c", "unused"];
    assert_room_for_one("INTERFACES=1", &flags, "no room for the interfaces");
}

/// How many routes a pod has depends on the kernel's settings: asked first.
#[test]
fn there_is_no_room_for_another_pods_routes() {
    let lab = Lab::new();
    settle(&lab.pod);
    let agent = lab.enrolled();
    let routes = bpf::entries_by_map(&agent.status())["ROUTES"];
    drop((agent, lab));
    assert_room_for_one(
        &format!("ROUTES={routes}"),
        &ISTIO_DEFAULTS,
        "no room for the routes",
    );
}

/// New lists stand beside the old ones before they are in force.
#[test]
fn settings_that_find_no_room_leave_the_former_in_force() {
    let lab = Lab::new();
    settle(&lab.pod);
    let _proxy = lab.proxy();
    let agent = agent_with(&lab, &["CIDRS=2"]);
    agent.enroll(lab.pod.netns(), &["-b", "*", "-i", "198.51.100.0/24"]);
    lab.assert_redirected();
    let before = bpf::entries_by_map(&agent.status());

    let other = ["-b", "", "-i", "192.0.2.0/24,203.0.113.0/24"];
    assert_refused(
        &agent,
        lab.pod.netns(),
        &other,
        "no room for the address ranges",
    );

    lab.assert_redirected();
    assert_eq!(bpf::entries_by_map(&agent.status()), before);
    agent.enroll(lab.pod.netns(), &["-b", "*", "-i", "203.0.113.0/24"]);
    assert_eq!(lab.outbound(), "node:80");
}

/// The address that the proxy calls its application from is taken back as well.
#[test]
fn a_pod_that_is_not_enrolled_has_the_addresses_that_it_had() {
    let lab = Lab::new();
    let agent = agent_with(&lab, &["PODS=1"]);
    agent.enroll(lab.pod.netns(), &ISTIO_DEFAULTS);
    let second = lab.node.pod_with("second", Stack::V6);
    let addresses = || {
        output_of(
            second
                .netns()
                .command("ip", Owner::ROOT)
                .args(["-6", "addr", "show", "lo"]),
        )
    };
    let before = addresses();
    assert!(!before.contains("::6/128"), "{before}");

    assert_refused(
        &agent,
        second.netns(),
        &ISTIO_DEFAULTS,
        "no room for another pod",
    );
    assert_eq!(addresses(), before);

    // With room it would have got it.
    agent.unenroll(lab.pod.netns());
    agent.enroll(second.netns(), &ISTIO_DEFAULTS);
    assert!(addresses().contains("::6/128"), "{}", addresses());
}
