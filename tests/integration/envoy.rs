//! Two pods with real applications and real Envoys: every way that a request
//! can take through a sidecar.

use std::net::SocketAddr;

use shunt_tests::{
    Agent, MeshPod, Node, Outcome, Owner, Probe, Responder, envoy,
    http::{self, Response},
    mesh::{Journey, SIDECAR_SOURCE, Traces, moved},
    probe,
};

/// Nobody listens there.
const CLOSED: u16 = 9;

struct Mesh {
    _agent: Agent,
    client: MeshPod,
    server: MeshPod,
    node: Node,
}

impl Mesh {
    fn start() -> Self {
        let node = Node::new();
        let client = MeshPod::start(&node, "client");
        let server = MeshPod::start(&node, "server");
        let agent = Agent::start(node.cgroup());
        for pod in [&client, &server] {
            pod.enroll(&agent);
        }
        Self {
            _agent: agent,
            client,
            server,
            node,
        }
    }

    /// What must hold after every test: nothing reached a proxy that did not
    /// know where it should go, and nothing was left in the pods.
    fn check(&self) {
        for pod in [&self.client, &self.server] {
            assert_eq!(pod.envoy().counter("tcp.blackhole.downstream_cx_total"), 0);
            assert_eq!(pod.traces(), Traces::NONE);
        }
    }
}

fn hello(name: &str) -> Result<Response, String> {
    Ok(Response {
        status: 200,
        body: format!("hello from the application of {name}\n"),
    })
}

#[test]
fn a_request_goes_through_both_sidecars() {
    let mesh = Mesh::start();
    let (client, server) = (&mesh.client, &mesh.server);
    let before = [client, server].map(|pod| pod.envoy().counters());

    assert_eq!(client.get(server.address()), hello("server"));

    let Journey { outbound, inbound } = Journey::of(client, server.address(), server);
    assert_eq!(outbound.peer.ip(), client.pod().ip());
    assert_eq!(outbound.upstream, server.address().to_string());
    assert_eq!(inbound.peer.ip(), client.pod().ip());
    assert_eq!(inbound.upstream, server.address().to_string());
    // The application sees its sidecar, as it does with Istio's rules.
    let source: SocketAddr = inbound.upstream_source.parse().expect("an address");
    assert_eq!(source.ip(), SIDECAR_SOURCE);
    assert!(mesh.server.application().log().contains("127.0.0.6"));

    let after = [client, server].map(|pod| pod.envoy().counters());
    let [client_moved, server_moved] = [0, 1].map(|i| moved(&before[i], &after[i]));
    assert_eq!(client_moved["tcp.out.downstream_cx_total"], 1);
    assert_eq!(client_moved.get("tcp.in.downstream_cx_total"), None);
    assert_eq!(server_moved["tcp.in.downstream_cx_total"], 1);
    assert_eq!(server_moved.get("tcp.out.downstream_cx_total"), None);
    mesh.check();
}

#[test]
fn a_request_from_outside_goes_through_the_sidecar_of_the_server() {
    let mesh = Mesh::start();
    let address = mesh.server.address();

    let answer = http::get(mesh.node.netns(), Owner::APP, address, "/");

    assert_eq!(answer, hello("server"));
    let inbound = mesh.server.envoy().connection(envoy::INBOUND, address);
    assert_eq!(inbound.peer.ip(), Node::GATEWAY);
    mesh.check();
}

#[test]
fn a_pod_reaches_itself_through_a_service() {
    let mesh = Mesh::start();
    let pod = &mesh.client;

    // The sidecar sends it to the pod's own address, which comes back to it.
    assert_eq!(pod.get(envoy::SERVICE), hello("client"));

    let Journey { outbound, inbound } = Journey::of(pod, envoy::SERVICE, pod);
    assert_eq!(outbound.peer.ip(), pod.pod().ip());
    assert_eq!(outbound.upstream, pod.address().to_string());
    assert_eq!(inbound.peer.ip(), pod.pod().ip());
    assert_eq!(inbound.upstream, pod.address().to_string());
    mesh.check();
}

#[test]
fn a_pod_reaches_itself_directly_without_the_sidecar() {
    let mesh = Mesh::start();
    let pod = &mesh.client;

    assert_eq!(pod.get(pod.address()), hello("client"));

    for counter in ["tcp.out.downstream_cx_total", "tcp.in.downstream_cx_total"] {
        assert_eq!(pod.envoy().counter(counter), 0, "{counter}");
    }
    mesh.check();
}

#[test]
fn an_address_outside_of_the_mesh_is_reached_through_the_sidecar() {
    let mesh = Mesh::start();
    let _outside = Responder::start(mesh.node.netns(), Owner::APP, &[80]);
    let asked = SocketAddr::from((Node::OUTSIDE, 80));

    let answer = probe(mesh.client.pod().netns(), &Probe::new(Owner::APP, asked));

    let greeting = answer.greeting();
    assert_eq!(greeting.place, "node");
    assert_eq!(greeting.local, asked);
    assert_eq!(greeting.peer.ip(), mesh.client.pod().ip());
    assert_eq!(answer.peername, Some(asked));
    let outbound = mesh.client.envoy().connection(envoy::OUTBOUND, asked);
    assert_eq!(Some(outbound.peer), answer.sockname);
    assert_eq!(outbound.upstream, asked.to_string());
    mesh.check();
}

#[test]
fn the_health_port_is_left_alone() {
    let mesh = Mesh::start();
    let before = mesh.server.envoy().counters();
    let health = SocketAddr::from((mesh.server.pod().ip(), envoy::HEALTH_PORT));

    let answer = http::get(mesh.node.netns(), Owner::ROOT, health, "/healthz/ready")
        .expect("the health port answers");

    assert_eq!((answer.status, answer.body.as_str()), (200, "ready\n"));
    let moved = moved(&before, &mesh.server.envoy().counters());
    assert_eq!(moved["listener.health.downstream_cx_total"], 1);
    assert_eq!(moved.get("listener.in.downstream_cx_total"), None);
    mesh.check();
}

/// A sidecar accepts before it knows whether the application does: who calls a
/// closed port through it sees a connection that is closed at once, with
/// redirection of any kind. Only what goes past the sidecar is refused.
#[test]
fn a_closed_port_of_the_mesh_is_closed_by_the_sidecar() {
    let mesh = Mesh::start();
    let (client, server) = (&mesh.client, &mesh.server);
    let closed = SocketAddr::from((server.pod().ip(), CLOSED));
    let ask =
        |owner, destination| probe(client.pod().netns(), &Probe::new(owner, destination)).outcome;

    assert_eq!(ask(Owner::APP, closed), Outcome::Closed);
    let inbound = server.envoy().connection(envoy::INBOUND, closed);
    assert!(inbound.flags.contains("UF"), "{inbound:?}");

    let outside = SocketAddr::from((Node::OUTSIDE, CLOSED));
    assert_eq!(ask(Owner::APP, outside), Outcome::Closed);
    assert_eq!(ask(Owner::PROXY, outside), Outcome::Refused);
    let own = SocketAddr::from((client.pod().ip(), CLOSED));
    assert_eq!(ask(Owner::APP, own), Outcome::Refused);
    mesh.check();
}
