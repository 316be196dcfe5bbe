//! The way from what people write to [`Settings`].

use clap::{Args, Command, FromArgMatches};
use proptest::prelude::*;

use super::*;

fn flags(args: &str) -> Flags {
    let words = args.split_whitespace().map(|word| word.trim_matches('\''));
    let command = Flags::augment_args(Command::new("test").no_binary_name(true));
    let matches = command
        .try_get_matches_from(words)
        .unwrap_or_else(|error| panic!("{args}: {error}"));
    Flags::from_arg_matches(&matches).expect("every argument is optional")
}

/// The settings of a command line; `''` is an empty word.
pub(crate) fn settings(args: &str) -> Result<Settings, SettingsError> {
    flags(args).settings(&|_| None)
}

fn with_env(args: &str, env: &[(&str, &str)]) -> Result<Settings, SettingsError> {
    flags(args).settings(&|name| {
        let found = env.iter().find(|(known, _)| *known == name);
        found.map(|(_, value)| (*value).to_owned())
    })
}

fn annotated(field: Field, text: &str) -> Result<Settings, SettingsError> {
    let written = Written {
        field,
        origin: Origin::Annotation(field.annotations()[0].to_owned()),
        text: text.to_owned(),
    };
    Settings::parse(&Inputs::from_iter([written]))
}

fn ports(text: &str) -> PortSet {
    PortSet::parse(text).expect(text)
}

fn cidrs(text: &str) -> Vec<IpNet> {
    values::cidrs(text).expect(text)
}

fn owners(ids: &[u32]) -> Owners {
    Owners::try_from(ids.to_vec()).expect("few ids")
}

fn groups(ids: &[u32]) -> Groups {
    Groups::try_from(ids.to_vec()).expect("few ids")
}

/// A flag, short and long, an environment variable, a value that both accept,
/// and what it changes.
type Row = (
    &'static str,
    &'static str,
    &'static str,
    &'static str,
    fn(&mut Settings),
);

