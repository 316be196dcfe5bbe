//! The CNI plugin: the real binary, called as a runtime calls it, and the agent's side of
//! it, with a table of pods in the place of the Kubernetes API.

mod agent;
mod list;
mod runtime;

use std::{fs, thread};

use serde_json::json;
use shunt_tests::{Netns, Node, Owner, Pod, Probe, Responder, probe};

use self::{
    agent::PodsAgent,
    runtime::{Sandbox, mesh_annotations},
};
use crate::lab::{Lab, PORT};

/// Nobody comes between the plugin's answer and this.
#[test]
fn a_pod_of_a_mesh_is_redirected_when_the_plugin_answers() {
    let lab = Lab::new();
    let agent = PodsAgent::start(lab.node.cgroup());
    let sandbox = agent.sandbox(lab.pod.netns(), "meshed");
    agent.wants(&sandbox);
    let _proxy = lab.proxy();
    lab.assert_direct();
    let answer = sandbox.call("ADD");
    lab.assert_redirected();
    assert_eq!(answer.result(), sandbox.previous());
    assert!(sandbox.call("CHECK").succeeded_silently());
    assert!(sandbox.call("STATUS").succeeded_silently());
}

#[test]
fn a_pod_of_no_mesh_is_left_alone() {
    let lab = Lab::new();
    let agent = PodsAgent::start(lab.node.cgroup());
    let sandbox = agent.sandbox(lab.pod.netns(), "plain");
    assert_eq!(sandbox.call("ADD").result(), sandbox.previous());
    lab.assert_direct();
    assert!(sandbox.call("CHECK").succeeded_silently());
    assert!(sandbox.call("DEL").succeeded_silently());
}

/// As kubelet does it: five times, mostly without a namespace.
#[test]
fn what_was_added_can_be_deleted_again_and_again() {
    let lab = Lab::new();
    let agent = PodsAgent::start(lab.node.cgroup());
    let sandbox = agent.sandbox(lab.pod.netns(), "meshed");
    agent.wants(&sandbox);
    for _ in 0..2 {
        assert!(sandbox.call("ADD").succeeded());
        lab.assert_refused();
        for _ in 0..5 {
            assert!(sandbox.without_netns().call("DEL").succeeded_silently());
            lab.assert_direct();
        }
    }
    // The agent knows the namespace from elsewhere.
    assert!(sandbox.call("ADD").succeeded());
    assert!(
        sandbox
            .of_container("other")
            .call("DEL")
            .succeeded_silently()
    );
    lab.assert_direct();
}

#[test]
fn a_check_fails_when_the_redirection_is_gone() {
    let lab = Lab::new();
    let agent = PodsAgent::start(lab.node.cgroup());
    let sandbox = agent.sandbox(lab.pod.netns(), "meshed");
    agent.wants(&sandbox);
    assert!(sandbox.call("ADD").succeeded());
    assert!(sandbox.call("CHECK").succeeded_silently());
    // By another runtime's hand.
    assert!(sandbox.of_container("other").call("DEL").succeeded());
    let (code, says) = sandbox.call("CHECK").error();
    assert_eq!(code, 100, "{says}");
    assert!(says.contains("is not redirected"), "{says}");
}

#[test]
fn what_a_network_has_no_more_is_collected() {
    let lab = Lab::new();
    let agent = PodsAgent::start(lab.node.cgroup());
    let sandbox = agent.sandbox(lab.pod.netns(), "meshed");
    agent.wants(&sandbox);
    assert!(sandbox.call("ADD").succeeded());
    for valid in [json!([sandbox.attachment()]), json!([])] {
        let collected = sandbox.with("cni.dev/valid-attachments", valid.clone());
        assert!(collected.call("GC").succeeded_silently());
        if valid == json!([]) {
            lab.assert_direct();
        } else {
            lab.assert_refused();
        }
    }
}

