//! The contract's cases, from the flags to the answer.

use clap::Parser;

use super::*;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    explain: Explain,
}

fn ask_with(env: &[(&str, &str)], line: &str) -> Result<Explanation, ExplainError> {
    let words = line.split_whitespace().map(|w| w.trim_matches('\''));
    let cli = Cli::try_parse_from(std::iter::once("explain").chain(words))
        .unwrap_or_else(|error| panic!("{line}: {error}"));
    let lookup = |name: &str| {
        let found = env.iter().find(|(known, _)| *known == name);
        found.map(|(_, value)| (*value).to_owned())
    };
    cli.explain.explain(&lookup)
}

fn ask(line: &str) -> Result<Explanation, ExplainError> {
    ask_with(&[], line)
}

/// Asks each line and compares `verdict port / rule`.
#[track_caller]
fn check(rows: &[(&str, &str)]) {
    for (line, expected) in rows {
        let e = ask(line).unwrap_or_else(|error| panic!("{line}: {error}"));
        let port = e.port.map(|port| format!(" {port}")).unwrap_or_default();
        assert_eq!(
            format!("{}{port} / {}", e.verdict, e.rule),
            *expected,
            "{line}"
        );
    }
}

const APP: &str = "--direction outbound --uid 1000 --gid 1000";
const PROXY: &str = "--direction outbound --uid 1337 --gid 1337";
const PROXY_GROUP: &str = "--direction outbound --uid 1000 --gid 1337";
const OUTSIDE: &str = "--direction inbound --src 10.9.9.9 --dst 10.1.1.5";

#[track_caller]
fn check_as(who: &str, rows: &[(&str, &str)]) {
    let rows: Vec<_> = rows
        .iter()
        .map(|(line, expected)| (format!("{who} {line}"), *expected))
        .collect();
    let rows: Vec<_> = rows.iter().map(|(line, e)| (line.as_str(), *e)).collect();
    check(&rows);
}

#[test]
fn an_application_is_captured_outside_the_pod_only() {
    check_as(
        APP,
        &[
            (
                "--mesh istio --src 10.1.1.5 --dst 10.9.9.9 --port 53",
                "outbound 15001 / outbound 11",
            ),
            (
                "--mesh istio --src 127.0.0.1 --dst 127.0.0.1 --port 15001",
                "direct / outbound 4b",
            ),
            (
                "--mesh istio --src 127.0.0.1 --dst 127.0.0.6 --port 80",
                "direct / outbound 4b",
            ),
            (
                "--mesh istio --src 10.1.1.5 --dst 10.9.9.9 --port 80",
                "outbound 15001 / outbound 11",
            ),
            (
                "--mesh istio --src 10.1.1.5 --dst 10.9.9.9 --port 15008",
                "outbound 15001 / outbound 11",
            ),
            (
                "--mesh istio --src 10.1.1.5 --dst ::ffff:10.9.9.9 --port 80",
                "outbound 15001 / outbound 11",
            ),
            (
                "--mesh istio --src 0.0.0.0 --dst 10.9.9.9 --port 80",
                "outbound 15001 / outbound 11",
            ),
            (
                "--mesh istio --src 10.1.1.5 --dst 10.9.9.9 --port 53 --proto udp",
                "direct / outbound 12",
            ),
            (
                "--mesh istio --src 10.1.1.5 --dst 10.1.1.5 --port 15006",
                "direct / outbound 4b",
            ),
            (
                "--mesh istio --src 127.0.0.1 --dst 127.0.0.2 --port 80",
                "direct / outbound 4b",
            ),
            (
                "--mesh istio --src 127.0.0.6 --dst 10.1.1.5 --pod-ip 10.1.1.5 --port 80",
                "direct / outbound 3",
            ),
            (
                "-b '' --src 10.1.1.5 --dst 10.9.9.9 --port 80",
                "direct / outbound 12",
            ),
        ],
    );
}