const ROWS: &[Row] = &[
    ("-p", "--envoy-port", "ENVOY_PORT", "4140", |s| {
        s.outbound_port = 4140
    }),
    (
        "-z",
        "--inbound-capture-port",
        "INBOUND_CAPTURE_PORT",
        "4143",
        |s| s.inbound_port = 4143,
    ),
    (
        "-e",
        "--inbound-tunnel-port",
        "INBOUND_TUNNEL_PORT",
        "1",
        |s| s.tunnel_port = 1,
    ),
    ("-u", "--proxy-uid", "PROXY_UID", "7,0", |s| {
        s.proxy_uids = owners(&[7, 0]);
        s.proxy_gids = owners(&[7, 0]);
    }),
    ("-g", "--proxy-gid", "PROXY_GID", "9,8,9", |s| {
        s.proxy_gids = owners(&[9, 8])
    }),
    (
        "-m",
        "--istio-inbound-interception-mode",
        "ISTIO_INBOUND_INTERCEPTION_MODE",
        "REDIRECT",
        |_| (),
    ),
    (
        "-b",
        "--istio-inbound-ports",
        "ISTIO_INBOUND_PORTS",
        "*",
        |s| {
            s.inbound_include = Capture::All;
        },
    ),
    (
        "-b",
        "--istio-inbound-ports",
        "ISTIO_INBOUND_PORTS",
        "80,,443,",
        |s| {
            s.inbound_include = Capture::Listed(ports("80,443"));
        },
    ),
    (
        "-d",
        "--istio-local-exclude-ports",
        "ISTIO_LOCAL_EXCLUDE_PORTS",
        "15090,15021",
        |s| {
            s.inbound_exclude = ports("15021,15090");
        },
    ),
    (
        "-i",
        "--istio-service-cidr",
        "ISTIO_SERVICE_CIDR",
        "*",
        |s| {
            s.outbound_include = Capture::All;
        },
    ),
    (
        "-i",
        "--istio-service-cidr",
        "ISTIO_SERVICE_CIDR",
        "10.1.2.3,fd00::/8",
        |s| {
            s.outbound_include = Capture::Listed(cidrs("10.1.2.3/32,fd00::/8"));
        },
    ),
    (
        "-x",
        "--istio-service-exclude-cidr",
        "ISTIO_SERVICE_EXCLUDE_CIDR",
        "10.0.0.0/8",
        |s| {
            s.outbound_exclude = cidrs("10.0.0.0/8");
        },
    ),
    (
        "-q",
        "--istio-outbound-ports",
        "ISTIO_OUTBOUND_PORTS",
        "80",
        |s| {
            s.outbound_ports_include = ports("80");
        },
    ),
    (
        "-o",
        "--istio-local-outbound-ports-exclude",
        "ISTIO_LOCAL_OUTBOUND_PORTS_EXCLUDE",
        "4567-4568",
        |s| s.outbound_ports_exclude = ports("4567,4568"),
    ),
    (
        "-c",
        "--istio-exclude-interfaces",
        "ISTIO_EXCLUDE_INTERFACES",
        "eth1,net+",
        |s| {
            s.excluded_interfaces = Interfaces::parse("eth1,net+").expect("names");
        },
    ),
    (
        "-k",
        "--kube-virt-interfaces",
        "KUBE_VIRT_INTERFACES",
        "tap0",
        |s| {
            s.virtual_interfaces = Interfaces::parse("tap0").expect("a name");
        },
    ),
    ("", "--redirect-dns", "REDIRECT_DNS", "true", |s| {
        s.redirect_dns = true
    }),
    ("", "--redirect-dns", "ISTIO_META_DNS_CAPTURE", "1", |s| {
        s.redirect_dns = true
    }),
    ("", "--redirect-dns", "REDIRECT_DNS", "False", |_| ()),
    ("", "--capture-all-dns", "CAPTURE_ALL_DNS", "true", |s| {
        s.capture_all_dns = true
    }),
    ("", "--dual-stack", "DUAL_STACK", "true", |s| {
        s.dual_stack = true
    }),
    ("", "--dual-stack", "ISTIO_DUAL_STACK", "true", |s| {
        s.dual_stack = true
    }),
    ("", "--drop-invalid", "DROP_INVALID", "true", |s| {
        s.drop_invalid = true
    }),
    ("", "--drop-invalid", "INVALID_DROP", "true", |s| {
        s.drop_invalid = true
    }),
    (
        "",
        "--outbound-owner-groups",
        "ISTIO_OUTBOUND_OWNER_GROUPS",
        "*",
        |_| (),
    ),
    (
        "",
        "--outbound-owner-groups",
        "ISTIO_OUTBOUND_OWNER_GROUPS",
        "101,202",
        |s| {
            s.owner_groups = OwnerGroups::Only(groups(&[101, 202]));
        },
    ),
    (
        "",
        "--outbound-owner-groups-exclude",
        "ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE",
        "0",
        |s| s.owner_groups = OwnerGroups::Except(groups(&[0])),
    ),
    (
        "",
        "--outbound-ipv4-loopback-cidr",
        "ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR",
        "127.0.0.0/8",
        |s| s.loopback = "127.0.0.0/8".parse().expect("a literal"),
    ),
    ("", "--dns-port", "SHUNT_DNS_PORT", "53", |s| {
        s.dns_port = 53
    }),
    (
        "",
        "--tunnel-hairpin",
        "SHUNT_TUNNEL_HAIRPIN",
        "true",
        |s| s.hairpin = Hairpin::Tunnel,
    ),
    (
        "",
        "--legacy-hairpin",
        "SHUNT_LEGACY_HAIRPIN",
        "true",
        |s| s.hairpin = Hairpin::Legacy,
    ),
    (
        "",
        "--tunnel-inbound",
        "SHUNT_TUNNEL_INBOUND",
        "true",
        |s| s.tunnel_inbound = true,
    ),
    ("", "--splice", "SHUNT_SPLICE", "between", |s| {
        s.splice = Splice::Between
    }),
];

