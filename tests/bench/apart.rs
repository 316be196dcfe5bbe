//! What redirection adds to connect() on a machine that has it in one way only, as a node has.
//!
//! Beside each other all ways run past the kernel's switches for programs on cgroups
//! (`cgroup_bpf_enabled_key`), which only an agent needs. And if each were set up by itself,
//! seconds after the one before, the machine would change by more than what is to be told apart.
//! So there are two phases, and turns in each: rules without agents, then agents without rules.
//! A call of the explicit proxy is in both, and in the first of them also with programs that do
//! nothing on another cgroup, which turn the same switches: it is what an agent is counted from.

use std::{iter, time::Duration};

use shunt_tests::{
    Cgroup,
    deadline::wait_until,
    empty_programs::{EmptyPrograms, Hanging},
    interrupt::Interrupt,
};

use crate::{
    Interrupted,
    client::Client,
    figures::CONNECT_CALL,
    load::{Job, Latency},
    memory::sockets,
    report::Report,
    role::Cores,
    rounds::{Effort, take_turns},
    say,
    times::Times,
    world::{Kind, Site, Way},
};

/// The setting, through minimal proxies.
pub(crate) const APART: &str = "rules without agents, agents without rules";

/// The way that has a bar to compare with.
const RULES: Way = Way::Iptables("iptables-nft-restore");

/// Whether a way of the agent has a bar.
fn is_compared(way: Way) -> bool {
    [Way::SHUNT_OFF, Way::SHUNT_BETWEEN, Way::SHUNT_PROXY].contains(&way.name())
}

/// Measures connect() with the rules, and in those of `ways` that are the agent's and have a bar.
/// Where something cannot be set up nothing is said: why is said where all ways are set up.
///
/// # Panics
///
/// When something does not start. No other way may be set up while this runs.
pub(crate) fn connects(
    ways: &[Way],
    cores: Cores,
    effort: &Effort,
    interrupt: &Interrupt,
    report: &mut Report,
) -> Result<(), Interrupted> {
    say(format_args!("connect(), with rules and without agents:"));
    let Ok(mut rules) = Phase::start(&[Way::Explicit, Way::Explicit, RULES], cores, effort) else {
        return Ok(());
    };
    let (programs, cgroup) = (EmptyPrograms::new(), Cgroup::new());
    let mut bases = Vec::new();
    for turn in 0..effort.turns {
        // Both explicit proxies are it in turn.
        let beside = turn % 2;
        let medians = rules.turn(turn, effort, interrupt, |place| {
            // Before every piece: it is the kernel's code that is changed.
            let attached = programs.attach(cgroup.path());
            (place == beside).then_some(attached)
        })?;
        report.add(APART, CONNECT_CALL, Way::EXPLICIT, medians[1 - beside]);
        report.add(APART, CONNECT_CALL, RULES.name(), medians[2]);
        bases.push(medians[beside]);
    }
    drop(rules);

    say(format_args!("connect(), with agents and without rules:"));
    let compared = ways.iter().copied().filter(|way| is_compared(*way));
    let ways: Vec<Way> = iter::once(Way::Explicit).chain(compared).collect();
    let Ok(mut agents) = Phase::start(&ways, cores, effort) else {
        return Ok(());
    };
    for (turn, base) in bases.into_iter().enumerate() {
        let medians = agents.turn(turn, effort, interrupt, |_| None)?;
        for (way, median) in ways.iter().zip(&medians).skip(1) {
            report.add(APART, CONNECT_CALL, way.name(), base + median - medians[0]);
        }
    }
    Ok(())
}

/// Some ways, while no other is on the machine.
struct Phase {
    clients: Vec<Client>,
    _sites: Vec<Site>,
}

impl Phase {
    /// Sets them up, and makes [`BEFORE`] connections of each.
    fn start(ways: &[Way], cores: Cores, effort: &Effort) -> Result<Self, String> {
        let sites = ways.iter().map(|way| {
            say(format_args!("  {}", way.name()));
            Site::start(*way, Kind::Minimal, cores)
        });
        let sites = sites.collect::<Result<Vec<_>, _>>()?;
        let client = |site: &Site, rate| {
            let to = site.target();
            site.client(Job::Connects { to, rate })
        };
        for site in &sites {
            make_many(client(site, MANY), BEFORE);
        }
        Ok(Self {
            clients: sites.iter().map(|site| client(site, effort.rate)).collect(),
            _sites: sites,
        })
    }

    /// The median of the calls of each way, in µs. What `hanging` returns for the place of one is
    /// kept for its piece.
    fn turn(
        &mut self,
        number: usize,
        effort: &Effort,
        interrupt: &Interrupt,
        hanging: impl Fn(usize) -> Option<Hanging>,
    ) -> Result<Vec<f64>, Interrupted> {
        let mut calls: Vec<_> = iter::repeat_with(Times::new)
            .take(self.clients.len())
            .collect();
        let mut ways: Vec<_> = self
            .clients
            .iter_mut()
            .zip(&mut calls)
            .enumerate()
            .collect();
        let first = number % ways.len();
        ways.rotate_left(first);
        take_turns(
            number,
            effort,
            &mut ways,
            interrupt,
            |(place, (client, calls))| {
                let _hanging = hanging(*place);
                let took: Latency = client.work(effort.connects.1);
                calls.add(&took.calls);
            },
        )?;
        Ok(calls.iter().map(|calls| calls.micro(0.5)).collect())
    }
}

/// How many connections each way has had before its calls are measured: connection tracking knows
/// each for two minutes, and finds one more slowly among many.
const BEFORE: u32 = 6000;
/// How many of them in one second: fewer than keep the proxies busy.
const MANY: u32 = 4000;

/// Makes `count` connections, and waits for the end of all of them.
fn make_many(mut client: Client, count: u32) {
    let open = sockets();
    let _: Latency = client.work(Duration::from_secs(count.into()) / MANY);
    wait_until("the end of all connections", || match sockets() {
        still if still <= open => Ok(()),
        still => Err(format!("{still} sockets, {open} before")),
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_compared_is_the_agents() {
        assert_eq!(RULES.name(), Way::IPTABLES_NFT);
        assert!(is_compared(Way::Shunt(Some("between"))));
        let others = [Way::Direct, Way::Explicit, RULES, Way::Shunt(Some("all"))];
        assert!(!others.into_iter().any(is_compared));
    }
}