#[test]
fn the_proxy_is_captured_only_when_it_calls_its_own_pod() {
    check_as(
        PROXY,
        &[
            (
                "--mesh istio --src 127.0.0.1 --dst 127.0.0.1 --port 80",
                "direct / outbound 4c",
            ),
            (
                "--mesh istio --src 10.1.1.5 --dst 10.1.1.5 --port 53",
                "inbound 15006 / outbound 4a",
            ),
            (
                "--mesh istio --src 10.1.1.5 --dst 10.9.9.9 --port 80",
                "direct / outbound 4c",
            ),
            (
                "--mesh istio --src 10.1.1.5 --dst 10.1.1.5 --port 15020",
                "inbound 15006 / outbound 4a",
            ),
            (
                "--mesh istio --src 10.1.1.5 --dst 10.1.1.5 --port 15008",
                "direct / outbound 4c",
            ),
            (
                "--mesh istio --src 127.0.0.1 --dst 127.0.0.2 --port 80",
                "inbound 15006 / outbound 4a",
            ),
            (
                "--mesh istio --src 127.0.0.1 --dst 127.0.0.6 --port 15002",
                "inbound 15006 / outbound 4a",
            ),
            (
                "--mesh istio --src 0.0.0.0 --dst 0.0.0.0 --port 80",
                "direct / outbound 4c",
            ),
            (
                "--mesh istio --src :: --dst :: --port 80",
                "direct / outbound 4c",
            ),
            (
                "--mesh istio --tunnel-hairpin --src 10.1.1.5 --dst 10.1.1.5 --port 15008",
                "inbound 15006 / outbound 4a",
            ),
            (
                "--mesh istio -u 7,1337 --src 10.1.1.5 --dst 10.1.1.5 --port 80",
                "direct / outbound 4b",
            ),
            (
                "--mesh istio -o 8080 --src 10.1.1.5 --dst 10.1.1.5 --port 8080",
                "direct / outbound 2",
            ),
            (
                "--mesh istio --redirect-dns --capture-all-dns --src 10.1.1.5 --dst 10.9.9.9 --port 53 --proto udp",
                "direct / outbound 4c",
            ),
        ],
    );
    check_as(
        PROXY_GROUP,
        &[
            (
                "--mesh istio --redirect-dns --capture-all-dns --src 10.1.1.5 --dst 10.9.9.9 --port 53 --proto udp",
                "direct / outbound 5c",
            ),
            (
                "--mesh istio --src 10.1.1.5 --dst 10.9.9.9 --port 80",
                "direct / outbound 5c",
            ),
            (
                "--mesh istio --src 10.1.1.5 --dst 10.1.1.5 --port 80",
                "direct / outbound 4b",
            ),
            (
                "--mesh istio --redirect-dns --capture-all-dns --src 10.1.1.5 --dst 10.1.1.5 --port 53",
                "inbound 15006 / outbound 5a",
            ),
        ],
    );
}

#[test]
fn an_unspecified_address_is_filled_in_as_the_kernel_does() {
    let facts = |line: &str| ask(line).expect(line).facts;
    let bound = facts(&format!("{APP} --src 10.1.1.5 --dst 0.0.0.0 --port 80"));
    assert_eq!(bound.destination, bound.source);
    let unbound = facts(&format!("{APP} --src 0.0.0.0 --dst 0.0.0.0 --port 80"));
    assert_eq!(unbound.destination, IpAddr::from([127, 0, 0, 1]));
    let own = format!("{APP} --src 0.0.0.0 --pod-ip 10.1.1.5,10.1.1.6 --port 80");
    let to_own = facts(&format!("{own} --dst 10.1.1.6"));
    assert_eq!(to_own.source, IpAddr::from([10, 1, 1, 6]));
    let to_remote = facts(&format!("{own} --dst 10.9.9.9"));
    assert_eq!(to_remote.source, IpAddr::from([10, 1, 1, 5]));
}

