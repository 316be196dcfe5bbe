use shunt_abi::Hairpin;

use crate::{Capture, Dns, Groups, Rules};

/// The rules of one chain, as written for IPv4.
fn chain(rules: &Rules, name: &str) -> Vec<String> {
    chain_of(&rules.ipv4(), name)
}

fn chain_of(text: &str, name: &str) -> Vec<String> {
    let start = format!("-A {name} ");
    text.lines()
        .filter_map(|line| line.strip_prefix(&start))
        .map(str::to_owned)
        .collect()
}

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}

#[test]
fn real_sidecars_carry_these_rules() {
    let istio_1_1 = Rules {
        inbound_port: 15001,
        inbound_ports: Capture::Listed(vec![80]),
        inbound_ports_exclude: Vec::new(),
        hairpin: Hairpin::Legacy,
        // Its rules do not name 15008; `-b 80` leaves it alone all the same.
        tunnel_inbound: true,
        ..Rules::istio()
    };
    let istio_1_13 = Rules {
        inbound_ports_exclude: vec![22, 15090, 15020],
        hairpin: Hairpin::Tunnel,
        tunnel_inbound: true,
        ..Rules::istio()
    };
    let istio_redirect = Rules {
        hairpin: Hairpin::Tunnel,
        ..Rules::istio()
    };
    for (name, file, rules) in [
        (
            "istio-1.1",
            include_str!("../../../oracle/istio-1.1.rules"),
            istio_1_1,
        ),
        (
            "istio-1.13",
            include_str!("../../../oracle/istio-1.13.rules"),
            istio_1_13,
        ),
        (
            "istio-1.21",
            include_str!("../../../oracle/istio-1.21.rules"),
            Rules::istio(),
        ),
        (
            "istio-redirect",
            include_str!("../../../oracle/istio-redirect.rules"),
            istio_redirect,
        ),
    ] {
        let uncommented: String = file
            .split_inclusive('\n')
            .filter(|line| !line.starts_with('#'))
            .collect();
        assert_eq!(rules.ipv4(), uncommented, "{name}");
    }
}

#[test]
fn dns_capture_changes_the_owner_rules_and_has_its_own_chain() {
    let rules = Rules {
        dns: Dns::Resolvers(vec![[10, 96, 0, 10].into(), [127, 0, 0, 53].into()]),
        outbound_ports_exclude: vec![25],
        ..Rules::istio()
    };
    assert_eq!(chain(&rules, "OUTPUT"), ["-j ISTIO_OUTPUT"]);
    assert_eq!(
        chain(&rules, "ISTIO_OUTPUT"),
        [
            "-p tcp -m tcp --dport 25 -j RETURN",
            "-p udp -m udp --dport 25 -j RETURN",
            "-s 127.0.0.6/32 -o lo -j RETURN",
            "! -d 127.0.0.1/32 -o lo -p tcp -m multiport ! --dports 53,15008 -m owner --uid-owner 1337 -j ISTIO_IN_REDIRECT",
            "-o lo -p tcp -m tcp ! --dport 53 -m owner ! --uid-owner 1337 -j RETURN",
            "-m owner --uid-owner 1337 -j RETURN",
            "! -d 127.0.0.1/32 -o lo -p tcp -m tcp ! --dport 15008 -m owner --gid-owner 1337 -j ISTIO_IN_REDIRECT",
            "-o lo -p tcp -m tcp ! --dport 53 -m owner ! --gid-owner 1337 -j RETURN",
            "-m owner --gid-owner 1337 -j RETURN",
            "-j ISTIO_OUTPUT_DNS",
            "-d 127.0.0.1/32 -j RETURN",
            "-j ISTIO_REDIRECT",
        ]
    );
    assert_eq!(
        chain(&rules, "ISTIO_OUTPUT_DNS"),
        [
            "-d 10.96.0.10/32 -p tcp -m tcp --dport 53 -j REDIRECT --to-ports 15053",
            "-d 127.0.0.53/32 -p tcp -m tcp --dport 53 -j REDIRECT --to-ports 15053",
            "-d 10.96.0.10/32 -p udp -m udp --dport 53 -j REDIRECT --to-ports 15053",
            "-d 127.0.0.53/32 -p udp -m udp --dport 53 -j REDIRECT --to-ports 15053",
        ]
    );
    // The owner rules are those of DNS capture in both families, the chain is
    // only there for a family that has a resolver.
    assert!(!rules.ipv6().contains("ISTIO_OUTPUT_DNS"));
    assert!(rules.ipv6().contains("! --dports 53,15008"));
}

