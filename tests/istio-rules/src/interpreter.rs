//! From the text of a `nat` table to what becomes of a packet.
//!
//! It knows the matches and targets that the rules of a sidecar use, with the
//! kernel's meaning, and refuses everything else: a rule that is not understood
//! must never be passed over.

mod parser;

use std::collections::BTreeMap;

use ipnet::IpNet;
pub use parser::ParseError;

use crate::{Family, Hook, Outcome, Owner, Packet, Protocol};

/// A `nat` table.
#[derive(Clone, Debug)]
pub struct Table {
    family: Family,
    chains: BTreeMap<String, Vec<Rule>>,
}

#[derive(Clone, Debug)]
struct Rule {
    matches: Vec<Match>,
    target: Target,
}

#[derive(Clone, Debug)]
struct Match {
    negated: bool,
    what: What,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum What {
    Protocol(Protocol),
    Source(IpNet),
    Destination(IpNet),
    /// `-i`
    Incoming(String),
    /// `-o`
    Outgoing(String),
    Ports(Vec<u16>),
    Uid(u32),
    Gid(u32),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Target {
    Jump(String),
    Return,
    Accept,
    Redirect(u16),
}

impl Table {
    /// Reads the output of `iptables-save` (or `ip6tables-save`): one `nat`
    /// table.
    ///
    /// # Errors
    ///
    /// What is not understood, and what the kernel would refuse: a jump to a
    /// chain that is not there, a loop, an owner match for packets that have no
    /// socket yet. The error names the line.
    pub fn parse(family: Family, text: &str) -> Result<Self, ParseError> {
        parser::table(family, text)
    }

    /// What becomes of `packet`. A packet of the other family passes by.
    pub fn decide(&self, packet: &Packet) -> Outcome {
        if Family::of(packet.destination) != self.family {
            return Outcome::Accept;
        }
        let chain = match packet.hook {
            Hook::Output { .. } => "OUTPUT",
            Hook::Prerouting { .. } => "PREROUTING",
        };
        self.run(chain, packet).unwrap_or(Outcome::Accept)
    }

    /// What the rules of a chain say, `None` when its end or a RETURN is
    /// reached: the chain that jumped here goes on.
    fn run(&self, chain: &str, packet: &Packet) -> Option<Outcome> {
        for rule in self.chains.get(chain)? {
            if !rule.matches.iter().all(|m| m.holds(packet)) {
                continue;
            }
            match &rule.target {
                Target::Return => return None,
                Target::Accept => return Some(Outcome::Accept),
                Target::Redirect(port) => return Some(Outcome::Redirect(*port)),
                Target::Jump(to) => {
                    let outcome = self.run(to, packet);
                    if outcome.is_some() {
                        return outcome;
                    }
                }
            }
        }
        None
    }
}

impl Match {
    fn holds(&self, packet: &Packet) -> bool {
        let (incoming, outgoing, owner) = match &packet.hook {
            Hook::Output { interface, owner } => ("", interface.as_str(), *owner),
            Hook::Prerouting { interface } => (interface.as_str(), "", None),
        };
        let holds = match &self.what {
            What::Protocol(protocol) => packet.protocol == *protocol,
            What::Source(net) => net.contains(&packet.source),
            What::Destination(net) => net.contains(&packet.destination),
            What::Incoming(name) => incoming == name,
            What::Outgoing(name) => outgoing == name,
            What::Ports(ports) => ports.contains(&packet.port),
            // Without an owner nothing matches, and every negation does: the
            // kernel compares what was asked for with what was inverted.
            What::Uid(uid) => owner.is_some_and(|Owner { uid: own, .. }| own == *uid),
            What::Gid(gid) => owner.is_some_and(|Owner { gid: own, .. }| own == *gid),
        };
        holds != self.negated
    }
}

#[cfg(test)]
mod tests;