#[test]
fn outbound_lists_decide() {
    check_as(
        &format!("{APP} --src 10.1.1.5"),
        &[
            (
                "-i 10.0.0.0/8 --dst 10.9.9.9 --port 80",
                "outbound 15001 / outbound 11",
            ),
            (
                "-i 10.0.0.0/8 --dst 11.9.9.9 --port 80",
                "direct / outbound 12",
            ),
            (
                "-i '*' -x 10.9.9.9 --dst 10.9.9.9 --port 80",
                "direct / outbound 9",
            ),
            (
                "-i '*' -x 10.9.9.9 -q 80 --dst 10.9.9.9 --port 80",
                "direct / outbound 9",
            ),
            (
                "-q 80-90 --dst 10.9.9.9 --port 85",
                "outbound 15001 / outbound 10",
            ),
            ("-q 80-90 --dst 10.9.9.9 --port 91", "direct / outbound 12"),
            (
                "-i '*' -o 80:90 --dst 10.9.9.9 --port 90",
                "direct / outbound 2",
            ),
            (
                "-p 4140 -i '*' --dst 10.9.9.9 --port 80",
                "outbound 4140 / outbound 11",
            ),
            (
                "-i '*' --outbound-owner-groups 7 --dst 10.9.9.9 --port 80",
                "direct / outbound 6",
            ),
            (
                "-i '*' --outbound-owner-groups 1000 --dst 10.9.9.9 --port 80",
                "outbound 15001 / outbound 11",
            ),
            (
                "-i '*' --outbound-owner-groups-exclude 1000 --dst 10.9.9.9 --port 80",
                "direct / outbound 6",
            ),
        ],
    );
    check_as(
        &format!("{APP} --src 127.0.0.1"),
        &[
            (
                "-i 127.0.0.0/8 --dst 127.0.0.2 --port 80",
                "outbound 15001 / outbound 11",
            ),
            (
                "-i 127.0.0.0/8 --dst 127.0.0.1 --port 80",
                "direct / outbound 8",
            ),
            (
                "-i 127.0.0.0/8 --outbound-ipv4-loopback-cidr 127.0.0.0/8 --dst 127.0.0.2 --port 80",
                "direct / outbound 8",
            ),
            (
                "-i 0.0.0.0/0 --dst 127.0.0.2 --port 80",
                "direct / outbound 4b",
            ),
        ],
    );
}

#[test]
fn inbound_lists_decide() {
    check_as(
        OUTSIDE,
        &[
            ("--mesh istio --port 15001", "inbound 15006 / inbound 4"),
            ("--mesh istio --port 15020", "direct / inbound 4"),
            ("--mesh istio --port 15090", "direct / inbound 4"),
            ("--mesh istio --port 22", "inbound 15006 / inbound 4"),
            ("--mesh istio --port 15006", "inbound 15006 / inbound 4"),
            ("--mesh istio --port 15008", "direct / inbound 4"),
            ("--mesh istio --port 15021", "direct / inbound 4"),
            (
                "--mesh istio --tunnel-inbound --port 15008",
                "inbound 15006 / inbound 4",
            ),
            (
                "-b 80,15020 -d 15020 --port 15020",
                "inbound 15006 / inbound 5",
            ),
            ("-b 80,15008 --port 15008", "direct / inbound 4"),
            ("-b 80 --port 81", "direct / inbound 5"),
            ("--port 80", "direct / inbound 3"),
            ("--mesh istio --port 80 --proto udp", "direct / inbound 0"),
            ("--mesh linkerd --port 80", "inbound 4143 / inbound 4"),
            ("--mesh linkerd --port 4191", "direct / inbound 4"),
            ("--mesh linkerd --port 15008", "inbound 4143 / inbound 4"),
            ("--mesh kuma --port 15008", "inbound 15006 / inbound 4"),
        ],
    );
    check(&[
        (
            "--mesh istio --direction inbound --src 10.1.1.5 --dst 10.1.1.5 --port 80",
            "direct / inbound 0",
        ),
        (
            "--mesh istio --direction inbound --src 127.0.0.1 --dst 10.1.1.5 --port 80",
            "direct / inbound 0",
        ),
    ]);
}

