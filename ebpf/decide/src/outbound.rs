use shunt_abi::{Addr, CidrList, Hairpin, MAX_OWNERS, PodSettings, PortList, flags};

use crate::{Decision, Lists, Protocol, Rule, Verdict, applies_to};

/// The port of DNS.
const DNS_PORT: u16 = 53;

/// What is known of a connection that leaves a socket of the pod.
#[derive(Clone, Copy, Debug)]
pub struct Outbound {
    /// Its protocol.
    pub protocol: Protocol,
    /// The source address that it has, or would get from the routing table.
    pub source: Addr,
    /// The destination that the application asked for, never unspecified: the
    /// kernel takes `0.0.0.0` for the source or for loopback.
    pub destination: Addr,
    /// The destination port, host byte order.
    pub port: u16,
    /// The file system uid of whoever opened the socket, as the node numbers
    /// it, [`NO_OWNER`](shunt_abi::NO_OWNER) where nobody did.
    pub uid: u32,
    /// The file system gid, likewise.
    pub gid: u32,
    /// The destination is an address of the namespace itself ("routed to lo").
    pub to_self: bool,
    /// It leaves through an excluded interface (`-c`).
    pub interface_excluded: bool,
}

/// Whether any rule can capture this at all: of UDP only DNS ever is. What
/// cannot be captured need not be decided.
#[inline(always)]
pub const fn may_capture(settings: &PodSettings, protocol: Protocol, port: u16) -> bool {
    match protocol {
        Protocol::Tcp => true,
        Protocol::Udp => settings.has(flags::DNS) && port == DNS_PORT,
    }
}

/// Decides over an outbound connection or datagram: the order is that of the
/// OUTPUT chain, the first match wins.
#[inline(always)]
pub fn outbound(settings: &PodSettings, facts: &Outbound, lists: &impl Lists) -> Decision {
    let asks = Asks {
        settings,
        facts,
        lists,
    };
    if !applies_to(settings, &facts.destination) {
        return Decision::direct(Rule::OutFamily);
    }
    if facts.interface_excluded {
        return Decision::direct(Rule::OutInterface);
    }
    if settings.has(flags::EXCLUDE_PORTS) && lists.port(PortList::OutboundExclude, facts.port) {
        return Decision::direct(Rule::OutExcludedPort);
    }
    if let Some(decision) = asks.owner() {
        return decision;
    }
    if asks.group_left_out() {
        return Decision::direct(Rule::OutGroup);
    }
    if asks.captured_dns() {
        return Decision::to(Verdict::Dns, Rule::OutDns);
    }
    if asks.to_loopback() {
        return Decision::direct(Rule::OutLoopback);
    }
    if settings.has(flags::EXCLUDE_CIDRS)
        && lists.cidr(CidrList::OutboundExclude, &facts.destination)
    {
        return Decision::direct(Rule::OutExcludedCidr);
    }
    asks.captured()
}

/// The questions of the rules that take more than a word.
struct Asks<'a, L> {
    settings: &'a PodSettings,
    facts: &'a Outbound,
    lists: &'a L,
}