/// The API does not answer, or there is no agent: neither is a reason to let a pod of a
/// mesh start, or to keep another from it.
#[test]
fn pods_of_a_mesh_wait_for_an_agent_that_knows() {
    let lab = Lab::new();
    let agent = PodsAgent::start(lab.node.cgroup());
    let sandbox = agent.sandbox(lab.pod.netns(), "meshed");
    agent.cannot_tell("the API server is away");
    let away = sandbox.at_socket("/nowhere/shunt.sock");
    for (sandbox, why) in [
        (&sandbox, "the API server is away"),
        (&away, "no agent serves at /nowhere/shunt.sock"),
    ] {
        let meshed = sandbox.with("runtimeConfig", mesh_annotations());
        for command in ["ADD", "CHECK"] {
            assert!(sandbox.call(command).succeeded());
            let (code, says) = meshed.call(command).error();
            assert_eq!(code, 11, "{says}");
            assert!(
                says.contains("default/meshed waits") && says.contains(why),
                "{says}"
            );
        }
        assert!(meshed.call("DEL").succeeded_silently());
        assert!(meshed.without_netns().call("DEL").succeeded_silently());
    }
    lab.assert_direct();
}

/// Old runtimes do not pass annotations; kubelet has made the volumes before.
#[test]
fn without_annotations_the_volumes_tell() {
    let node = Node::new();
    let pod = node.pod("pod");
    let sandbox = Sandbox::new(pod.netns(), "cart").at_socket("/nowhere/shunt.sock");
    let sandbox = sandbox.with("runtimeConfig", json!({}));
    let volumes = sandbox.kubelet_volumes();
    let (code, says) = sandbox.call("ADD").error();
    assert!(code == 11 && says.contains("--kubelet-dir"), "{says}");
    let (code, says) = sandbox.call("STATUS").error();
    assert_eq!(code, 50, "{says}");

    fs::create_dir_all(volumes.join("kubernetes.io~projected/istio-token")).expect("new");
    assert!(sandbox.call("ADD").succeeded());
    assert!(sandbox.call("STATUS").succeeded_silently());

    fs::create_dir_all(volumes.join("kubernetes.io~empty-dir/istio-envoy")).expect("new");
    let (code, says) = sandbox.call("ADD").error();
    assert!(code == 11 && says.contains("Istio"), "{says}");
}

#[test]
fn many_pods_are_added_at_once() {
    let node = Node::new();
    let _outside = Responder::start(node.netns(), Owner::APP, &[PORT]);
    let agent = PodsAgent::start(node.cgroup());
    let pods: Vec<Pod> = (0..12)
        .map(|number| node.pod(&format!("pod{number}")))
        .collect();
    let sandbox = |(number, pod): (usize, &Pod)| {
        let sandbox = agent.sandbox(pod.netns(), &format!("pod{number}"));
        // Every third is of no mesh.
        if number % 3 != 0 {
            agent.wants(&sandbox);
        }
        sandbox
    };
    let sandboxes: Vec<Sandbox> = pods.iter().enumerate().map(sandbox).collect();
    thread::scope(|scope| {
        for (number, (pod, sandbox)) in pods.iter().zip(&sandboxes).enumerate() {
            scope.spawn(move || {
                assert!(sandbox.call("ADD").succeeded());
                let expected = if number % 3 == 0 {
                    "node:80"
                } else {
                    "refused"
                };
                assert_eq!(outbound(pod.netns()), expected);
            });
        }
    });
    thread::scope(|scope| {
        for (pod, sandbox) in pods.iter().zip(&sandboxes) {
            scope.spawn(move || {
                assert!(sandbox.without_netns().call("DEL").succeeded_silently());
                assert_eq!(outbound(pod.netns()), "node:80");
            });
        }
    });
}

/// A namespace that is not there, for a pod that has to be redirected.
#[test]
fn a_pod_that_cannot_be_redirected_does_not_start() {
    let node = Node::new();
    let pod = node.pod("pod");
    let agent = PodsAgent::start(node.cgroup());
    let sandbox = agent
        .sandbox(pod.netns(), "meshed")
        .in_netns("/run/netns/shunt-none");
    agent.wants(&sandbox);
    let (code, says) = sandbox.call("ADD").error();
    assert_eq!(code, 100, "{says}");
    assert!(says.contains("HostToContainer"), "{says}");
    assert!(sandbox.call("DEL").succeeded_silently());
}

fn outbound(netns: &Netns) -> String {
    let call = Probe::new(Owner::APP, (Node::OUTSIDE, PORT));
    probe(netns, &call).outcome.to_string()
}