#[test]
fn every_setting_is_read_from_flags_and_environment() {
    for (short, long, env, text, change) in ROWS {
        let mut expected = Settings::default();
        change(&mut expected);
        let shunt_env = format!("SHUNT_{}", long[2..].replace('-', "_").to_uppercase());
        let found = [
            settings(&format!("{long}={text}")),
            with_env("", &[(env, text)]),
            with_env("", &[(&shunt_env, text)]),
        ];
        for found in found {
            assert_eq!(found.as_ref(), Ok(&expected), "{long} {text}");
        }
        if !short.is_empty() {
            assert_eq!(
                settings(&format!("{short} {text}")),
                Ok(expected),
                "{short} {text}"
            );
        }
    }
}

#[test]
fn every_setting_is_tried() {
    for field in Field::ALL.iter().filter(|&&field| field != Field::Mesh) {
        let long = format!("--{}", field.long());
        let row = ROWS.iter().find(|row| row.1 == long);
        let short = row.map(|row| row.0.strip_prefix('-').unwrap_or(""));
        let expected = field.short().map(String::from).unwrap_or_default();
        assert_eq!(short, Some(expected.as_str()), "{long}");
    }
}

#[test]
fn a_switch_may_stand_alone() {
    let found = settings("--redirect-dns --legacy-hairpin -b 80").expect("good flags");
    assert!(found.redirect_dns);
    assert_eq!(found.hairpin, Hairpin::Legacy);
    assert_eq!(found.inbound_include, Capture::Listed(ports("80")));
}

#[test]
fn without_flags_the_settings_are_those_of_istio_iptables() {
    let found = settings("").expect("no flags");
    assert_eq!(found, Settings::default());
    assert_eq!(
        (
            found.outbound_port,
            found.inbound_port,
            found.tunnel_port,
            found.dns_port
        ),
        (15001, 15006, 15008, 15053)
    );
    assert_eq!(found.proxy_uids.as_slice(), [1337]);
    assert_eq!(found.proxy_gids.as_slice(), [1337]);
    assert_eq!(found.inbound_include, Capture::Listed(PortSet::default()));
    assert_eq!(found.outbound_include, Capture::Listed(Vec::new()));
    assert_eq!(found.loopback.to_string(), "127.0.0.1/32");
    assert_eq!(found.hairpin, Hairpin::Spared);
}

#[test]
fn what_an_istio_pod_passes_is_what_the_istio_preset_says() {
    let passed = "-p 15001 -z 15006 -u 1337 -g 1337 -m REDIRECT -i '*' -x '' -b '*' \
                  -d 15090,15021,15020 -q '' -o '' -c '' -k ''";
    assert_eq!(settings(passed), settings("--mesh istio"));
}

#[test]
fn empty_values_are_empty_lists_or_defaults() {
    let empty = "-p '' -u '' -g '' -m '' -i '' -b '' -d '' --outbound-owner-groups= \
                 --outbound-ipv4-loopback-cidr= --redirect-dns= --mesh=";
    assert_eq!(settings(empty), Ok(Settings::default()));
    let emptied = settings("--mesh istio -b '' -d ,, -i ''");
    assert_eq!(emptied, Ok(Settings::default()));
}

#[test]
fn a_flag_beats_the_environment_and_shunts_variable_beats_the_meshs() {
    let env = [("SHUNT_ENVOY_PORT", "2"), ("ENVOY_PORT", "3")];
    let port = |args, env: &[(&str, &str)]| with_env(args, env).expect("ports").outbound_port;
    assert_eq!(port("-p 1", &env), 1);
    assert_eq!(port("", &env), 2);
    assert_eq!(port("", &env[1..]), 3);
    assert_eq!(
        port("", &[("SHUNT_ENVOY_PORT", " "), ("ENVOY_PORT", "3")]),
        3
    );
    let emptied = with_env("-i ''", &[("ISTIO_SERVICE_CIDR", "*")]);
    assert_eq!(emptied, Ok(Settings::default()));
}

