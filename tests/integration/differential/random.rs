//! Settings that are drawn, and made small where they show a difference.

use std::{
    env,
    fmt::Display,
    str::FromStr,
    time::{SystemTime, UNIX_EPOCH},
};

use rand::{RngExt, SeedableRng, rngs::SmallRng, seq::IndexedRandom};
use shunt_istio_rules::{Capture, Dns, Groups};
use shunt_tests::Stack;

use super::{
    compare::Fault,
    probes::{PORTS, Question, SourcePorts, questions},
    row::Row,
    setting::{Mesh, Setting, range},
};

/// How many settings are drawn, and from where: `--random` and `--seed`.
const RANDOM: &str = "SHUNT_TEST_RANDOM";
const SEED: &str = "SHUNT_TEST_SEED";
/// Without `cargo xtask test`.
const DEFAULT_NUMBER: u64 = 20;

/// How many of the possible probes are drawn.
const SHARE: f64 = 0.3;
/// How many of the rows are changed.
const CHANGED: f64 = 0.25;

/// The seeds of the settings to draw. Each has its own, so that one of them can
/// be repeated alone.
pub(crate) fn seeds() -> impl Iterator<Item = u64> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let first = from_env(SEED).unwrap_or_else(|| now.map_or(0, |since| since.as_secs()));
    let number = from_env(RANDOM).unwrap_or(DEFAULT_NUMBER);
    (0..number).map(move |index| first.wrapping_add(index))
}

fn from_env(name: &str) -> Option<u64> {
    let text = env::var(name).ok()?;
    let number = u64::from_str(&text);
    Some(number.unwrap_or_else(|error| panic!("{name}={text}: {error}")))
}

/// The command that draws the setting of `seed` again.
pub(crate) fn command(seed: u64) -> impl Display {
    format!("cargo xtask test --random 1 --seed {seed} drawn_settings")
}

/// What is drawn from a seed.
pub(crate) fn draw(seed: u64, ports: &mut SourcePorts) -> (Setting, Vec<Question>) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let setting = draw_setting(&mut rng);
    let mut questions = questions(&setting, ports);
    questions.retain(|_| rng.random_bool(SHARE));
    (setting, questions)
}

fn draw_setting(rng: &mut SmallRng) -> Setting {
    let mut setting = match rng.random_range(0..10) {
        0..2 => Setting::bare(),
        2..8 => Setting::of(Mesh::Istio),
        8 => Setting::of(Mesh::Linkerd),
        _ => Setting::of(Mesh::Kuma),
    };
    setting.stack = match rng.random_range(0..10) {
        0..7 => Stack::Dual,
        7..9 => Stack::V6,
        _ => Stack::V4,
    };
    for row in Row::ALL {
        if rng.random_bool(CHANGED) {
            draw_row(row, &mut setting, rng);
        }
    }
    setting
}

/// Lists are drawn item by item; what is no list, or has a meaning of its own,
/// is one of the values of the table.
fn draw_row(row: Row, setting: &mut Setting, rng: &mut SmallRng) {
    let rules = &mut setting.rules;
    match row {
        Row::InboundInclude if rng.random_bool(0.7) => {
            rules.inbound_ports = Capture::Listed(some(&PORTS, rng));
        }
        Row::InboundExclude => rules.inbound_ports_exclude = some(&PORTS, rng),
        Row::OutboundInclude => {
            rules.outbound_ranges = if rng.random_bool(0.3) {
                Capture::All
            } else {
                Capture::Listed(some(&RANGES.map(range), rng))
            };
        }
        Row::OutboundExclude => rules.outbound_ranges_exclude = some(&RANGES.map(range), rng),
        Row::PortsInclude => rules.outbound_ports = some(&PORTS, rng),
        Row::PortsExclude => rules.outbound_ports_exclude = some(&PORTS, rng),
        Row::ExcludedInterfaces => {
            let names = ["eth0", "lo", "vif0", "eth1", "vif+"].map(str::to_owned);
            rules.interfaces_exclude = some(&names, rng);
        }
        Row::RedirectDns => {
            let servers = some(&RESOLVERS.map(range), rng);
            if !servers.is_empty() {
                rules.dns = Dns::Resolvers(servers);
            }
        }
        Row::OwnerGroups => rules.groups = Groups::Only(vec![*one(&GROUPS, rng)]),
        Row::OwnerGroupsExclude => rules.groups = Groups::Except(some(&GROUPS, rng)),
        Row::OutboundPort
        | Row::InboundPort
        | Row::TunnelPort
        | Row::Owners
        | Row::InboundInclude
        | Row::VirtualInterfaces
        | Row::CaptureAllDns
        | Row::DualStack
        | Row::Loopback
        | Row::DropInvalid
        | Row::Hairpin
        | Row::TunnelInbound => one(row.changes(), rng)(setting),
    }
}

