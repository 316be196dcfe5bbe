//! Whose memory it is what connections keep in the agent's maps.

use std::net::{Ipv4Addr, TcpListener, TcpStream};

use shunt_tests::{Agent, Node, agent::Place, memory_cgroup::MemoryCgroup, mesh::ISTIO_DEFAULTS};

use crate::lab::PORT;

/// How many connections are open.
const MANY: u64 = 1_000;
/// Between nothing and what both ends of them keep, some 580 bytes each.
const LIMIT: u64 = MANY * 300;

/// As the agent's it would use up what the agent's container may take.
#[test]
fn it_is_nobodys() {
    assert_nobodys(r#"exec "$@""#);
}

/// With a cgroup namespace of its own, the node's processes, the node's cgroups to read, and the
/// capabilities of the chart.
#[test]
fn it_is_nobodys_beside_an_agent_in_a_container() {
    assert_nobodys(
        r#"exec setpriv --pdeathsig KILL unshare --pid --fork --kill-child --mount-proc sh -ec '
            unshare --cgroup --mount sh -ec "
                mount -o remount,bind,ro \"\$root\"
                exec setpriv --no-new-privs --bounding-set \
                    -all,+bpf,+perfmon,+net_admin,+net_broadcast,+sys_admin,+sys_ptrace \"\$@\"
            " sh "$@"
        ' sh "$@""#,
    );
}

/// Without the node's processes there is no way out of the container: the agent redirects as
/// ever, and says whose memory it is.
#[test]
fn it_is_the_agents_in_a_container_that_sees_nobody_else() {
    let log = with_connections(ALONE, |before, memory| {
        let after = memory.charged();
        assert!(after > before + LIMIT, "{before} became {after}");
    });
    assert!(log.contains(IS_SAID), "{log}");
}

/// The maps of splicing are new each time, whatever else is taken over.
#[test]
fn it_says_so_again_when_it_takes_over() {
    let node = Node::new();
    let mut place = Place::new(node.cgroup());
    for _ in 0..2 {
        // Its end is that of the agent in it.
        let memory = MemoryCgroup::new();
        let mut command = memory.command(ALONE, &place.persistent_command());
        let agent = Agent::start_by(place, &mut command);
        let log = agent.log();
        place = agent.kill();
        assert!(log.contains(IS_SAID), "{log}");
    }
}

/// Starts an agent that sees nobody else.
const ALONE: &str = r#"exec setpriv --pdeathsig KILL \
    unshare --cgroup --pid --fork --kill-child --mount-proc "$@""#;

/// In the log where it is the agent's memory.
const IS_SAID: &str = "bound by its limit";

#[track_caller]
fn assert_nobodys(start: &str) {
    let log = with_connections(start, |before, memory| {
        let after = memory.charged();
        assert!(before.abs_diff(after) < LIMIT, "{before} became {after}");
    });
    assert!(!log.contains(IS_SAID), "{log}");
}

/// Looks at what an agent that is started so is charged while redirected connections are open,
/// and gives its log. The look is told what it was before.
fn with_connections(start: &str, look: impl FnOnce(u64, &MemoryCgroup)) -> String {
    let memory = MemoryCgroup::new();
    let node = Node::new();
    let pod = node.pod("pod");
    let place = Place::new(node.cgroup());
    let mut command = memory.command(start, &place.run_command());
    let agent = Agent::start_by(place, &mut command);
    agent.enroll(pod.netns(), &ISTIO_DEFAULTS);
    // The agent itself, and the maps that it writes.
    let before = memory.charged();
    assert!(before > LIMIT, "only {before} bytes are charged");
    let open = pod.netns().run(connections);
    look(before, &memory);
    drop(open);
    let log = agent.log();
    // Nothing else goes past `unshare`, which SIGTERM would not end either.
    drop(agent.kill());
    log
}

/// Both ends of connections that were redirected to the proxy's port.
fn connections() -> Vec<(TcpStream, TcpStream)> {
    let proxy = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 15001)).expect("nobody listens there");
    let open = (0..MANY).map(|_| {
        let application = TcpStream::connect((Node::OUTSIDE, PORT)).expect("the proxy listens");
        (application, proxy.accept().expect("it was called").0)
    });
    open.collect()
}