#[test]
fn without_a_resolver_dns_is_not_captured() {
    let rules = Rules {
        dns: Dns::Resolvers(Vec::new()),
        ..Rules::istio()
    };
    assert_eq!(rules.ipv4(), Rules::istio().ipv4());
}

#[test]
fn each_family_has_its_own_addresses() {
    let rules = Rules {
        outbound_ranges: Capture::Listed(vec![
            "10.0.0.9/8".parse().expect("a range"),
            "fd00::9/64".parse().expect("a range"),
        ]),
        outbound_ranges_exclude: vec![
            "fd00::/120".parse().expect("a range"),
            "10.1.0.0/16".parse().expect("a range"),
        ],
        uids: Vec::new(),
        gids: Vec::new(),
        ..Rules::istio()
    };
    assert_eq!(
        chain(&rules, "ISTIO_OUTPUT"),
        [
            "-s 127.0.0.6/32 -o lo -j RETURN",
            "-d 127.0.0.1/32 -j RETURN",
            "-d 10.1.0.0/16 -j RETURN",
            "-d 10.0.0.0/8 -j ISTIO_REDIRECT",
        ]
    );
    assert_eq!(
        chain_of(&rules.ipv6(), "ISTIO_OUTPUT"),
        [
            "-s ::6/128 -o lo -j RETURN",
            "-d ::1/128 -j RETURN",
            "-d fd00::/120 -j RETURN",
            "-d fd00::/64 -j ISTIO_REDIRECT",
        ]
    );
}

#[test]
fn virtual_interfaces_come_before_excluded_ones() {
    let mut rules = Rules {
        interfaces_virtual: names(&["net1", "net2"]),
        interfaces_exclude: names(&["eth0"]),
        ..Rules::istio()
    };
    assert_eq!(
        chain(&rules, "PREROUTING"),
        [
            "-i net2 -j ISTIO_REDIRECT",
            "-i net1 -j ISTIO_REDIRECT",
            "-i net2 -j RETURN",
            "-i net1 -j RETURN",
            "-i eth0 -j RETURN",
            "-p tcp -j ISTIO_INBOUND",
        ]
    );
    rules.outbound_ranges = Capture::Listed(vec!["10.0.0.0/8".parse().expect("a range")]);
    assert_eq!(
        chain(&rules, "PREROUTING")[..2],
        [
            "-d 10.0.0.0/8 -i net2 -j ISTIO_REDIRECT",
            "-d 10.0.0.0/8 -i net1 -j ISTIO_REDIRECT"
        ]
    );
}

#[test]
fn owner_groups_stand_between_the_owners_and_loopback() {
    let base = Rules {
        uids: Vec::new(),
        gids: Vec::new(),
        ..Rules::istio()
    };
    for (groups, expected) in [
        (Groups::Except(Vec::new()), vec![]),
        (
            Groups::Except(vec![7, 8]),
            vec![
                "-m owner --gid-owner 7 -j RETURN",
                "-m owner --gid-owner 8 -j RETURN",
            ],
        ),
        (
            Groups::Only(vec![7, 8]),
            vec!["-m owner ! --gid-owner 7 -m owner ! --gid-owner 8 -j RETURN"],
        ),
        (Groups::Only(Vec::new()), vec!["-j RETURN"]),
    ] {
        let rules = Rules {
            groups,
            ..base.clone()
        };
        let output = chain(&rules, "ISTIO_OUTPUT");
        assert_eq!(output[1..output.len() - 2], expected);
    }
}
