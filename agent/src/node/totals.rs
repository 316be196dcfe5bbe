//! What was counted on the whole node since the agent started.

use anyhow::Result;
use shunt_abi::Counters;

use super::Node;

/// Sums over all pods, with those that are gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Totals {
    /// How many namespaces are enrolled.
    pub pods: usize,
    /// What the programs counted since the agent started.
    pub counted: Counters,
    /// How many enrolments were done, those that replaced settings among them.
    pub enrolled: u64,
    /// How many enrolments failed.
    pub failed: u64,
    /// How full the maps are that the agent writes.
    pub maps: Vec<MapFill>,
}

/// How full a map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapFill {
    /// Its name.
    pub map: &'static str,
    /// The entries of what is in force. What was replaced stays for a second more.
    pub entries: usize,
    /// How many it takes.
    pub limit: u32,
}

/// What outlives the pods: sums must not go down when one goes.
pub(super) struct Tally {
    /// What pods that are gone have counted, less what pods had counted before this
    /// agent enrolled them. Modulo 2⁶⁴: with what the pods have now it is the sum
    /// since the agent started.
    settled: Counters,
    enrolled: u64,
    failed: u64,
}

impl Default for Tally {
    fn default() -> Self {
        Self {
            settled: Counters::ZERO,
            enrolled: 0,
            failed: 0,
        }
    }
}

impl Tally {
    /// A pod comes, with counters that may be older than this agent.
    pub(super) fn comes(&mut self, counted: &Counters) {
        self.settled = self.settled.minus(counted);
    }

    /// A pod goes, and its counters with it.
    pub(super) fn goes(&mut self, counted: &Counters) {
        self.settled = self.settled.plus(counted);
    }

    /// An enrolment was done, or not.
    pub(super) fn enrolment(&mut self, done: &Result<()>) {
        match done {
            Ok(()) => self.enrolled += 1,
            Err(_) => self.failed += 1,
        }
    }

    /// The sum since the agent started, with what the pods that are there have.
    fn sum(&self, there: impl Iterator<Item = Counters>) -> Counters {
        there.fold(self.settled, |total, pod| total.plus(&pod))
    }
}

impl Node {
    pub(super) fn totals(&self) -> Totals {
        let there = self.enrolled.keys();
        Totals {
            pods: self.enrolled.len(),
            counted: self
                .tally
                .sum(there.map(|cookie| self.pods.counted(*cookie))),
            enrolled: self.tally.enrolled,
            failed: self.tally.failed,
            maps: self.fill(),
        }
    }

    fn fill(&self) -> Vec<MapFill> {
        let mut entries = [
            ("PODS", self.enrolled.len()),
            ("PORTS", 0),
            ("CIDRS", 0),
            ("ROUTES", 0),
            ("INTERFACES", 0),
        ];
        let [_, ports, cidrs, routes, interfaces] = &mut entries;
        for pod in self.enrolled.values() {
            ports.1 += pod.version.compiled.ports.len();
            cidrs.1 += pod.version.compiled.cidrs.len();
            routes.1 += pod.routes.len();
            interfaces.1 += pod.version.interfaces.len();
        }
        entries
            .map(|(map, entries)| MapFill {
                map,
                entries,
                limit: self.pods.limit(map),
            })
            .into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(first_rule: u64) -> Counters {
        let mut counters = Counters::ZERO;
        counters.by_rule[0] = first_rule;
        counters
    }

    #[test]
    fn a_pod_that_goes_takes_nothing_from_the_sum() {
        let mut tally = Tally::default();
        tally.comes(&Counters::ZERO);
        tally.comes(&Counters::ZERO);
        let both = [counted(5), counted(7)];
        assert_eq!(tally.sum(both.into_iter()).by_rule[0], 12);
        tally.goes(&counted(5));
        assert_eq!(tally.sum([counted(8)].into_iter()).by_rule[0], 13);
    }

    /// The sum starts at zero with the agent: whoever reads it must not take what a
    /// former agent has told already for new.
    #[test]
    fn what_a_former_agent_counted_is_not_counted_again() {
        let mut tally = Tally::default();
        tally.comes(&counted(100));
        assert_eq!(tally.sum([counted(100)].into_iter()).by_rule[0], 0);
        assert_eq!(tally.sum([counted(103)].into_iter()).by_rule[0], 3);
        tally.goes(&counted(104));
        assert_eq!(tally.sum(std::iter::empty()).by_rule[0], 4);
    }

    #[test]
    fn enrolments_are_counted_by_how_they_end() {
        let mut tally = Tally::default();
        tally.enrolment(&Ok(()));
        tally.enrolment(&Err(anyhow::anyhow!("no")));
        tally.enrolment(&Ok(()));
        assert_eq!((tally.enrolled, tally.failed), (2, 1));
    }
}
