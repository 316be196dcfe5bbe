//! Lists as long as they can be.

use std::net::{IpAddr, Ipv4Addr};

use shunt::settings::Field;
use shunt_tests::{Node, Owner, Probe, Source, probe};

use crate::lab::{Lab, PORT};

/// Who answers a call from outside to this port of the pod.
fn inbound(lab: &Lab, port: u16) -> String {
    let call = Probe::new(Owner::APP, (lab.pod.ip(), port));
    probe(lab.node.netns(), &call).outcome.to_string()
}

/// Who answers the application's call to this address.
fn outbound(lab: &Lab, ip: IpAddr, port: u16) -> String {
    let call = Probe::new(Owner::APP, (ip, port)).from(Source::Unbound);
    probe(lab.pod.netns(), &call).outcome.to_string()
}

fn comma_separated<T: ToString>(items: impl Iterator<Item = T>) -> String {
    items
        .map(|item| item.to_string())
        .collect::<Vec<_>>()
        .join(",")
}

#[test]
fn a_list_of_every_port_captures_every_port() {
    let lab = Lab::new();
    let _proxy = lab.proxy();
    let agent = lab.agent();
    let all = comma_separated(1..=u16::MAX);
    agent.enroll_written(
        lab.pod.netns(),
        [
            (Field::InboundInclude, all.clone()),
            (Field::OutboundPortsInclude, all),
        ],
    );
    for port in [1, 2, 63, 64, 65, 4095, 4096, 32_767, 32_768, 65_534, 65_535] {
        assert_eq!(inbound(&lab, port), "pod:15006", "port {port}");
        assert_eq!(
            outbound(&lab, Node::OUTSIDE, port),
            "pod:15001",
            "port {port}"
        );
    }
    // The tunnel's port never is.
    assert_eq!(inbound(&lab, 15008), "refused");
}

#[test]
fn a_list_of_every_second_port_captures_those() {
    let lab = Lab::new();
    let _proxy = lab.proxy();
    let agent = lab.agent();
    let odd = comma_separated((1..=u16::MAX).step_by(2));
    let even = comma_separated((2..=u16::MAX).step_by(2));
    agent.enroll_written(
        lab.pod.netns(),
        [
            (Field::InboundInclude, odd),
            (Field::OutboundInclude, "*".to_owned()),
            (Field::OutboundPortsExclude, even),
        ],
    );
    for port in [1, 65, 511, 513, 4095, 32_767, 65_535] {
        assert_eq!(inbound(&lab, port), "pod:15006", "port {port}");
        assert_eq!(
            outbound(&lab, Node::OUTSIDE, port),
            "pod:15001",
            "port {port}"
        );
    }
    // Nobody listens on these, or the application does itself.
    for port in [2, 64, 510, 512, 4096, 32_768, 65_534] {
        assert_eq!(inbound(&lab, port), "refused", "port {port}");
        assert_eq!(
            outbound(&lab, Node::OUTSIDE, port),
            "refused",
            "port {port}"
        );
    }
    assert_eq!(inbound(&lab, PORT), "pod:80");
    assert_eq!(outbound(&lab, Node::OUTSIDE, PORT), "node:80");
}

/// 10,000 networks of four addresses each, with gaps of four between them.
#[test]
fn ten_thousand_networks_have_sharp_edges() {
    const NETWORKS: u32 = 10_000;
    let first = u32::from(Ipv4Addr::new(100, 64, 0, 0));
    let network = |number: u32| Ipv4Addr::from(first + 8 * number);
    let lab = Lab::new();
    // Whatever goes past the proxy arrives.
    lab.node
        .netns()
        .ip("route add local 100.64.0.0/10 dev lo\n");
    let _proxy = lab.proxy();
    let agent = lab.agent();
    let networks = comma_separated((0..NETWORKS).map(|n| format!("{}/30", network(n))));
    agent.enroll_written(
        lab.pod.netns(),
        [(Field::OutboundInclude, networks.clone())],
    );
    let numbers = [0, 1, 2, 4_999, 5_000, NETWORKS - 2, NETWORKS - 1];
    let at = |number: u32, host: u32| IpAddr::V4(Ipv4Addr::from(first + 8 * number + host));
    for number in numbers {
        for (host, who) in [
            (0, "pod:15001"),
            (3, "pod:15001"),
            (4, "node:80"),
            (7, "node:80"),
        ] {
            assert_eq!(
                outbound(&lab, at(number, host), PORT),
                who,
                "{number} {host}"
            );
        }
    }

    // The same networks, to be left alone.
    agent.enroll_written(
        lab.pod.netns(),
        [
            (Field::OutboundInclude, "*".to_owned()),
            (Field::OutboundExclude, networks),
        ],
    );
    for number in numbers {
        for (host, who) in [
            (0, "node:80"),
            (3, "node:80"),
            (4, "pod:15001"),
            (7, "pod:15001"),
        ] {
            assert_eq!(
                outbound(&lab, at(number, host), PORT),
                who,
                "{number} {host}"
            );
        }
    }
}
