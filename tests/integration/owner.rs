//! Who owns a socket, and what each side of a connection sees.

use std::net::{IpAddr, SocketAddr};

use shunt_tests::{
    Agent, Families, Greeting, Node, Owner, Probe, Responder, Source, Stack, mesh::ISTIO_DEFAULTS,
    probe,
};
use socket2::{Domain, Socket, Type};

use crate::lab::{Lab, PORT};

/// Connects a socket that `opened` has made, as `connected`.
fn call(lab: &Lab, opened: Owner, connected: Owner) -> Greeting {
    lab.pod.netns().run(|| {
        opened.assume();
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a new socket");
        connected.assume();
        let outside = SocketAddr::from((Node::OUTSIDE, PORT));
        socket.connect(&outside.into()).expect("somebody answers");
        Greeting::read(&socket)
    })
}

#[test]
fn the_owner_of_a_socket_is_who_opened_it() {
    let lab = Lab::new();
    let _proxy = lab.proxy();
    let _agent = lab.enrolled();
    assert_eq!(call(&lab, Owner::ROOT, Owner::PROXY).place, "pod");
    assert_eq!(call(&lab, Owner::APP, Owner::PROXY).place, "pod");
    assert_eq!(call(&lab, Owner::PROXY, Owner::ROOT).place, "node");
    assert_eq!(call(&lab, Owner::PROXY, Owner::APP).place, "node");
}

/// A socket that is older than the programs has an owner all the same.
#[test]
fn a_socket_that_was_opened_before_the_agent_started_has_its_owner() {
    let lab = Lab::new();
    let _proxy = lab.proxy();
    let open = |owner: Owner| {
        lab.pod.netns().run(|| {
            owner.assume();
            Socket::new(Domain::IPV4, Type::STREAM, None).expect("a new socket")
        })
    };
    let (of_proxy, of_app) = (open(Owner::PROXY), open(Owner::APP));
    let _agent = lab.enrolled();
    let outside = SocketAddr::from((Node::OUTSIDE, PORT));
    let place = |socket: Socket| {
        socket.connect(&outside.into()).expect("somebody answers");
        Greeting::read(&socket).place
    };
    assert_eq!(place(of_proxy), "node");
    assert_eq!(place(of_app), "pod");
}

/// What `istio-iptables` itself tries out after it has written its rules.
#[test]
fn the_check_of_the_mesh_passes() {
    let node = Node::new();
    let pod = node.pod_with("pod", Stack::Dual);
    let netns = pod.netns();
    let _proxy = Responder::start_for(Families::Split, netns, Owner::PROXY, &[15001, 15006]);
    let agent = Agent::start(node.cgroup());
    agent.enroll(netns, &[&ISTIO_DEFAULTS[..], &["--dual-stack"]].concat());
    for [from, to] in [["127.0.0.1", "127.0.0.6"], ["::1", "::6"]] {
        let [from, to]: [IpAddr; 2] = [from, to].map(|ip| ip.parse().expect("an address"));
        let six = SocketAddr::from((to, 15002));

        let answer = probe(
            netns,
            &Probe::new(Owner::PROXY, six).from(Source::Addr(from)),
        );

        assert_eq!(answer.outcome.to_string(), "pod:15006");
        let greeting = answer.greeting();
        assert_eq!(greeting.original_dst, Ok(six));
        assert_eq!(greeting.peer.ip(), from);
        // Over IPv6 the proxy is reached at the caller's own address.
        assert_eq!(greeting.local, (from, 15006).into());
    }
}

#[test]
fn the_application_and_the_proxy_see_each_other_as_without_redirection() {
    let lab = Lab::new();
    let _proxy = lab.proxy();
    let _agent = lab.enrolled();
    let asked = SocketAddr::from((Node::OUTSIDE, PORT));

    let answer = probe(lab.pod.netns(), &Probe::new(Owner::APP, asked));

    let greeting = answer.greeting();
    assert_eq!(answer.outcome.to_string(), "pod:15001");
    assert_eq!(answer.peername, Some(asked));
    assert_eq!(Some(greeting.peer), answer.sockname);
    assert_eq!(greeting.peer.ip(), lab.pod.ip());
    assert_eq!(greeting.original_dst, Ok(asked));
}
