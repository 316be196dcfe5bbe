//! What redirection adds to connect() on a machine that has it in one way only, as a node has.
//!
//! Beside each other all ways run past the kernel's switches for programs on cgroups
//! (`cgroup_bpf_enabled_key`), which only an agent needs. And if each were set up by itself,
//! seconds after the one before, the machine would change by more than what is to be told apart.
//! So there are phases, and turns in each: in one rules without agents, in the other agents
//! without rules. A call of the explicit proxy is in both. In the former it is also measured with
//! programs that do nothing on another cgroup, which turn the switches of connect4 and `sock_ops`
//! (that of `sk_lookup`, which an agent turns as well, is not counted): that is in what an agent adds, but not in the difference to the explicit
//! proxy beside it ([`added_in_phases`](crate::stats::added_in_phases)).

use std::{iter, time::Duration};

use shunt_tests::{
    Cgroup,
    empty_programs::{EmptyPrograms, Hanging},
    interrupt::Interrupt,
};

use crate::{
    Interrupted,
    client::Client,
    figures::CONNECT_CALL,
    go_on,
    load::{Job, Latency},
    memory::{sockets, wait_for_end},
    report::Report,
    role::Cores,
    rounds::{Effort, take_turns, to_and_fro},
    say,
    times::Times,
    world::{Kind, Site, Way},
};

/// The setting, through minimal proxies.
pub(crate) const PHASES: &str = "rules and agents apart";
/// Its row of the explicit proxy without agents, while programs that do nothing hang on another
/// cgroup.
pub(crate) const SWITCHED: &str = "explicit proxy, empty programs elsewhere";
/// Its row of the explicit proxy while agents are on the machine.
pub(crate) const BESIDE: &str = "explicit proxy, agents elsewhere";

/// How often both phases are set up, in turn the one and the other first.
const ROUNDS: usize = 4;

/// Measures connect() with the rules, and in those of `ways` that are the agent's.
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
    say(format_args!("connect(), rules and agents apart:"));
    let agents: Vec<Way> = ways.iter().copied().filter(|way| is_agents(*way)).collect();
    let turns = effort.turns / ROUNDS;
    for round in 0..ROUNDS {
        for is_of_agents in to_and_fro(round, [false, true].into_iter()) {
            say(format_args!(
                "  round {} of {ROUNDS}, {}",
                round + 1,
                if is_of_agents { "agents" } else { "rules" }
            ));
            if is_of_agents {
                let ways = [&[Way::Explicit, Way::Explicit], &agents[..]].concat();
                Phase::start(&ways, cores, effort, interrupt)?
                    .beside_agents(turns, effort, interrupt, report)?;
            } else {
                let rules = Way::Iptables("iptables-nft-restore");
                let ways = [Way::Explicit, Way::Explicit, rules];
                Phase::start(&ways, cores, effort, interrupt)?
                    .without_agents(turns, effort, interrupt, report)?;
            }
        }
    }
    Ok(())
}

/// Whether a way is the agent's, in a mode that has a bar.
fn is_agents(way: Way) -> bool {
    [Way::SHUNT_OFF, Way::SHUNT_BETWEEN, Way::SHUNT_PROXY].contains(&way.name())
}

/// Some ways, while no other is on the machine: two of the explicit proxy first, since of two that
/// are the same one may be slower than the other.
struct Phase {
    ways: Vec<(Client, Site)>,
}

impl Phase {
    /// Sets them up, and makes [`BEFORE`] connections of each. A way that cannot be set up is left
    /// out; why is said where all of them are.
    fn start(
        ways: &[Way],
        cores: Cores,
        effort: &Effort,
        interrupt: &Interrupt,
    ) -> Result<Self, Interrupted> {
        let mut started = Vec::new();
        for way in ways {
            go_on(interrupt)?;
            if let Ok(site) = Site::start(*way, Kind::Minimal, cores) {
                make_many(client(&site, MANY), BEFORE);
                started.push((client(&site, effort.rate), site));
            }
        }
        Ok(Self { ways: started })
    }

    /// One of the two explicit proxies in turn has programs that do nothing elsewhere.
    fn without_agents(
        mut self,
        turns: usize,
        effort: &Effort,
        interrupt: &Interrupt,
        report: &mut Report,
    ) -> Result<(), Interrupted> {
        let (programs, cgroup) = (EmptyPrograms::new(), Cgroup::new());
        for turn in 0..turns {
            let switched = turn % 2;
            let medians = self.turn(turn, effort, interrupt, |place| {
                // Before every piece: it is the kernel's code that is changed.
                let attached = programs.attach(cgroup.path());
                (place == switched).then_some(attached)
            })?;
            for (place, (name, median)) in medians.into_iter().enumerate() {
                let row = if place == switched { SWITCHED } else { name };
                report.add(PHASES, CONNECT_CALL, row, median);
            }
        }
        Ok(())
    }

    /// The two explicit proxies have every other turn each.
    fn beside_agents(
        mut self,
        turns: usize,
        effort: &Effort,
        interrupt: &Interrupt,
        report: &mut Report,
    ) -> Result<(), Interrupted> {
        for turn in 0..turns {
            let medians = self.turn(turn, effort, interrupt, |_| None)?;
            let explicit = medians[turn % 2].1;
            report.add(PHASES, CONNECT_CALL, BESIDE, explicit);
            for (name, median) in medians.into_iter().skip(2) {
                report.add(PHASES, CONNECT_CALL, name, median);
            }
        }
        Ok(())
    }

    /// The median of the calls of each way, in µs. What `hanging` returns for the place of one is
    /// kept for its piece.
    fn turn(
        &mut self,
        number: usize,
        effort: &Effort,
        interrupt: &Interrupt,
        hanging: impl Fn(usize) -> Option<Hanging>,
    ) -> Result<Vec<(&'static str, f64)>, Interrupted> {
        let mut calls: Vec<Times> = iter::repeat_with(Times::new)
            .take(self.ways.len())
            .collect();
        let clients = self.ways.iter_mut().map(|(client, _)| client);
        let mut turn: Vec<_> = clients.zip(&mut calls).enumerate().collect();
        let first = number % turn.len();
        turn.rotate_left(first);
        take_turns(
            number,
            effort,
            &mut turn,
            interrupt,
            |(place, (client, calls))| {
                let _hanging = hanging(*place);
                let took: Latency = client.work(effort.connects.1);
                calls.add(&took.calls);
            },
        )?;
        let names = self.ways.iter().map(|(_, site)| site.name());
        Ok(names
            .zip(calls.iter().map(|calls| calls.micro(0.5)))
            .collect())
    }
}

/// A client that connects at a constant rate.
fn client(site: &Site, rate: u32) -> Client {
    let to = site.target();
    site.client(Job::Connects { to, rate })
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
    wait_for_end(open);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agents_ways_are_those_with_a_bar() {
        assert!(is_agents(Way::Shunt(Some("between"))));
        let others = [Way::Direct, Way::Explicit, Way::Shunt(Some("all"))];
        assert!(!others.into_iter().any(is_agents));
    }
}
