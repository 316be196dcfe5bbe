//! Agents that leave everything in force: killed, ended, replaced by others, while
//! connections come and go.

mod leftovers;
mod load;

use std::path::Path;

use shunt_tests::{
    Agent,
    agent::{Place, binary, other_binary},
    bpf,
    deadline::wait_until,
};

use self::load::{Load, World};

/// An agent for this world which leaves everything in force, and has enrolled the pod.
fn enrolled(world: &World) -> Agent {
    let place = Place::new(world.node.cgroup());
    let agent = Agent::start_persistent(place, &binary(), &[]);
    agent.enroll(world.pod.netns(), &load::SETTINGS);
    agent
}

fn again(place: Place) -> Agent {
    Agent::start_persistent(place, &binary(), &[])
}

/// How many connections the programs have counted.
fn counted(agent: &Agent) -> u64 {
    let status = agent.status();
    let rules = status["pods"][0]["counters"]["rules"].as_object();
    let rules = rules.expect("the pod is enrolled");
    rules.values().filter_map(serde_json::Value::as_u64).sum()
}

#[test]
fn an_agent_that_is_killed_leaves_no_gap() {
    let world = World::new();
    let mut agent = enrolled(&world);
    let load = Load::start(&world);
    for _ in 0..3 {
        load.goes_on();
        let before = counted(&agent);
        let place = agent.kill();
        load.goes_on();
        agent = again(place);
        load.goes_on();
        assert!(counted(&agent) > before, "what was counted is lost");
        load.assert_peers();
    }
    load.end();
}

#[test]
fn an_agent_that_ends_leaves_no_gap() {
    let world = World::new();
    let mut agent = enrolled(&world);
    let load = Load::start(&world);
    for _ in 0..3 {
        load.goes_on();
        let place = agent.stop();
        load.goes_on();
        agent = again(place);
        load.goes_on();
        load.assert_peers();
    }
    load.end();
}

/// Starts an agent with these arguments in the place of another, and then another one
/// as at first.
fn there_and_back(to: &Path, arguments: &[&str], keeps_peers: bool) {
    let world = World::new();
    let agent = enrolled(&world);
    let load = Load::start(&world);
    load.goes_on();
    let agent = Agent::start_persistent(agent.kill(), to, arguments);
    load.goes_on();
    if keeps_peers {
        load.assert_peers();
    } else {
        // Killed while the programs of the former hang beside its own.
        let agent = Agent::start_persistent(agent.kill(), to, arguments);
        load.goes_on();
        wait_until_alone(&world, &agent);
        load.goes_on();
        load.end();
        let load = Load::start(&world);
        let agent = again(agent.stop());
        load.goes_on();
        wait_until_alone(&world, &agent);
        load.goes_on();
        return load.end();
    }
    let agent = again(agent.stop());
    load.goes_on();
    load.assert_peers();
    // The place has to stay: the pins go with it.
    let _place = agent.kill();
    load.goes_on();
    load.end();
}

/// Waits until no programs of a former agent follow its connections any more.
fn wait_until_alone(world: &World, agent: &Agent) {
    let cgroup = world.node.cgroup().path();
    let own = bpf::said_to_be_attached(&agent.status(), cgroup);
    assert!(own > 0, "none is attached to {}", cgroup.display());
    wait_until("the former programs to be gone", || {
        let attached = bpf::attached_to_cgroup(cgroup);
        (attached == own)
            .then_some(())
            .ok_or_else(|| format!("{attached} are attached"))
    });
}

#[test]
fn other_maps_of_settings_leave_no_gap() {
    there_and_back(&binary(), &["--map-limit", "PODS=512"], true);
}

#[test]
fn other_maps_of_connections_leave_no_gap() {
    there_and_back(&binary(), &["--map-limit", "FLOWS=65536"], false);
}

/// Of other programs, whose types in the maps have other sizes, of settings and of
/// connections.
#[test]
fn another_layout_leaves_no_gap() {
    there_and_back(&other_binary(), &[], false);
}
