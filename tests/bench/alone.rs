//! What redirection adds to connect() on a machine that has nothing else: in each round each way
//! is set up anew, and taken away before the next one. What the kernel switches on for the
//! whole machine, for programs on cgroups and for netfilter, is then a part of what a way costs.

use std::{fmt, time::Duration};

use shunt_tests::{deadline::wait_until, interrupt::Interrupt};

use crate::{
    Interrupted,
    client::Client,
    figures::{CONNECT_CALL, CONNECT_LATER},
    go_on,
    load::{Job, Latency},
    memory::sockets,
    report::Report,
    role::Cores,
    rounds::to_and_fro,
    say,
    world::{Kind, Site, Way},
};

/// The setting, through minimal proxies.
pub(crate) const ALONE: &str = "each way alone on the machine";

/// How long and how often.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    /// How often each way is set up.
    pub(crate) setups: usize,
    /// How long connections at a constant rate are made, each time.
    pub(crate) connects: Duration,
    /// How many others are made before that is measured once more.
    pub(crate) connections_before: u32,
}

impl fmt::Display for Effort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            setups,
            connects,
            connections_before,
        } = self;
        write!(
            f,
            "Each way alone: set up {setups} times, {connects:?} of such connections, and as many \
             after {connections_before} others."
        )
    }
}

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

/// Measures connect() of each of `ways`, as far as they are compared. One that cannot be set up
/// is left out; why is said where all of them are set up.
///
/// # Panics
///
/// When something does not start. No other way may be set up while this runs.
pub(crate) fn connects(
    ways: &[Way],
    cores: Cores,
    (effort, rate): (Effort, u32),
    interrupt: &Interrupt,
    report: &mut Report,
) -> Result<(), Interrupted> {
    say(format_args!("connect(), each way alone on the machine:"));
    let compared = ways.iter().copied().filter(|way| is_compared(*way));
    let mut ways: Vec<Way> = compared.collect();
    for round in 1..=effort.setups {
        say(format_args!("  round {round} of {}", effort.setups));
        for way in to_and_fro(round, ways.iter()) {
            go_on(interrupt)?;
            if let Ok(site) = Site::start(*way, Kind::Minimal, cores) {
                measure(&site, effort, rate, report);
            }
        }
        ways.rotate_left(1);
    }
    Ok(())
}

/// In namespaces that are new, and when many connections were made there: connection tracking
/// knows each for two minutes, and finds one more slowly among many.
fn measure(site: &Site, effort: Effort, rate: u32, report: &mut Report) {
    let mut connects = Connects::start(site, rate);
    let mut add = |figure| {
        let call = connects.call(effort.connects);
        report.add(ALONE, figure, site.name(), call);
    };
    add(CONNECT_CALL);
    // More than are made to be measured, and not as many as keep the proxies busy.
    make_many(site, effort.connections_before, 4 * rate);
    add(CONNECT_LATER);
}

/// Makes `count` connections, and waits for the end of all of them.
fn make_many(site: &Site, count: u32, rate: u32) {
    let open = sockets();
    Connects::start(site, rate).call(Duration::from_secs(count.into()) / rate);
    wait_until("the end of all connections", || match sockets() {
        still if still <= open => Ok(()),
        still => Err(format!("{still} sockets, {open} before")),
    });
}

/// A client that connects at a constant rate.
struct Connects(Client);

impl Connects {
    fn start(site: &Site, rate: u32) -> Self {
        let to = site.target();
        Self(site.client(Job::Connects { to, rate }))
    }

    /// The median of the call, in µs.
    fn call(&mut self, time: Duration) -> f64 {
        let took: Latency = self.0.work(time);
        took.calls.micro(0.5)
    }
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