#[test]
fn interfaces_decide() {
    check(&[
        (
            &format!(
                "{APP} -i '*' -c eth0 --interface eth0 --src 10.1.1.5 --dst 10.9.9.9 --port 80"
            ),
            "direct / outbound 1",
        ),
        (
            &format!(
                "{APP} -i '*' -c net+ --interface net1 --src 10.1.1.5 --dst 10.9.9.9 --port 80"
            ),
            "direct / outbound 1",
        ),
        (
            &format!(
                "{APP} -i '*' -c eth0 --interface eth1 --src 10.1.1.5 --dst 10.9.9.9 --port 80"
            ),
            "outbound 15001 / outbound 11",
        ),
        (
            &format!("{PROXY} -i '*' -c eth0 --src 10.1.1.5 --dst 10.1.1.5 --port 80"),
            "inbound 15006 / outbound 4a",
        ),
        (
            &format!("{OUTSIDE} -b '*' -c eth0 --interface eth0 --port 80"),
            "direct / inbound 1",
        ),
        (
            &format!("{OUTSIDE} -b '' -k tap0 --interface tap0 --port 80"),
            "outbound 15001 / inbound 2",
        ),
    ]);
}

#[test]
fn linkerd_leaves_calls_within_the_pod_alone() {
    check_as(
        "--direction outbound --uid 2102 --gid 2102 --mesh linkerd --src 10.1.1.5",
        &[
            ("--dst 10.1.1.5 --port 80", "direct / outbound 4b"),
            ("--dst 10.9.9.9 --port 80", "direct / outbound 4c"),
            ("--dst 10.9.9.9 --port 4567", "direct / outbound 2"),
        ],
    );
    check_as(
        "--direction outbound --uid 0 --gid 2102 --mesh linkerd --src 10.1.1.5",
        &[("--dst 10.9.9.9 --port 80", "outbound 4140 / outbound 11")],
    );
}

#[test]
fn ipv6_follows_the_rules_when_the_pod_speaks_it() {
    check_as(
        APP,
        &[
            (
                "--mesh istio --src fd00::5 --dst fd00::9 --port 80",
                "outbound 15001 / outbound 11",
            ),
            (
                "--mesh istio --src fd00::5 --pod-ip 10.1.1.5,fd00::5 --dst fd00::9 --port 80",
                "direct / outbound 0",
            ),
            (
                "--mesh istio --dual-stack --src fd00::5 --pod-ip 10.1.1.5,fd00::5 --dst fd00::9 --port 80",
                "outbound 15001 / outbound 11",
            ),
            (
                "-i ::/0 --src 10.1.1.5 --dst 10.9.9.9 --port 80",
                "direct / outbound 12",
            ),
            (
                "-i 0.0.0.0/0 --src fd00::5 --dst fd00::9 --port 80",
                "direct / outbound 12",
            ),
            (
                "-i ::1 --src ::1 --dst ::1 --port 80",
                "direct / outbound 8",
            ),
        ],
    );
}

