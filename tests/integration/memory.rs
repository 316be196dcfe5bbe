//! Whose memory it is what connections keep in the agent's maps.

use std::net::{Ipv4Addr, TcpListener, TcpStream};

use shunt_tests::{Agent, Node, agent::Place, memory_cgroup::MemoryCgroup, mesh::ISTIO_DEFAULTS};

use crate::lab::PORT;

/// How many connections are open.
const MANY: u64 = 5_000;
/// What both ends of each keep at least, in bytes.
const EACH: u64 = 300;

/// As the agent's it would use up what the agent's container may take.
#[test]
fn it_is_nobodys() {
    assert_nobodys(r#"exec "$@""#);
}

/// With a cgroup namespace of its own, the node's processes, and the node's cgroups to read.
#[test]
fn it_is_nobodys_beside_an_agent_in_a_container() {
    assert_nobodys(
        r#"exec setpriv --pdeathsig KILL unshare --pid --fork --kill-child --mount-proc sh -ec '
            unshare --cgroup --mount sh -ec "
                mount -o remount,bind,ro \"\$root\"
                exec \"\$@\"
            " sh "$@"
        ' sh "$@""#,
    );
}

/// Without the node's processes there is no way out of the container: the agent redirects as
/// ever, and says whose memory it is.
#[test]
fn it_is_the_agents_in_a_container_that_sees_nobody_else() {
    let alone = r#"exec setpriv --pdeathsig KILL \
        unshare --cgroup --pid --fork --kill-child --mount-proc "$@""#;
    let (charged, log) = charged_for_connections(alone);
    assert!(charged > MANY * EACH, "{charged} bytes are charged");
    assert!(log.contains("bound by its limit"), "{log}");
}

#[track_caller]
fn assert_nobodys(start: &str) {
    let (charged, log) = charged_for_connections(start);
    assert!(
        charged < MANY * EACH / 4,
        "{charged} bytes are charged: {log}"
    );
    assert!(!log.contains("bound by its limit"), "{log}");
}

/// What an agent that is started so is charged for redirected connections, while they are open,
/// in bytes; and its log.
fn charged_for_connections(start: &str) -> (u64, String) {
    let memory = MemoryCgroup::new();
    let node = Node::new();
    let pod = node.pod("pod");
    let place = Place::new(node.cgroup());
    let mut command = memory.command(start, &place.run_command());
    let agent = Agent::start_by(place, &mut command);
    agent.enroll(pod.netns(), &ISTIO_DEFAULTS);
    let before = memory.charged();
    let _open = pod.netns().run(connections);
    let after = memory.charged();
    let log = agent.log();
    // Nothing else goes past `unshare`, which SIGTERM would not end either.
    drop(agent.kill());
    (after.saturating_sub(before), log)
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