impl<L: Lists> Asks<'_, L> {
    /// Rules 3 to 5: who owns the socket, and does it stay in the pod.
    #[inline(always)]
    fn owner(&self) -> Option<Decision> {
        let facts = self.facts;
        match Hairpin::try_from(self.settings.hairpin) {
            Ok(Hairpin::Legacy) => {
                if self.is_tcp() && facts.to_self && !self.to_loopback() {
                    return Some(Decision::to(Verdict::Outbound, Rule::OutLegacyHairpin));
                }
            }
            Ok(Hairpin::None) => {
                if facts.to_self {
                    return Some(Decision::direct(Rule::OutLocalNotUid));
                }
            }
            Ok(Hairpin::Spared | Hairpin::Tunnel) | Err(_) => {
                if facts.to_self
                    && (facts.source.same(&Addr::SIX4) || facts.source.same(&Addr::SIX6))
                {
                    return Some(Decision::direct(Rule::OutSix));
                }
            }
        }
        self.owned(
            facts.uid,
            self.settings.uid_count,
            &self.settings.uids,
            &UID_RULES,
        )
        .or_else(|| {
            self.owned(
                facts.gid,
                self.settings.gid_count,
                &self.settings.gids,
                &GID_RULES,
            )
        })
    }

    /// Rules a, b and c for each of the proxy's uids or gids in turn. Rule b
    /// decides at the first of them for everybody else, so only where it does
    /// not apply the others are asked for rule a.
    #[inline(always)]
    fn owned(
        &self,
        id: u32,
        count: u32,
        ids: &[u32; MAX_OWNERS],
        rules: &OwnerRules,
    ) -> Option<Decision> {
        if count == 0 {
            return None;
        }
        let hairpin = Hairpin::try_from(self.settings.hairpin);
        let owns = contains(ids, id);
        if self.facts.to_self && !matches!(hairpin, Ok(Hairpin::Legacy | Hairpin::None)) {
            if self.stays_direct() && ids[0] != id {
                return Some(Decision::direct(rules.local));
            }
            if owns && self.hairpins(rules) {
                return Some(Decision::to(Verdict::Inbound, rules.hairpin));
            }
        }
        owns.then(|| Decision::direct(rules.owned))
    }

    /// The condition of rule a, the owner apart.
    #[inline(always)]
    fn hairpins(&self, rules: &OwnerRules) -> bool {
        let port = self.facts.port;
        let tunnel =
            self.settings.hairpin == Hairpin::Spared as u32 && port == self.settings.tunnel_port;
        let dns = rules.spares_dns && self.settings.has(flags::DNS) && port == DNS_PORT;
        self.is_tcp() && !self.to_loopback() && !tunnel && !dns
    }

    /// The condition of rule b, the owner apart.
    #[inline(always)]
    fn stays_direct(&self) -> bool {
        if self.settings.has(flags::OUTBOUND_CIDRS_LOOPBACK) {
            return false;
        }
        !self.settings.has(flags::DNS) || (self.is_tcp() && self.facts.port != DNS_PORT)
    }

    /// Rule 6.
    #[inline(always)]
    fn group_left_out(&self) -> bool {
        let includes = self.settings.has(flags::GROUPS_INCLUDE);
        if !includes && !self.settings.has(flags::GROUPS_EXCLUDE) {
            return false;
        }
        let listed = contains(&self.settings.groups, self.facts.gid);
        listed != includes
    }

    /// Rule 7.
    #[inline(always)]
    fn captured_dns(&self) -> bool {
        self.settings.has(flags::DNS)
            && self.facts.port == DNS_PORT
            && (self.settings.has(flags::DNS_ALL)
                || self
                    .lists
                    .cidr(CidrList::Resolvers, &self.facts.destination))
    }

    /// Rule 8.
    #[inline(always)]
    fn to_loopback(&self) -> bool {
        let to = &self.facts.destination;
        if to.is_v4() {
            to.v4() & self.settings.loopback4_mask == self.settings.loopback4
        } else {
            to.same(&Addr::LOOPBACK6)
        }
    }

    /// Rules 10 to 12.
    #[inline(always)]
    fn captured(&self) -> Decision {
        let settings = self.settings;
        if !self.is_tcp() {
            return Decision::direct(Rule::OutRest);
        }
        if settings.has(flags::INCLUDE_PORTS)
            && self.lists.port(PortList::OutboundInclude, self.facts.port)
        {
            return Decision::to(Verdict::Outbound, Rule::OutIncludedPort);
        }
        if settings.has(flags::OUTBOUND_ALL)
            || (settings.has(flags::OUTBOUND_CIDRS)
                && self
                    .lists
                    .cidr(CidrList::OutboundInclude, &self.facts.destination))
        {
            return Decision::to(Verdict::Outbound, Rule::OutIncludedCidr);
        }
        Decision::direct(Rule::OutRest)
    }

    #[inline(always)]
    fn is_tcp(&self) -> bool {
        matches!(self.facts.protocol, Protocol::Tcp)
    }
}

/// Whether `id` is among `ids`, without a branch: with one for each id the
/// verifier follows every way through them.
#[inline(always)]
fn contains<const N: usize>(ids: &[u32; N], id: u32) -> bool {
    let found = ids.iter().fold(0, |found, other| {
        // Of a 32-bit number less one the top bit of 64 is set for 0 alone.
        found | (u64::from(id ^ other).wrapping_sub(1) >> 63)
    });
    found != 0
}

/// Whether the proxy owns a socket of this uid or gid, as the rules have it.
#[inline(always)]
pub fn is_proxy(settings: &PodSettings, uid: u32, gid: u32) -> bool {
    contains(&settings.uids, uid) || contains(&settings.gids, gid)
}

/// How rules 4 and 5 differ.
struct OwnerRules {
    hairpin: Rule,
    local: Rule,
    owned: Rule,
    /// With DNS capture rule 4a spares port 53; rule 5a does not.
    spares_dns: bool,
}

const UID_RULES: OwnerRules = OwnerRules {
    hairpin: Rule::OutUidHairpin,
    local: Rule::OutLocalNotUid,
    owned: Rule::OutUid,
    spares_dns: true,
};

const GID_RULES: OwnerRules = OwnerRules {
    hairpin: Rule::OutGidHairpin,
    local: Rule::OutLocalNotGid,
    owned: Rule::OutGid,
    spares_dns: false,
};