const RANGES: [&str; 16] = [
    "0.0.0.0/0",
    "127.0.0.0/8",
    "127.0.0.2/32",
    "127.0.0.1/32",
    "10.42.0.0/16",
    "10.42.0.4/32",
    "10.44.0.0/24",
    "198.51.100.0/24",
    "198.51.100.7/32",
    "203.0.113.0/25",
    "172.16.0.0/12",
    "::/0",
    "::1/128",
    "fd00::/8",
    "2001:db8::/32",
    "3fff:113::9/128",
];
const RESOLVERS: [&str; 6] = [
    "172.16.5.5",
    "198.51.100.7",
    "127.0.0.2",
    "10.42.0.4",
    "fd00:172::5",
    "fd00:42::4",
];
const GROUPS: [u32; 5] = [1000, 1337, 2001, 2002, 0];

fn one<'a, T>(items: &'a [T], rng: &mut SmallRng) -> &'a T {
    items.choose(rng).expect("there are some")
}

/// Up to three items, in any order, each once.
fn some<T: Clone + PartialEq>(items: &[T], rng: &mut SmallRng) -> Vec<T> {
    let mut drawn = Vec::new();
    for _ in 0..rng.random_range(0..=3) {
        let item = one(items, rng);
        if !drawn.contains(item) {
            drawn.push(item.clone());
        }
    }
    drawn
}

/// The smallest setting that still `fails`: flag by flag, and then item by
/// item, is taken away what it does not need.
pub(crate) fn shrink(setting: Setting, mut fails: impl FnMut(&Setting) -> bool) -> Setting {
    let mut smallest = setting;
    while let Some(smaller) = smaller(&smallest).into_iter().find(&mut fails) {
        smallest = smaller;
    }
    smallest
}

fn smaller(setting: &Setting) -> Vec<Setting> {
    let mut all = Vec::new();
    if setting.stack != Stack::Dual {
        all.push(setting.clone().with(|s| s.stack = Stack::Dual));
    }
    if setting.mesh != Some(Mesh::Istio) && setting.mesh.is_some() {
        all.push(Setting {
            stack: setting.stack,
            dual_stack: setting.dual_stack,
            ..Setting::of(Mesh::Istio)
        });
    }
    // Only what a flag can say without the preset.
    if setting.mesh == Some(Mesh::Istio) {
        all.push(setting.clone().with(|s| s.mesh = None));
    }
    all.extend(Row::ALL.iter().flat_map(|row| row.smaller(setting)));
    all
}

/// Everything about a drawn setting that is not as it should be.
pub(crate) fn report(seed: u64, drawn: &Setting, smallest: &Setting, fault: &Fault) -> String {
    format!(
        "drawn:    shunt enroll {drawn}\n\
         smallest: shunt enroll {smallest}\n\
         in a pod of {:?}\n\
         {fault}\n\
         repeat:   {}\n",
        smallest.stack,
        command(seed)
    )
}

#[test]
fn a_seed_draws_the_same_again() {
    for seed in 0..50 {
        let [first, again] = [(), ()].map(|()| draw(seed, &mut SourcePorts::default()));
        assert_eq!(first.0, again.0);
        let probes = |questions: &[Question]| questions.iter().map(|q| q.probe).collect::<Vec<_>>();
        assert_eq!(probes(&first.1), probes(&again.1));
    }
}

/// Whatever is drawn is something that shunt takes.
#[test]
fn what_is_drawn_means_something() {
    for seed in 0..500 {
        let _ = draw(seed, &mut SourcePorts::default()).0.settings();
    }
}

#[test]
fn the_smallest_setting_has_nothing_that_is_not_needed() {
    let needed = |setting: &Setting| {
        let rules = &setting.rules;
        rules.outbound_ports_exclude.contains(&80) && rules.interfaces_virtual.len() == 1
    };
    let drawn = (0..).map(|seed| draw(seed, &mut SourcePorts::default()).0);
    let drawn = drawn.into_iter().find(needed).expect("one of many");
    let smallest = shrink(drawn, needed).to_string();
    assert!(
        [
            "-o 80 -k vif0 --dual-stack=true",
            "-o 80 -k vif1 --dual-stack=true"
        ]
        .contains(&smallest.as_str()),
        "{smallest}"
    );
}