#[test]
fn presets_are_starting_points() {
    let linkerd = settings("--mesh linkerd").expect("a preset");
    assert_eq!((linkerd.outbound_port, linkerd.inbound_port), (4140, 4143));
    assert_eq!(linkerd.proxy_uids.as_slice(), [2102]);
    assert!(linkerd.proxy_gids.as_slice().is_empty());
    assert_eq!(linkerd.inbound_exclude, ports("4190,4191,4567,4568"));
    assert_eq!(linkerd.outbound_ports_exclude, ports("4567-4568"));
    assert_eq!(linkerd.hairpin, Hairpin::None);
    let kuma = settings("--mesh kuma").expect("a preset");
    assert_eq!((kuma.hairpin, kuma.tunnel_inbound), (Hairpin::Tunnel, true));
    assert!(kuma.proxy_gids.as_slice().is_empty());

    let moved = settings("--mesh kuma -u 7 --tunnel-hairpin=false -d 22").expect("good flags");
    assert_eq!(moved.proxy_uids.as_slice(), [7]);
    assert!(moved.proxy_gids.as_slice().is_empty());
    assert_eq!(
        (moved.hairpin, moved.inbound_exclude),
        (Hairpin::Spared, ports("22"))
    );
    let grouped = settings("--mesh linkerd -g 7").expect("good flags");
    assert_eq!(grouped.proxy_gids.as_slice(), [7]);
}

#[test]
fn groups_to_leave_out_count_only_when_all_others_are_captured() {
    let both = settings("--outbound-owner-groups 1 --outbound-owner-groups-exclude 2");
    assert_eq!(
        both.expect("groups").owner_groups,
        OwnerGroups::Only(groups(&[1]))
    );
    let all = settings("--outbound-owner-groups '*' --outbound-owner-groups-exclude 2");
    assert_eq!(
        all.expect("groups").owner_groups,
        OwnerGroups::Except(groups(&[2]))
    );
}

#[test]
fn blanks_around_items_and_empty_items_are_ignored() {
    let found = annotated(Field::OutboundPortsExclude, " 80 , ,443,").expect("two ports");
    assert_eq!(found.outbound_ports_exclude, ports("80,443"));
    let found = annotated(Field::InboundInclude, " * ").expect("a wildcard");
    assert_eq!(found.inbound_include, Capture::All);
}

#[test]
fn host_bits_and_mapped_ranges_are_accepted() {
    let found = cidrs("10.1.2.3/8, ::ffff:10.0.0.0/104 ,::ffff:10.1.1.1");
    assert_eq!(found[0].trunc(), "10.0.0.0/8".parse().expect("a literal"));
    assert_eq!(found[1..], cidrs("10.0.0.0/8,10.1.1.1"));
}

#[test]
fn an_interface_may_be_a_prefix() {
    let names = Interfaces::parse("eth1, net+").expect("names");
    assert!(names.contains("eth1") && names.contains("net0") && names.contains("net"));
    assert!(!names.contains("eth10") && !names.contains("ne"));
}

