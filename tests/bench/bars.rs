//! The figures that shunt wants to reach: ratios of medians in one run.

use std::fmt;

use serde::Serialize;

use crate::{
    figures::{
        BULK, CONNECT_CALL, CYCLES, ENROL, MEMORY, OPEN_CALL, OPEN_CPU, OUTSIDE, REQUEST_4K,
        REQUEST_64, REQUEST_64K, REQUEST_500K,
    },
    neighbours, open, phases,
    report::{Figure, Report},
    stats::{Spread, added, added_in_phases, ratios},
    world::{Kind, Way},
};

/// A ratio, and what it should be.
#[derive(Clone, Copy, Debug)]
struct Bar {
    what: &'static str,
    setting: &'static str,
    figure: Figure,
    of: &'static str,
    to: To,
    limit: Limit,
}

/// What a row is compared with.
#[derive(Clone, Copy, Debug)]
enum To {
    /// The ratio to this row.
    Row(&'static str),
    /// The ratio of what both have more than `base`.
    Added {
        to: &'static str,
        base: &'static str,
    },
    /// The same where the explicit proxy and iptables are in another phase.
    AddedInPhases,
    /// With nothing: the number itself.
    Nothing,
}

/// A bar, what was measured, and whether that meets it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Verdict {
    pub(crate) what: &'static str,
    /// As in the table.
    pub(crate) bar: String,
    pub(crate) measured: Spread,
    pub(crate) met: bool,
    #[serde(skip)]
    pub(crate) digits: usize,
}

/// Those of everything that was measured.
pub(crate) fn verdicts(report: &Report) -> Vec<Verdict> {
    let judged = ALL.iter().filter_map(|bar| {
        let measured = bar.measure(report)?;
        Some(Verdict {
            what: bar.what,
            bar: bar.limit.to_string(),
            measured,
            met: bar.limit.is_met_by(measured.mid),
            digits: bar.digits(),
        })
    });
    judged.collect()
}

/// How large a ratio may be.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Limit {
    AtMost(f64),
    AtLeast(f64),
    Below(f64),
    Between(f64, f64),
}

impl Limit {
    /// Whether this number is as it should be.
    fn is_met_by(self, number: f64) -> bool {
        match self {
            Self::AtMost(limit) => number <= limit,
            Self::AtLeast(limit) => number >= limit,
            Self::Below(limit) => number < limit,
            Self::Between(low, high) => (low..=high).contains(&number),
        }
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtMost(limit) => write!(f, "≤ {limit}"),
            Self::AtLeast(limit) => write!(f, "≥ {limit}"),
            Self::Below(limit) => write!(f, "< {limit}"),
            Self::Between(low, high) => write!(f, "{low} to {high}"),
        }
    }
}

impl Bar {
    /// The number to compare with the limit; `None` when it was not measured.
    fn measure(&self, report: &Report) -> Option<Spread> {
        let rounds = |row| report.rounds(self.setting, self.figure, row);
        let of = rounds(self.of);
        match self.to {
            To::Row(to) => Spread::of(&ratios(of, rounds(to))),
            To::Added { to, base } => added(of, rounds(to), rounds(base)),
            To::AddedInPhases => added_in_phases(
                (of, rounds(phases::BESIDE)),
                rounds(phases::SWITCHED),
                (rounds(Way::IPTABLES_NFT), rounds(Way::EXPLICIT)),
            ),
            To::Nothing => Spread::of(of),
        }
    }

    /// How many digits of it say something.
    fn digits(&self) -> usize {
        match self.to {
            To::Row(_) | To::Added { .. } | To::AddedInPhases => 3,
            To::Nothing => self.figure.digits,
        }
    }
}

const MINIMAL: &str = Kind::Minimal.name();

const fn bar(
    what: &'static str,
    figure: Figure,
    of: &'static str,
    to: &'static str,
    limit: Limit,
) -> Bar {
    Bar {
        what,
        setting: MINIMAL,
        figure,
        of,
        to: To::Row(to),
        limit,
    }
}

