use super::Table;
use crate::{Family, Hook, Outcome, Owner, Packet, Protocol};

const HEAD: &str = "*nat\n:PREROUTING ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n:A - [0:0]\n:B - [0:0]\n";

fn text(rules: &[&str]) -> String {
    format!("{HEAD}{}\nCOMMIT\n", rules.join("\n"))
}

fn table(rules: &[&str]) -> Table {
    Table::parse(Family::V4, &text(rules)).expect("a table that is understood")
}

/// What is wrong with a table of these rules.
fn problem(rules: &[&str]) -> String {
    Table::parse(Family::V4, &text(rules))
        .expect_err("a table that is refused")
        .problem
}

fn packet() -> Packet {
    Packet {
        hook: Hook::Output {
            interface: "eth0".to_owned(),
            owner: Some(Owner { uid: 10, gid: 20 }),
        },
        protocol: Protocol::Tcp,
        source: [10, 0, 0, 1].into(),
        destination: [10, 9, 9, 9].into(),
        port: 80,
    }
}

fn from_outside() -> Packet {
    Packet {
        hook: Hook::Prerouting {
            interface: "eth0".to_owned(),
        },
        ..packet()
    }
}

/// Whether a rule with these matches takes the packet.
fn takes(matches: &str, packet: &Packet) -> bool {
    let chain = match packet.hook {
        Hook::Output { .. } => "OUTPUT",
        Hook::Prerouting { .. } => "PREROUTING",
    };
    let rule = format!("-A {chain} {matches} -j A");
    let table = table(&[&rule, "-A A -p tcp -j REDIRECT --to-ports 7"]);
    table.decide(packet) == Outcome::Redirect(7)
}

#[test]
fn every_match_and_its_negation_in_both_positions() {
    for (option, yes, no) in [
        ("-p", "tcp", "udp"),
        ("-s", "10.0.0.0/24", "10.0.1.0/24"),
        ("-s", "10.0.0.1", "10.0.0.2"),
        ("-d", "10.9.0.0/16", "10.9.9.8/32"),
        ("-o", "eth0", "eth1"),
        ("-p tcp --dport", "80", "81"),
        ("-p tcp -m tcp --dport", "80", "81"),
        ("-p tcp -m multiport --dports", "53,80", "53,81"),
        ("-m owner --uid-owner", "10", "11"),
        ("-m owner --gid-owner", "20", "10"),
    ] {
        let (before, option) = option.rsplit_once(' ').unwrap_or(("", option));
        assert!(takes(&format!("{before} {option} {yes}"), &packet()));
        assert!(!takes(&format!("{before} {option} {no}"), &packet()));
        for (value, expected) in [(yes, false), (no, true)] {
            let early = format!("{before} ! {option} {value}");
            let late = format!("{before} {option} ! {value}");
            assert_eq!(takes(&early, &packet()), expected, "{early}");
            assert_eq!(takes(&late, &packet()), expected, "{late}");
        }
    }
}

#[test]
fn all_matches_of_a_rule_have_to_hold() {
    assert!(takes("-s 10.0.0.1/32 -p tcp -m tcp --dport 80", &packet()));
    assert!(!takes("-s 10.0.0.1/32 -p tcp -m tcp --dport 81", &packet()));
    let neither = "-m owner ! --gid-owner 1 -m owner ! --gid-owner";
    assert!(takes(&format!("{neither} 2"), &packet()));
    assert!(!takes(&format!("{neither} 20"), &packet()));
}

#[test]
fn a_socket_without_owner_matches_only_negations() {
    let ownerless = Packet {
        hook: Hook::Output {
            interface: "eth0".to_owned(),
            owner: None,
        },
        ..packet()
    };
    for option in ["--uid-owner", "--gid-owner"] {
        for id in ["0", "10", "4294967295"] {
            assert!(!takes(&format!("-m owner {option} {id}"), &ownerless));
            assert!(takes(&format!("-m owner ! {option} {id}"), &ownerless));
        }
    }
}

#[test]
fn an_interface_of_the_other_direction_has_no_name() {
    assert!(takes("-i eth0", &from_outside()));
    assert!(!takes("-i eth1", &from_outside()));
    assert!(!takes("-o eth0", &from_outside()));
    assert!(takes("! -o eth0", &from_outside()));
    assert!(!takes("-i eth0", &packet()));
}

#[test]
fn each_hook_has_its_chain() {
    let table = table(&[
        "-A OUTPUT -p tcp -j REDIRECT --to-ports 1",
        "-A PREROUTING -p tcp -j REDIRECT --to-ports 2",
    ]);
    assert_eq!(table.decide(&packet()), Outcome::Redirect(1));
    assert_eq!(table.decide(&from_outside()), Outcome::Redirect(2));
}

#[test]
fn the_end_of_a_chain_and_a_return_go_on_after_the_jump() {
    let go_on = "-A OUTPUT -p tcp -j REDIRECT --to-ports 1";
    let through_the_end = table(&["-A OUTPUT -j A", go_on, "-A A -p udp -j ACCEPT"]);
    assert_eq!(through_the_end.decide(&packet()), Outcome::Redirect(1));

    let returned = table(&[
        "-A OUTPUT -j A",
        go_on,
        "-A A -j B",
        "-A A -p tcp -j REDIRECT --to-ports 2",
        "-A B -j RETURN",
        "-A B -p tcp -j REDIRECT --to-ports 3",
    ]);
    assert_eq!(returned.decide(&packet()), Outcome::Redirect(2));
}