#[test]
fn bad_input_is_named_in_one_sentence() {
    let many = (1..=17).map(|id: u32| id.to_string()).collect::<Vec<_>>();
    let many = format!("-u {}", many.join(","));
    let rows = [
        (
            "-o 80,99999",
            r#"-o 80,99999: "99999" is not a port; ports are 1 to 65535"#,
        ),
        (
            "-b 65536",
            r#"-b 65536: "65536" is not a port; ports are 1 to 65535"#,
        ),
        (
            "-d http",
            r#"-d http: "http" is not a port; ports are 1 to 65535"#,
        ),
        ("-q 0", r#"-q 0: "0" is not a port; ports are 1 to 65535"#),
        (
            "-q 0-9",
            r#"-q 0-9: "0-9" is not a port; ports are 1 to 65535"#,
        ),
        (
            "-q 8-",
            r#"-q 8-: "8-" is not a port; ports are 1 to 65535"#,
        ),
        (
            "-q +80",
            r#"-q +80: "+80" is not a port; ports are 1 to 65535"#,
        ),
        (
            "-q 90-80",
            r#"-q 90-80: "90-80" runs backwards; write the lower port first"#,
        ),
        ("-q *", r#"-q *: "*" is not a port; ports are 1 to 65535"#),
        (
            "-p 70000",
            r#"-p 70000: "70000" is not a port; ports are 1 to 65535"#,
        ),
        (
            "-p 1,2",
            r#"-p 1,2: "1,2" is not a port; ports are 1 to 65535"#,
        ),
        (
            "-b 80,*",
            r#"-b 80,*: "*" means everything and stands alone; leave the other items out, or leave out "*""#,
        ),
        (
            "-i *,10.0.0.0/8",
            r#"-i *,10.0.0.0/8: "*" means everything and stands alone; leave the other items out, or leave out "*""#,
        ),
        (
            "-x *",
            r#"-x *: "*" would leave every destination alone; to capture nothing outbound, leave -i empty"#,
        ),
        (
            "-i 10.0.0.0/33",
            r#"-i 10.0.0.0/33: "10.0.0.0/33" is not an address range; write an IP address, or one with a prefix length, such as 10.0.0.0/8"#,
        ),
        (
            "-x 10.0.0.0/8,cluster.local",
            r#"-x 10.0.0.0/8,cluster.local: "cluster.local" is not an address range; write an IP address, or one with a prefix length, such as 10.0.0.0/8"#,
        ),
        (
            "-u istio-proxy",
            r#"-u istio-proxy: "istio-proxy" is not a uid or gid; names are not looked up, give the number (0 to 4294967294)"#,
        ),
        (
            "--outbound-owner-groups 1,java",
            r#"--outbound-owner-groups 1,java: "java" is not a uid or gid; names are not looked up, give the number (0 to 4294967294)"#,
        ),
        (
            "-g 4294967295",
            r#"-g 4294967295: "4294967295" is not a uid or gid; names are not looked up, give the number (0 to 4294967294)"#,
        ),
        (
            &many,
            "-u 1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17: there are more than 16 ids; that is the most that this list can have",
        ),
        (
            "-m TPROXY",
            "-m TPROXY: TPROXY needs packet marks and policy routing, which shunt does not set up; use REDIRECT, where the proxy sees the client's address as well",
        ),
        (
            "-m NONE",
            "-m NONE: NONE means no redirection; do not enroll this network namespace",
        ),
        (
            "-m redirect",
            r#"-m redirect: "redirect" is not an interception mode; use REDIRECT"#,
        ),
        (
            "-c eth0/1",
            r#"-c eth0/1: "eth0/1" is not an interface name; names have 1 to 15 characters, without blanks and slashes"#,
        ),
        (
            "-k a-name-too-long-",
            r#"-k a-name-too-long-: "a-name-too-long-" is not an interface name; names have 1 to 15 characters, without blanks and slashes"#,
        ),
        (
            "--redirect-dns=yes",
            r#"--redirect-dns=yes: "yes" is neither true nor false"#,
        ),
        (
            "--outbound-ipv4-loopback-cidr 10.0.0.0/8",
            r#"--outbound-ipv4-loopback-cidr 10.0.0.0/8: "10.0.0.0/8" is not a loopback range; write one of IPv4 within 127.0.0.0/8, such as 127.0.0.1/32"#,
        ),
        (
            "--outbound-ipv4-loopback-cidr 127.0.0.0/7",
            r#"--outbound-ipv4-loopback-cidr 127.0.0.0/7: "127.0.0.0/7" is not a loopback range; write one of IPv4 within 127.0.0.0/8, such as 127.0.0.1/32"#,
        ),
        (
            "--mesh consul",
            r#"--mesh consul: "consul" is not a mesh with known settings; there are istio, linkerd and kuma"#,
        ),
        (
            "--legacy-hairpin --tunnel-hairpin",
            "--legacy-hairpin=true: it excludes --tunnel-hairpin; give the one that is meant",
        ),
    ];
    for (args, expected) in rows {
        let error = settings(args).expect_err(args);
        assert_eq!(error.to_string(), expected);
    }
}

#[test]
fn an_error_says_where_the_setting_was_written() {
    let env = with_env("", &[("ISTIO_OUTBOUND_PORTS", "x")]).expect_err("x");
    assert_eq!(
        env.to_string(),
        r#"ISTIO_OUTBOUND_PORTS=x: "x" is not a port; ports are 1 to 65535"#
    );
    let annotation = annotated(Field::OutboundPortsExclude, "80, x").expect_err("x");
    assert_eq!(
        annotation.to_string(),
        "annotation traffic.sidecar.istio.io/excludeOutboundPorts: 80, x: \
         \"x\" is not a port; ports are 1 to 65535"
    );
}

#[test]
fn an_error_stays_short_and_printable() {
    let long = annotated(Field::OutboundPortsExclude, &"x".repeat(100_000)).expect_err("x");
    assert!(long.to_string().chars().count() < 300, "{long}");
    let ugly = annotated(Field::OutboundPortsExclude, "\u{1b}[2J\n").expect_err("not a port");
    assert!(!ugly.to_string().contains(char::is_control), "{ugly}");
}

#[test]
fn port_lists_are_written_back_short() {
    assert_eq!(ports("9,1-3,2:5,7,6,7,65535").to_string(), "1-7,9,65535");
    assert_eq!(ports("1-65535").iter().count(), 65535);
    assert_eq!(ports("").to_string(), "");
    assert!(ports(" , ").is_empty());
}

#[test]
fn settings_survive_json() {
    for args in [
        "",
        "--mesh istio --legacy-hairpin -c eth0 -x 10.0.0.0/8,fd00::/8 --outbound-owner-groups 7",
        "--mesh linkerd -b 1-65535 -i 10.1.2.3/8 --outbound-owner-groups-exclude 7",
    ] {
        let before = settings(args).expect(args);
        let json = serde_json::to_string(&before).expect("plain data");
        let after: Settings = serde_json::from_str(&json).expect(&json);
        assert_eq!(after, before, "{json}");
    }
}

#[test]
fn settings_from_json_hold_no_more_owners_than_fit() {
    let json = serde_json::to_value(Settings::default()).expect("plain data");
    let mut tampered = json;
    tampered["proxy_uids"] = serde_json::json!((0..17).collect::<Vec<u32>>());
    assert!(serde_json::from_value::<Settings>(tampered).is_err());
}

/// Text that is nearly a setting, and text that is nothing like one.
pub(crate) fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        "[-*+0-9a-f.,:/ ]{0,40}",
        "(\\*|,|-|[0-9]{1,6}|(10|127)\\.0\\.0\\.[0-9]{1,3}|/[0-9]{1,3}|::[0-9a-f]{1,5}){0,8}",
        "\\PC{0,40}",
        any::<String>(),
    ]
}

proptest! {
    #[test]
    fn no_text_is_too_strange(texts in prop::collection::vec(text(), Field::ALL.len())) {
        let each = Field::ALL.iter().zip(&texts).map(|(&field, text)| Written {
            field,
            origin: Origin::Flag,
            text: text.clone(),
        });
        for written in each {
            let field = written.field;
            match Settings::parse(&Inputs::from_iter([written])) {
                Ok(found) => {
                    let json = serde_json::to_string(&found).expect("plain data");
                    let again: Settings = serde_json::from_str(&json).expect(&json);
                    prop_assert!(found.as_flags().is_some(), "no flags for {json}");
                    prop_assert_eq!(again, found);
                }
                Err(error) => {
                    prop_assert_eq!(error.written.field, field);
                    prop_assert!(!error.to_string().contains(char::is_control));
                }
            }
        }
    }

    #[test]
    fn a_port_list_says_what_it_was_made_of(set in prop::collection::btree_set(1..=u16::MAX, 0..60)) {
        let list = PortSet::from_iter(set.clone());
        prop_assert_eq!(list.iter().collect::<Vec<_>>(), Vec::from_iter(set));
        prop_assert_eq!(&PortSet::parse(&list.to_string()).expect("its own form"), &list);
    }
}