/// Of a connection of an application: what redirection costs beyond calling the
/// proxy, against what it costs with iptables.
const fn connecting(what: &'static str, of: &'static str) -> Bar {
    Bar {
        to: To::Added {
            to: Way::IPTABLES_NFT,
            base: Way::EXPLICIT,
        },
        ..bar(what, CONNECT_CALL, of, "", Limit::AtMost(0.5))
    }
}

/// The same, where nothing of iptables is on the machine.
const fn in_phases(what: &'static str, of: &'static str) -> Bar {
    Bar {
        setting: phases::PHASES,
        to: To::AddedInPhases,
        ..connecting(what, of)
    }
}

const fn elsewhere(setting: &'static str, bar: Bar) -> Bar {
    Bar { setting, ..bar }
}

/// All of them.
const ALL: &[Bar] = &[
    in_phases(
        "added to connect(), splice off, rules and agents apart",
        Way::SHUNT_OFF,
    ),
    in_phases(
        "added to connect(), splice between, rules and agents apart",
        Way::SHUNT_BETWEEN,
    ),
    in_phases(
        "added to connect(), splice proxy, rules and agents apart",
        Way::SHUNT_PROXY,
    ),
    connecting(
        "added to connect(), splice off, beside other ways",
        Way::SHUNT_OFF,
    ),
    connecting(
        "added to connect(), splice between, beside other ways",
        Way::SHUNT_BETWEEN,
    ),
    connecting(
        "added to connect(), splice proxy, beside other ways",
        Way::SHUNT_PROXY,
    ),
    bar(
        "connections per second, splice off, against iptables-nft",
        CYCLES,
        Way::SHUNT_OFF,
        Way::IPTABLES_NFT,
        Limit::AtLeast(1.5),
    ),
    bar(
        "connections per second, splice between, against iptables-nft",
        CYCLES,
        Way::SHUNT_BETWEEN,
        Way::IPTABLES_NFT,
        Limit::AtLeast(1.5),
    ),
    bar(
        "connections per second, splice proxy, against iptables-nft",
        CYCLES,
        Way::SHUNT_PROXY,
        Way::IPTABLES_NFT,
        Limit::AtLeast(1.5),
    ),
    bar(
        "request of 64 B, splice off, against the explicit proxy",
        REQUEST_64,
        Way::SHUNT_OFF,
        Way::EXPLICIT,
        Limit::AtMost(1.03),
    ),
    bar(
        "request of 4 KiB, splice off, against the explicit proxy",
        REQUEST_4K,
        Way::SHUNT_OFF,
        Way::EXPLICIT,
        Limit::AtMost(1.03),
    ),
    bar(
        "request of 64 KiB, splice off, against the explicit proxy",
        REQUEST_64K,
        Way::SHUNT_OFF,
        Way::EXPLICIT,
        Limit::AtMost(1.03),
    ),
    elsewhere(
        neighbours::OUTSIDE,
        bar(
            "connect() outside the mesh, 1,000 pods, against no agent",
            OUTSIDE,
            neighbours::PODS_1000,
            neighbours::NO_AGENT,
            Limit::AtMost(1.03),
        ),
    ),
    bar(
        "kernel memory per connection, splice off, against iptables-nft",
        MEMORY,
        Way::SHUNT_OFF,
        Way::IPTABLES_NFT,
        Limit::Below(1.0),
    ),
    bar(
        "kernel memory per connection, splice between, against iptables-nft",
        MEMORY,
        Way::SHUNT_BETWEEN,
        Way::IPTABLES_NFT,
        Limit::Below(1.0),
    ),
    bar(
        "kernel memory per connection, splice proxy, against iptables-nft",
        MEMORY,
        Way::SHUNT_PROXY,
        Way::IPTABLES_NFT,
        Limit::Below(1.0),
    ),
    elsewhere(
        open::OPEN,
        bar(
            "connect() with 100,000 connections open, against 10",
            OPEN_CALL,
            open::MANY_OPEN,
            open::FEW_OPEN,
            Limit::Between(0.9, 1.1),
        ),
    ),
    elsewhere(
        open::OPEN,
        bar(
            "CPU time per connection with 100,000 open, against 10",
            OPEN_CPU,
            open::MANY_OPEN,
            open::FEW_OPEN,
            Limit::Between(0.9, 1.1),
        ),
    ),
    elsewhere(
        neighbours::ENROLLING,
        bar(
            "enrolling the 1,000th pod, against the 10th",
            ENROL,
            neighbours::POD_1000,
            neighbours::POD_10,
            Limit::Between(0.8, 1.2),
        ),
    ),
    Bar {
        to: To::Nothing,
        ..elsewhere(
            neighbours::ENROLLING,
            bar(
                "enrolling the 1,000th pod, ms",
                ENROL,
                neighbours::POD_1000,
                "",
                Limit::Below(20.0),
            ),
        )
    },
    bar(
        "request of 64 B, splice proxy, against iptables-nft",
        REQUEST_64,
        Way::SHUNT_PROXY,
        Way::IPTABLES_NFT,
        Limit::AtMost(0.88),
    ),
    bar(
        "request of 64 B, splice proxy, against splice off",
        REQUEST_64,
        Way::SHUNT_PROXY,
        Way::SHUNT_OFF,
        Limit::AtMost(0.95),
    ),
    bar(
        "request of 64 B, splice all, against iptables-nft",
        REQUEST_64,
        Way::SHUNT_ALL,
        Way::IPTABLES_NFT,
        Limit::AtMost(0.75),
    ),
    bar(
        "request of 64 KiB, splice proxy, against splice off",
        REQUEST_64K,
        Way::SHUNT_PROXY,
        Way::SHUNT_OFF,
        Limit::AtMost(0.85),
    ),
    bar(
        "request of 500 kB, splice proxy, against splice off",
        REQUEST_500K,
        Way::SHUNT_PROXY,
        Way::SHUNT_OFF,
        Limit::AtMost(0.6),
    ),
    bar(
        "bulk throughput, splice proxy, against iptables-nft",
        BULK,
        Way::SHUNT_PROXY,
        Way::IPTABLES_NFT,
        Limit::AtLeast(1.2),
    ),
    bar(
        "bulk throughput, splice proxy, against splice off",
        BULK,
        Way::SHUNT_PROXY,
        Way::SHUNT_OFF,
        Limit::AtLeast(0.95),
    ),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Machine;

    fn find(what: &str) -> &'static Bar {
        let found = ALL.iter().find(|bar| bar.what.starts_with(what));
        found.expect("there is such a bar")
    }

    #[test]
    fn limits_include_themselves_but_below() {
        assert!(Limit::AtMost(1.0).is_met_by(1.0));
        assert!(!Limit::AtMost(1.0).is_met_by(1.01));
        assert!(Limit::AtLeast(1.0).is_met_by(1.0));
        assert!(!Limit::Below(1.0).is_met_by(1.0));
        assert!(Limit::Between(0.9, 1.1).is_met_by(0.9));
        assert!(!Limit::Between(0.9, 1.1).is_met_by(1.2));
    }

    #[test]
    fn what_was_not_measured_is_no_bar() {
        let report = Report::new(Machine::example(), String::new());
        assert!(ALL.iter().all(|bar| bar.measure(&report).is_none()));
    }

    #[test]
    fn a_difference_is_measured_from_the_explicit_proxy() {
        let mut report = Report::new(Machine::example(), String::new());
        for (row, value) in [
            (Way::EXPLICIT, 10.0),
            (Way::IPTABLES_NFT, 20.0),
            (Way::SHUNT_OFF, 13.0),
        ] {
            report.add(MINIMAL, CONNECT_CALL, row, value);
        }
        let measured = find("added to connect(), splice off, beside").measure(&report);
        assert_eq!(measured.map(|spread| spread.mid), Some(0.3));
    }

    #[test]
    fn in_phases_each_difference_is_that_of_its_phase() {
        let mut report = Report::new(Machine::example(), String::new());
        for (row, value) in [
            (Way::EXPLICIT, 10.0),
            (Way::IPTABLES_NFT, 20.0),
            (phases::SWITCHED, 11.0),
            (phases::BESIDE, 13.0),
            (Way::SHUNT_OFF, 16.0),
        ] {
            report.add(phases::PHASES, CONNECT_CALL, row, value);
        }
        let measured = find("added to connect(), splice off, rules").measure(&report);
        assert_eq!(measured.map(|spread| spread.mid), Some(0.4));
    }
}
