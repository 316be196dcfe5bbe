//! What is left by agents that leave everything in force, and who takes it away.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;
use shunt_tests::{
    Agent, Owner, Responder, agent,
    agent::{Place, binary},
    bpf,
    command::output_of,
    deadline::wait_until,
    mesh::ISTIO_DEFAULTS,
};

use crate::lab::Lab;

fn persistent(lab: &Lab) -> Agent {
    Agent::start_persistent(Place::new(lab.node.cgroup()), &binary(), &[])
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    let found = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .filter_map(Result::ok);
    let mut found: Vec<PathBuf> = found.map(|entry| entry.path()).collect();
    found.sort();
    found
}

/// What is in the maps of pods, without what is counted.
fn in_maps(agent: &Agent) -> BTreeMap<String, usize> {
    bpf::entries_by_map(&agent.status())
}

#[test]
fn a_namespace_that_goes_while_no_agent_runs_leaves_nothing() {
    let lab = Lab::new();
    let _proxy = lab.proxy();
    let agent = persistent(&lab);
    agent.enroll(lab.pod.netns(), &ISTIO_DEFAULTS);
    let before = in_maps(&agent);
    let gone = lab.node.pod("gone");
    let proxy = Responder::start(gone.netns(), Owner::PROXY, &[15001, 15006]);
    agent.enroll(
        gone.netns(),
        &[&ISTIO_DEFAULTS[..], &["-o", "9090"]].concat(),
    );
    assert_ne!(in_maps(&agent), before);
    let place = agent.kill();
    let saved = entries(&place.state_dir()).len();
    assert_eq!(saved, 2);
    drop(proxy);
    drop(gone);

    let agent = Agent::start_persistent(place, &binary(), &[]);

    lab.assert_redirected();
    wait_until("the maps to be as before", || {
        let now = in_maps(&agent);
        (now == before)
            .then_some(())
            .ok_or_else(|| format!("{now:?}"))
    });
    let place = agent.place();
    assert_eq!(entries(&place.state_dir()).len(), 1);
    let links = entries(&place.bpffs().join("links"));
    let lookups = links
        .iter()
        .filter(|pin| pin.to_string_lossy().contains("lookup_"));
    assert_eq!(lookups.count(), 1, "{links:?}");
}

/// A proxy that starts while no agent runs is found, by the programs.
#[test]
fn a_proxy_may_restart_while_no_agent_runs() {
    let lab = Lab::new();
    let proxy = lab.proxy();
    let agent = persistent(&lab);
    agent.enroll(lab.pod.netns(), &ISTIO_DEFAULTS);
    let place = agent.stop();
    lab.assert_redirected();
    drop(proxy);
    lab.assert_refused();
    let _proxy = lab.proxy();
    lab.assert_redirected();
    let agent = Agent::start_persistent(place, &binary(), &[]);
    lab.assert_redirected();
    agent.unenroll(lab.pod.netns());
    lab.assert_direct();
    let place = agent.stop();
    assert_eq!(entries(&place.state_dir()), Vec::<PathBuf>::new());
    lab.assert_direct();
}

/// The path by which a namespace was enrolled may be gone before it is.
#[test]
fn a_namespace_is_found_by_another_path() {
    let lab = Lab::new();
    let _proxy = lab.proxy();
    let agent = persistent(&lab);
    let process = lab
        .pod
        .netns()
        .command("sleep", Owner::APP)
        .arg("600")
        .spawn();
    let mut process = process.expect("sleep can be started");
    let path = format!("/proc/{}/ns/net", process.id());
    let ran = agent::run(&mut agent.enroll_command(Path::new(&path), &ISTIO_DEFAULTS));
    assert!(ran.status.success(), "{ran:?}");
    let place = agent.kill();
    process.kill().expect("it runs");
    process.wait().expect("it is a child");
    let agent = Agent::start_persistent(place, &binary(), &[]);
    lab.assert_redirected();
    let status = agent.status();
    let enrolled = status["pods"][0]["netns"].as_str();
    assert_eq!(enrolled, lab.pod.netns().path().to_str());
}

/// An agent that would take everything away when it ends refuses to begin.
#[test]
fn what_is_in_force_is_not_taken_over_by_an_agent_that_ends_it() {
    let lab = Lab::new();
    let _proxy = lab.proxy();
    let agent = persistent(&lab);
    agent.enroll(lab.pod.netns(), &ISTIO_DEFAULTS);
    let place = agent.stop();
    let ran = agent::run(&mut place.run_command());
    assert_eq!(ran.status.code(), Some(1), "{ran:?}");
    assert!(ran.stderr.contains("shunt uninstall"), "{}", ran.stderr);
    lab.assert_redirected();
}

#[test]
fn uninstalling_leaves_nothing() {
    let lab = Lab::new();
    let _proxy = lab.proxy();
    let place = Place::new(lab.node.cgroup());
    let agent = Agent::start_persistent(place, &binary(), &[]);
    agent.enroll(lab.pod.netns(), &ISTIO_DEFAULTS);
    lab.assert_redirected();
    let status = agent.status();
    let (programs, maps) = (ids(&status, "programs"), ids(&status, "maps"));

    let ran = agent::run(&mut agent.place().uninstall_command());
    assert_eq!(ran.status.code(), Some(1), "{ran:?}");
    assert!(ran.stderr.contains("an agent runs"), "{}", ran.stderr);
    lab.assert_redirected();

    // What a killed agent leaves is the most.
    let place = agent.kill();
    lab.assert_redirected();
    for _ in 0..2 {
        let ran = agent::run(&mut place.uninstall_command());
        assert!(ran.status.success(), "{ran:?}");
        lab.assert_direct();
        assert_eq!(bpf::attached_to_cgroup(lab.node.cgroup().path()), 0);
        assert_eq!(entries(place.path()), [place.path().join("bpffs")]);
        assert!(!place.bpffs().exists(), "the directory of the pins is left");
    }
    // The kernel frees them some time after their last user is gone.
    for (what, ids) in [("prog", programs), ("map", maps)] {
        for (name, id) in ids {
            wait_until(&format!("{name} to be gone"), || {
                let listed = listed(what);
                (!listed.contains(&id))
                    .then_some(())
                    .ok_or_else(|| id.to_string())
            });
        }
    }
}

fn ids(status: &Value, what: &str) -> Vec<(String, u64)> {
    let objects = status[what].as_array().expect("a list");
    let each = objects.iter().map(|object| {
        let name = object["name"].as_str().expect("a name").to_owned();
        (name, object["id"].as_u64().expect("an id"))
    });
    each.collect()
}

/// The ids of all programs or maps of this kernel.
fn listed(what: &str) -> Vec<u64> {
    let text = output_of(Command::new("bpftool").args(["-j", what, "show"]));
    let list: Vec<Value> = serde_json::from_str(&text).expect("a list");
    list.iter().filter_map(|one| one["id"].as_u64()).collect()
}
