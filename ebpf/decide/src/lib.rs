//! The redirection rules: facts in, verdict and reason out.
//!
//! [`outbound`] and [`inbound`] are what `cgroup/connect` and `sk_lookup` call
//! in the kernel and what `shunt explain` calls on the command line: one table,
//! read from top to bottom like the iptables chains that it stands for. Nothing
//! here reads memory that it was not given, so it runs and is tested anywhere.
//!
//! [`splice`] decides over one message between two sockets of the node.
//!
//! Lists of ports and of address ranges are asked for through [`Lists`], and
//! only when a rule needs them: in the kernel each question is a map lookup.
#![no_std]
#![forbid(unsafe_code)]

mod inbound;
mod outbound;
mod rule;
mod splice;

// The tests in tests/ use these; the lint asks the empty unit test, too.
#[cfg(test)]
use {ipnet as _, proptest as _, shunt_istio_rules as _};

pub use inbound::{Inbound, inbound};
pub use outbound::{Outbound, is_proxy, may_capture, outbound};
pub use rule::{Direction, Rule, Verdict};
use shunt_abi::{Addr, CidrList, PodSettings, PortList};
pub use splice::{Message, Way, least_mode, most_offered, offers_too_much, splice};

/// The pod's lists.
pub trait Lists {
    /// Whether `port` (host byte order) is in the list.
    fn port(&self, list: PortList, port: u16) -> bool;
    /// Whether a range of the list holds `addr`.
    fn cidr(&self, list: CidrList, addr: &Addr) -> bool;
}

/// A transport protocol, as far as the rules tell them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP
    Tcp,
    /// UDP
    Udp,
}

/// A verdict and the rule that gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Where the connection goes.
    pub verdict: Verdict,
    /// Which rule says so.
    pub rule: Rule,
}

impl Decision {
    #[inline(always)]
    const fn direct(rule: Rule) -> Self {
        Self {
            verdict: Verdict::Direct,
            rule,
        }
    }

    #[inline(always)]
    const fn to(verdict: Verdict, rule: Rule) -> Self {
        Self { verdict, rule }
    }
}

/// Whether the pod's settings speak of the family of `addr` at all.
#[inline(always)]
const fn applies_to(settings: &PodSettings, addr: &Addr) -> bool {
    if addr.is_v4() {
        settings.has(shunt_abi::flags::IPV4)
    } else {
        settings.has(shunt_abi::flags::IPV6)
    }
}