#[test]
fn accept_ends_everything_and_return_in_a_builtin_chain_is_the_policy() {
    let redirect = "-A OUTPUT -p tcp -j REDIRECT --to-ports 1";
    for first in ["-A OUTPUT -j RETURN", "-A OUTPUT -j ACCEPT"] {
        assert_eq!(table(&[first, redirect]).decide(&packet()), Outcome::Accept);
    }
    let in_a_chain = table(&["-A OUTPUT -j A", redirect, "-A A -j ACCEPT"]);
    assert_eq!(in_a_chain.decide(&packet()), Outcome::Accept);
    assert_eq!(table(&[]).decide(&packet()), Outcome::Accept);
}

#[test]
fn a_packet_of_the_other_family_passes_by() {
    let rules = text(&["-A OUTPUT -p tcp -j REDIRECT --to-ports 1"]);
    let table = Table::parse(Family::V6, &rules).expect("a table that is understood");
    assert_eq!(table.decide(&packet()), Outcome::Accept);
}

#[test]
fn what_is_not_understood_is_refused() {
    for (rule, said) in [
        (
            "-A OUTPUT -j DNAT --to-destination 1.2.3.4",
            "after the target",
        ),
        ("-A OUTPUT -j MARK", "no known target"),
        ("-A OUTPUT -p icmp -j A", "protocol `icmp`"),
        ("-A OUTPUT -p 6 -j A", "protocol `6`"),
        (
            "-A OUTPUT -m conntrack --ctstate NEW -j A",
            "`-m conntrack`",
        ),
        ("-A OUTPUT -m tcp --dport 80 -j A", "`-m tcp`"),
        ("-A OUTPUT ! -p tcp -m tcp --dport 80 -j A", "`-m tcp`"),
        ("-A OUTPUT -p udp -m tcp --dport 80 -j A", "`-m tcp`"),
        ("-A OUTPUT --dport 80 -j A", "`--dport`"),
        ("-A OUTPUT -p tcp --dports 80,81 -j A", "`--dports`"),
        ("-A OUTPUT -p tcp --sport 80 -j A", "`--sport`"),
        ("-A OUTPUT -p tcp --dport 80:90 -j A", "`80:90`"),
        ("-A OUTPUT -p tcp --dport 65536 -j A", "`65536`"),
        ("-A OUTPUT -d 10.0.0.0/33 -j A", "`10.0.0.0/33`"),
        ("-A OUTPUT -d ::1/128 -j A", "`::1/128`"),
        ("-A OUTPUT -o eth+ -j A", "`eth+`"),
        ("-A OUTPUT --uid-owner 1 -j A", "`--uid-owner`"),
        ("-A OUTPUT -m owner --uid-owner root -j A", "`root`"),
        ("-A OUTPUT -m owner --uid-owner 1-5 -j A", "`1-5`"),
        (
            "-A OUTPUT -m owner --socket-exists -j A",
            "`--socket-exists`",
        ),
        ("-A OUTPUT ! ! -p tcp -j A", "twice"),
        ("-A OUTPUT ! -p ! tcp -j A", "twice"),
        ("-A OUTPUT -p tcp ! -j A", "target"),
        ("-A OUTPUT -p tcp", "no target"),
        ("-A OUTPUT -p", "without a value"),
        ("-A OUTPUT -j REDIRECT --to-ports 1", "needs -p"),
        ("-A OUTPUT -p tcp -j REDIRECT", "--to-ports"),
        ("-A OUTPUT -p tcp -j REDIRECT --to-ports 1-2", "`1-2`"),
        (
            "-A OUTPUT -p tcp -j REDIRECT --to-ports 1 --random",
            "`--random`",
        ),
        ("-A OUTPUT -g A", "`-g`"),
        ("-A NOWHERE -j A", "NOWHERE"),
        ("-A OUTPUT -j NOWHERE", "NOWHERE"),
        ("-I OUTPUT -j A", "neither"),
        ("[1:2] -A OUTPUT -j A", "neither"),
        (":OUTPUT ACCEPT [0:0]", "twice"),
        (":POSTROUTING DROP [0:0]", "policy DROP"),
        (":C ACCEPT [0:0]", "policy ACCEPT"),
        (":C", "NAME POLICY"),
        ("*nat", "neither"),
        ("COMMIT", "outside"),
    ] {
        let problem = problem(&[rule]);
        assert!(problem.contains(said), "{rule}: {problem}");
    }
}

#[test]
fn what_the_kernel_refuses_is_refused() {
    assert!(problem(&["-A OUTPUT -j A", "-A A -j B", "-A B -j A"]).contains("back to itself"));
    let owner = "-A A -m owner --uid-owner 1 -j RETURN";
    assert!(problem(&["-A PREROUTING -j A", owner]).contains("asks for the owner"));
    table(&["-A OUTPUT -j A", owner]);
}

#[test]
fn only_one_whole_nat_table_is_read() {
    for (text, said) in [
        ("", "COMMIT"),
        ("*nat\n", "COMMIT"),
        ("*filter\nCOMMIT\n", "outside"),
        ("*nat\nCOMMIT\n*nat\nCOMMIT\n", "outside"),
        ("-A OUTPUT -j ACCEPT\n", "outside"),
    ] {
        let error = Table::parse(Family::V4, text).expect_err("no whole table");
        assert!(error.problem.contains(said), "{text:?}: {error}");
    }
}

#[test]
fn an_error_names_its_line() {
    let text = text(&["-A OUTPUT -j A", "# a comment", "-A OUTPUT -j A -x"]);
    let error = Table::parse(Family::V4, &text).expect_err("line 8 is wrong");
    assert_eq!(error.to_string(), "line 8: `-x` after the target");
}