#[test]
fn dns_goes_to_the_proxy_for_the_resolvers_of_the_pod() {
    let file = tempfile::NamedTempFile::new().expect("a writable /tmp");
    let path = file.path().display();
    std::fs::write(file.path(), "search x\nnameserver 10.96.0.10\n").expect("own file");
    let dns = format!("--mesh istio --redirect-dns --resolv-conf {path}");
    check_as(
        &format!("{APP} {dns} --port 53"),
        &[
            ("--src 10.1.1.5 --dst 10.96.0.10", "dns 15053 / outbound 7"),
            (
                "--src 10.1.1.5 --dst 10.96.0.10 --proto udp",
                "dns 15053 / outbound 7",
            ),
            (
                "--src 10.1.1.5 --dst 10.9.9.9",
                "outbound 15001 / outbound 11",
            ),
            (
                "--src 10.1.1.5 --dst 10.9.9.9 --proto udp",
                "direct / outbound 12",
            ),
            (
                "--src 10.1.1.5 --dst 10.1.1.5",
                "outbound 15001 / outbound 11",
            ),
            (
                "--src 127.0.0.1 --dst 127.0.0.2",
                "outbound 15001 / outbound 11",
            ),
            ("--src 127.0.0.1 --dst 127.0.0.1", "direct / outbound 8"),
            (
                "--src 127.0.0.1 --dst 127.0.0.1 --capture-all-dns",
                "dns 15053 / outbound 7",
            ),
            (
                "--src 10.1.1.5 --dst 10.96.0.10 -o 53",
                "direct / outbound 2",
            ),
            (
                "--src 10.1.1.5 --dst 10.96.0.10 -o 53 --proto udp",
                "direct / outbound 2",
            ),
            (
                "--src 10.1.1.5 --dst 10.96.0.10 --dns-port 15153",
                "dns 15153 / outbound 7",
            ),
        ],
    );
    std::fs::write(file.path(), "nameserver ten\n").expect("own file");
    let line = format!("{APP} {dns} --src 10.1.1.5 --dst 10.9.9.9 --port 53");
    let error = ask(&line).expect_err("no address").to_string();
    assert_eq!(
        error,
        format!("{path}: line 1: \"nameserver ten\" does not give an IP address")
    );
}

#[test]
fn the_environment_gives_settings_that_flags_beat() {
    let line = format!("{APP} --src 10.1.1.5 --dst 10.9.9.9 --port 80");
    let env = [("ISTIO_SERVICE_CIDR", "10.0.0.0/8")];
    assert_eq!(ask_with(&env, &line).expect("an answer").port, Some(15001));
    let beaten = ask_with(&env, &format!("{line} -i ''")).expect("an answer");
    assert_eq!(beaten.port, None);
}

#[test]
fn a_question_without_sense_is_refused_in_a_sentence() {
    let rows = [
        (
            format!("{APP} --src fd00::5 --dst 10.9.9.9 --port 80"),
            "--src fd00::5 and --dst 10.9.9.9 are not of one address family; \
             an IPv4 connection has two IPv4 addresses",
        ),
        (
            format!("{APP} --src 10.1.1.5 --dst 10.1.1.5 --port 80 --interface eth0"),
            "10.1.1.5 is an address of the pod itself and is reached through lo, not through \
             eth0; leave --interface out, or check --dst and --pod-ip",
        ),
        (
            "--direction inbound --src 0.0.0.0 --dst 10.1.1.5 --port 80".to_owned(),
            "an inbound connection has a source and a destination; 0.0.0.0 is neither",
        ),
        (
            format!("{APP} --redirect-dns --src 10.1.1.5 --dst 10.9.9.9 --port 80"),
            "--redirect-dns captures DNS for the resolvers of the pod, which are not known \
             here; give --resolv-conf PATH, or --capture-all-dns",
        ),
    ];
    for (line, expected) in rows {
        let error = ask(&line).expect_err(&line);
        assert_eq!(error.to_string(), expected);
    }
}

#[test]
fn an_outbound_question_names_the_owner() {
    let line = "explain --direction outbound --src 10.1.1.5 --dst 10.9.9.9 --port 80";
    let error = Cli::try_parse_from(line.split(' '))
        .err()
        .expect("no owner");
    assert!(error.to_string().contains("--uid <N>"), "{error}");
}

#[test]
fn an_answer_reads_well_and_parses() {
    let line = format!("{APP} --mesh istio --src 10.1.1.5 --dst 10.9.9.9 --port 80");
    let answer = ask(&line).expect("an answer");
    assert_eq!(
        answer.to_string(),
        "outbound → proxy port 15001\n  \
         rule outbound 11: the destination is in a captured range (-i)\n  \
         tcp 10.1.1.5 → 10.9.9.9:80, opened by uid 1000, gid 1000"
    );
    let json: serde_json::Value = serde_json::from_str(&answer.to_json()).expect("JSON");
    assert_eq!(json["verdict"], "outbound");
    assert_eq!(json["port"], 15001);
    assert_eq!(json["rule"], "outbound 11");
    assert_eq!(json["facts"]["destination"], "10.9.9.9");
}
