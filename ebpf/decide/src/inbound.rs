use shunt_abi::{Addr, PodSettings, PortList, flags};

use crate::{Decision, Lists, Rule, Verdict, applies_to};

/// What is known of a TCP connection that arrives at the pod.
#[derive(Clone, Copy, Debug)]
pub struct Inbound {
    /// The address that it was sent to.
    pub destination: Addr,
    /// The port that it was sent to, host byte order.
    pub port: u16,
    /// It was sent from an address of the namespace itself.
    pub from_self: bool,
    /// It came in through an excluded interface (`-c`).
    pub interface_excluded: bool,
    /// It came in through a virtual interface (`-k`).
    pub interface_virtual: bool,
}

/// Decides over an inbound TCP connection: the order is that of the PREROUTING
/// chain, the first match wins.
#[inline(always)]
pub fn inbound(settings: &PodSettings, facts: &Inbound, lists: &impl Lists) -> Decision {
    if !applies_to(settings, &facts.destination) {
        return Decision::direct(Rule::InFamily);
    }
    if facts.from_self {
        return Decision::direct(Rule::InInside);
    }
    if facts.interface_excluded {
        return Decision::direct(Rule::InInterface);
    }
    if facts.interface_virtual {
        return Decision::to(Verdict::Outbound, Rule::InVirtual);
    }
    let spared = facts.port == settings.tunnel_port && !settings.has(flags::INBOUND_TUNNEL);
    if settings.has(flags::INBOUND_ALL) {
        if settings.has(flags::INBOUND_EXCLUDES) && lists.port(PortList::InboundExclude, facts.port)
        {
            return Decision::direct(Rule::InExcludedPort);
        }
        if spared {
            return Decision::direct(Rule::InTunnel);
        }
        return Decision::to(Verdict::Inbound, Rule::InAll);
    }
    if settings.has(flags::INBOUND_LISTED) {
        if spared {
            return Decision::direct(Rule::InTunnel);
        }
        if lists.port(PortList::InboundInclude, facts.port) {
            return Decision::to(Verdict::Inbound, Rule::InListed);
        }
        return Decision::direct(Rule::InUnlisted);
    }
    Decision::direct(Rule::InNone)
}
