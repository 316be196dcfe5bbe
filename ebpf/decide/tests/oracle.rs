//! The rules that real sidecars carried: `decide` with a file's settings says
//! what the file's rules say.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use proptest::{prelude::ProptestConfig, prop_assert_eq, proptest};
use shunt_abi::Hairpin;
use shunt_istio_rules::{Family, Table};

use crate::{random, support::Pod};

/// Every file with what its line `# settings:` says.
fn oracle() -> Vec<(&'static str, Pod)> {
    let istio = Pod::istio;
    vec![
        (
            "capture-loopback",
            istio().ranges(["127.0.0.0/8", "198.51.100.0/24"]),
        ),
        ("capture-nothing", Pod::bare().include_ports([80])),
        (
            "istio-1.1",
            istio()
                .ports(15001, 15001)
                .inbound_ports([80])
                .hairpin(Hairpin::Legacy),
        ),
        (
            "istio-1.13",
            istio()
                .exclude_inbound_ports([22, 15090, 15020])
                .hairpin(Hairpin::Tunnel)
                .tunnel_inbound(),
        ),
        ("istio-1.21", istio()),
        ("istio-redirect", istio().hairpin(Hairpin::Tunnel)),
        (
            "lists-exclude",
            istio()
                .exclude_inbound_ports([15090, 15021, 15020, 8080])
                .exclude_ranges(["203.0.113.0/24", "10.42.0.0/16"])
                .exclude_ports([8080, 15090]),
        ),
        (
            "lists-include",
            istio()
                .inbound_ports([80, 15020])
                .exclude_inbound_ports([80])
                .ranges(["198.51.100.0/24", "172.16.0.0/12"])
                .exclude_ranges(["198.51.100.0/28"])
                .include_ports([8080])
                .exclude_ports([22]),
        ),
        ("two-owners", istio().uids([1337, 1338]).gids([1337, 1338])),
    ]
}

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/oracle")
}

fn table(name: &str) -> Table {
    let path = directory().join(format!("{name}.rules"));
    let text =
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    Table::parse(Family::V4, &text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn decide_says_what_real_rules_say() {
    let oracle: Vec<_> = oracle()
        .into_iter()
        .map(|(name, pod)| (name, pod, table(name)))
        .collect();
    let config = ProptestConfig {
        cases: 2048,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    proptest!(config, |(packet in random::packet())| {
        for (name, pod, table) in &oracle {
            prop_assert_eq!(
                pod.outcome(&packet),
                table.decide(&packet),
                "{}: decide, then iptables; {:?}",
                name,
                pod.decide(&packet)
            );
        }
    });
}

#[test]
fn no_file_is_forgotten() {
    let files: BTreeSet<_> = fs::read_dir(directory())
        .expect("tests/oracle is a directory of the repository")
        .map(|entry| entry.expect("an entry that can be read").path())
        .filter(|path| path.extension().is_some_and(|end| end == "rules"))
        .filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned()))
        .collect();
    let known: BTreeSet<_> = oracle()
        .into_iter()
        .map(|(name, _)| name.to_owned())
        .collect();
    assert_eq!(files, known);
}
