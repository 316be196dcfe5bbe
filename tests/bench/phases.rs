//! What redirection adds to connect() on a machine that has it in one way only, as a node has.
//!
//! Beside each other all ways run past the kernel's switches for programs on cgroups
//! (`cgroup_bpf_enabled_key`), which only an agent needs. And if each were set up by itself,
//! seconds after the one before, the machine would change by more than what is to be told apart.
//! So there are phases, and turns in each: in one rules without agents, in the other agents
//! without rules. A call of the explicit proxy is in both. In the former it is also measured with
//! programs that do nothing on another cgroup, which turn the switches of connect4 and `sock_ops`
//! (that of `sk_lookup`, which an agent turns as well, is not counted): that is in what an agent
//! adds, but not in the difference to the explicit proxy beside it
//! ([`added_in_phases`](crate::stats::added_in_phases)).

use std::time::Duration;

use shunt_tests::{Cgroup, empty_programs::EmptyPrograms, interrupt::Interrupt};

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
    let rules = [Way::Iptables("iptables-nft-restore")];
    let phases = [(Phase::Rules, &rules[..]), (Phase::Agents, &agents)];
    for round in 0..ROUNDS {
        for (phase, ways) in to_and_fro(round, phases.into_iter()) {
            say(format_args!("  {phase:?}, round {} of {ROUNDS}", round + 1));
            let mut sites = set_up(ways, cores, effort.rate, interrupt)?;
            phase.measure(&mut sites, effort, interrupt, report)?;
        }
    }
    Ok(())
}

/// Whether a way is the agent's, in a mode that has a bar.
fn is_agents(way: Way) -> bool {
    [Way::SHUNT_OFF, Way::SHUNT_BETWEEN, Way::SHUNT_PROXY].contains(&way.name())
}

/// Sets up the explicit proxy and these ways, and makes [`BEFORE`] connections of each. A way that
/// cannot be set up is left out; why is said where all of them are.
///
/// The explicit proxy is there twice: of two that are the same one may be slower than the other.
fn set_up(
    ways: &[Way],
    cores: Cores,
    rate: u32,
    interrupt: &Interrupt,
) -> Result<Vec<(Client, Site)>, Interrupted> {
    let mut started = Vec::new();
    for way in [Way::Explicit; 2].iter().chain(ways) {
        go_on(interrupt)?;
        if let Ok(site) = Site::start(*way, Kind::Minimal, cores) {
            make_many(client(&site, MANY), BEFORE);
            started.push((client(&site, rate), site));
        }
    }
    Ok(started)
}

/// What is on the machine beside the two explicit proxies, and nothing else.
#[derive(Clone, Copy, Debug)]
enum Phase {
    Rules,
    Agents,
}

impl Phase {
    /// The row of the way at `place`, the explicit proxies first. In turn one of these is
    /// [`SWITCHED`], or [`BESIDE`].
    fn row(self, place: usize, turn: usize, name: &'static str) -> Option<&'static str> {
        match (self, place) {
            (_, 2..) => Some(name),
            (Self::Rules, _) if place == turn % 2 => Some(SWITCHED),
            (Self::Rules, _) => Some(name),
            (Self::Agents, _) => (place == turn % 2).then_some(BESIDE),
        }
    }

    /// Its turns.
    fn measure(
        self,
        sites: &mut [(Client, Site)],
        effort: &Effort,
        interrupt: &Interrupt,
        report: &mut Report,
    ) -> Result<(), Interrupted> {
        let (programs, cgroup) = (EmptyPrograms::new(), Cgroup::new());
        for turn in 0..effort.turns / ROUNDS {
            let sites = sites.iter_mut().enumerate();
            let mut rows: Vec<_> = sites
                .map(|(place, (client, site))| {
                    let row = self.row(place, turn, site.name());
                    (row, client, Times::new())
                })
                .collect();
            let first = turn % rows.len();
            rows.rotate_left(first);
            take_turns(
                turn,
                effort,
                &mut rows,
                interrupt,
                |(row, client, calls)| {
                    let _hanging = match self {
                        Self::Rules => programs.attach(cgroup.path(), *row == Some(SWITCHED)),
                        Self::Agents => None,
                    };
                    let took: Latency = client.work(effort.connects.1);
                    calls.add(&took.calls);
                },
            )?;
            for (row, _, calls) in rows {
                if let Some(row) = row {
                    report.add(PHASES, CONNECT_CALL, row, calls.micro(0.5));
                }
            }
        }
        Ok(())
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

    #[test]
    fn the_explicit_proxies_change_roles() {
        let rows = |phase: Phase, turn| [0, 1, 2].map(|place| phase.row(place, turn, "own"));
        let (own, switched) = (Some("own"), Some(SWITCHED));
        assert_eq!(rows(Phase::Rules, 0), [switched, own, own]);
        assert_eq!(rows(Phase::Rules, 1), [own, switched, own]);
        assert_eq!(rows(Phase::Agents, 0), [Some(BESIDE), None, own]);
        assert_eq!(rows(Phase::Agents, 1), [None, Some(BESIDE), own]);
    }
}
