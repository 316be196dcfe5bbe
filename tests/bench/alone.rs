//! What redirection adds to connect() on a machine that has nothing else: in each round each way
//! is set up anew, and taken away before the next one. What the kernel switches on for the
//! whole machine, for programs on cgroups and for netfilter, is then a part of what a way costs.

use shunt_tests::interrupt::Interrupt;

use crate::{
    Interrupted,
    figures::CONNECT_CALL,
    go_on,
    load::{Job, Latency},
    report::Report,
    role::Cores,
    rounds::Effort,
    say,
    world::{Kind, Site, Way},
};

/// The setting, through minimal proxies.
pub(crate) const ALONE: &str = "each way alone on the machine";

/// Whether a way is a part of the comparison: redirection that a mesh has today, the agent in
/// the modes that have a bar, and what both are counted from.
fn is_compared(way: Way) -> bool {
    const COMPARED: [&str; 5] = [
        Way::EXPLICIT,
        Way::IPTABLES_NFT,
        Way::SHUNT_OFF,
        Way::SHUNT_BETWEEN,
        Way::SHUNT_PROXY,
    ];
    COMPARED.contains(&way.name())
}

/// Measures connect() of each of `ways`, as far as they are compared.
///
/// # Panics
///
/// When something does not start. No other way may be set up while this runs.
pub(crate) fn connects(
    ways: &[Way],
    effort: &Effort,
    interrupt: &Interrupt,
    report: &mut Report,
) -> Result<(), Interrupted> {
    say(format_args!("connect(), each way alone on the machine:"));
    let mut ways: Vec<Way> = ways
        .iter()
        .copied()
        .filter(|way| is_compared(*way))
        .collect();
    for round in 1..=effort.setups {
        say(format_args!("  round {round} of {}", effort.setups));
        for way in &ways {
            go_on(interrupt)?;
            // Why one cannot be set up is said where all of them are.
            if let Ok(site) = Site::start(*way, Kind::Minimal, Cores::choose()) {
                report.add(ALONE, CONNECT_CALL, site.name(), call(&site, effort));
            }
        }
        ways.rotate_left(1);
    }
    Ok(())
}

/// The median of connect(), in µs, where as many connections came before as where all ways share
/// the machine: connection tracking knows each for two minutes, and finds one more slowly among
/// many.
fn call(site: &Site, effort: &Effort) -> f64 {
    const FASTER: u32 = 5;
    let to = site.target();
    let connects = |rate| site.client(Job::Connects { to, rate });
    let before = effort.connects * u32::try_from(effort.turns).expect("few") / FASTER;
    let _: Latency = connects(FASTER * effort.rate).work(before);
    let took: Latency = connects(effort.rate).work(effort.connects_alone);
    took.calls.micro(0.5)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_compared_has_a_base_and_the_rules() {
        let compared = [
            Way::Explicit,
            Way::Iptables("iptables-nft-restore"),
            Way::Shunt(Some("between")),
        ];
        assert!(compared.into_iter().all(is_compared));
        let others = [
            Way::Direct,
            Way::Iptables("iptables-legacy-restore"),
            Way::Nftables,
            Way::Shunt(Some("all")),
        ];
        assert!(!others.into_iter().any(is_compared));
    }
}
