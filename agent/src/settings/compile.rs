use std::{
    collections::{BTreeMap, HashSet},
    net::{IpAddr, Ipv6Addr},
};

use ipnet::{IpNet, Ipv6Net};
use shunt_abi::{
    Addr, CidrKey, CidrList, LIST_KEY_BITS, PodSettings, PortChunk, PortChunkKey, PortList, flags,
};

use super::{Capture, OwnerGroups, PortSet, Settings};

/// What of an enrolment is not in its settings.
pub struct Enrolment<'a> {
    /// The number of the lists in the maps; see [`PodSettings::list_set`].
    pub list_set: u32,
    /// The nameservers of the pod's resolv.conf.
    pub resolvers: &'a [IpAddr],
    /// Which address families the rules speak of.
    pub families: Families,
    /// From a uid or gid as the pod numbers it to the node's number. Where the
    /// node has none, it must not answer with
    /// [`NO_OWNER`](shunt_abi::NO_OWNER), which unknown owners have.
    pub node_id: &'a dyn Fn(u32) -> u32,
}

/// Which address families the rules speak of; the others pass untouched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Families {
    /// IPv4, and IPv4-mapped IPv6.
    pub v4: bool,
    /// IPv6.
    pub v6: bool,
}

impl Families {
    /// What Istio concludes from the addresses of a pod, in the order in which
    /// its interfaces have them: IPv4 always, IPv6 when the first global
    /// address is of IPv6, or, with dual stack, when any is.
    pub fn of(addresses: &[IpAddr], dual_stack: bool) -> Self {
        let mut global = addresses.iter().map(IpAddr::to_canonical).filter(is_global);
        let v6 = if dual_stack {
            global.any(|ip| ip.is_ipv6())
        } else {
            global.next().is_some_and(|ip| ip.is_ipv6())
        };
        Self { v4: true, v6 }
    }
}

/// Neither loopback nor link-local, as Istio tells them apart.
fn is_global(ip: &IpAddr) -> bool {
    let link_local = match ip {
        IpAddr::V4(v4) => {
            let [first, second, third, _] = v4.octets();
            v4.is_link_local() || (first, second, third) == (224, 0, 0)
        }
        IpAddr::V6(v6) => v6.is_unicast_link_local() || v6.segments()[0] & 0xff0f == 0xff02,
    };
    !ip.is_loopback() && !link_local
}

/// The settings of a pod as the BPF maps hold them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiled {
    /// The value of the map `PODS`.
    pub pod: PodSettings,
    /// The entries of the map `PORTS`.
    pub ports: Vec<(PortChunkKey, PortChunk)>,
    /// The entries of the trie `CIDRS`, each key once: the prefix length in
    /// bits, [`LIST_KEY_BITS`] included, and the key.
    pub cidrs: Vec<(u32, CidrKey)>,
}

/// Turns settings into what the programs look up.
pub fn compile(settings: &Settings, enrolment: &Enrolment<'_>) -> Compiled {
    let mut lists = ListBuilder {
        list_set: enrolment.list_set,
        ports: Vec::new(),
        cidrs: Vec::new(),
        seen: HashSet::new(),
    };
    let flags = [
        lists.inbound(settings),
        lists.outbound(settings),
        lists.dns(settings, enrolment.resolvers),
        families(enrolment.families),
    ]
    .into_iter()
    .fold(0, |all, some| all | some);
    let mut pod = PodSettings {
        list_set: enrolment.list_set,
        flags,
        outbound_port: settings.outbound_port,
        inbound_port: settings.inbound_port,
        tunnel_port: settings.tunnel_port,
        dns_port: settings.dns_port,
        hairpin: settings.hairpin as u32,
        loopback4: u32::from_ne_bytes(settings.loopback.network().octets()),
        loopback4_mask: u32::from_ne_bytes(settings.loopback.netmask().octets()),
        ..PodSettings::empty()
    };
    owners(&mut pod, settings, enrolment.node_id);
    Compiled {
        pod,
        ports: lists.ports,
        cidrs: lists.cidrs,
    }
}

fn families(families: Families) -> u32 {
    bit(families.v4, flags::IPV4) | bit(families.v6, flags::IPV6)
}

const fn bit(set: bool, flag: u32) -> u32 {
    if set { flag } else { 0 }
}

fn owners(pod: &mut PodSettings, settings: &Settings, node_id: &dyn Fn(u32) -> u32) {
    pod.uid_count = fill(&mut pod.uids, settings.proxy_uids.as_slice(), node_id);
    pod.gid_count = fill(&mut pod.gids, settings.proxy_gids.as_slice(), node_id);
    let (flag, groups) = match &settings.owner_groups {
        OwnerGroups::All => return,
        OwnerGroups::Only(groups) => (flags::GROUPS_INCLUDE, groups),
        OwnerGroups::Except(groups) => (flags::GROUPS_EXCLUDE, groups),
    };
    pod.flags |= flag;
    pod.group_count = fill(&mut pod.groups, groups.as_slice(), node_id);
}

/// Writes the ids to the front of `slots` and returns how many they are; a list
/// of ids is never longer than its slots.
fn fill(slots: &mut [u32], ids: &[u32], node_id: &dyn Fn(u32) -> u32) -> u32 {
    slots
        .iter_mut()
        .zip(ids)
        .map(|(slot, &id)| *slot = node_id(id))
        .fold(0, |count, ()| count + 1)
}

/// Collects the entries of both list maps. Its methods return the flags that
/// belong to the lists they added.
struct ListBuilder {
    list_set: u32,
    ports: Vec<(PortChunkKey, PortChunk)>,
    cidrs: Vec<(u32, CidrKey)>,
    seen: HashSet<(u32, CidrKey)>,
}

impl ListBuilder {
    fn inbound(&mut self, settings: &Settings) -> u32 {
        let captured = match &settings.inbound_include {
            Capture::All => {
                let excluded = &settings.inbound_exclude;
                flags::INBOUND_ALL
                    | self.ports(PortList::InboundExclude, excluded, flags::INBOUND_EXCLUDES)
            }
            Capture::Listed(ports) => {
                self.ports(PortList::InboundInclude, ports, flags::INBOUND_LISTED)
            }
        };
        captured | bit(settings.tunnel_inbound, flags::INBOUND_TUNNEL)
    }

    fn outbound(&mut self, settings: &Settings) -> u32 {
        let captured = match &settings.outbound_include {
            Capture::All => flags::OUTBOUND_ALL,
            Capture::Listed(cidrs) => {
                let loopback = cidrs.iter().any(|cidr| cidr.addr().is_loopback());
                self.cidrs(CidrList::OutboundInclude, cidrs, flags::OUTBOUND_CIDRS)
                    | bit(loopback, flags::OUTBOUND_CIDRS_LOOPBACK)
            }
        };
        captured
            | self.cidrs(
                CidrList::OutboundExclude,
                &settings.outbound_exclude,
                flags::EXCLUDE_CIDRS,
            )
            | self.ports(
                PortList::OutboundInclude,
                &settings.outbound_ports_include,
                flags::INCLUDE_PORTS,
            )
            | self.ports(
                PortList::OutboundExclude,
                &settings.outbound_ports_exclude,
                flags::EXCLUDE_PORTS,
            )
    }

    /// Without a resolver there is no DNS to capture, and Istio then leaves out
    /// every rule that DNS capture brings.
    fn dns(&mut self, settings: &Settings, resolvers: &[IpAddr]) -> u32 {
        match (settings.redirect_dns, settings.capture_all_dns) {
            (false, _) => 0,
            (true, true) => flags::DNS | flags::DNS_ALL,
            (true, false) => {
                let cidrs: Vec<_> = resolvers
                    .iter()
                    .map(|ip| IpNet::from(ip.to_canonical()))
                    .collect();
                self.cidrs(CidrList::Resolvers, &cidrs, flags::DNS)
            }
        }
    }

    /// Adds a list of ports; `flag` if it is not empty.
    fn ports(&mut self, list: PortList, ports: &PortSet, flag: u32) -> u32 {
        let mut chunks = BTreeMap::new();
        for port in ports.iter() {
            let key = PortChunkKey::of(self.list_set, list, port);
            let (_, chunk) = chunks.entry(key.chunk).or_insert((key, PortChunk::EMPTY));
            chunk.insert(port);
        }
        self.ports.extend(chunks.into_values());
        bit(!ports.is_empty(), flag)
    }

    /// Adds a list of ranges; `flag` if it is not empty.
    fn cidrs(&mut self, list: CidrList, cidrs: &[IpNet], flag: u32) -> u32 {
        for cidr in cidrs {
            match cidr {
                IpNet::V4(v4) => {
                    let addr = Addr::from_ipv4(v4.network());
                    self.range(list, 96 + u32::from(v4.prefix_len()), addr);
                }
                IpNet::V6(v6) => {
                    for piece in without_mapped(v6.trunc()) {
                        let addr = Addr::from_ip(piece.network().into());
                        self.range(list, piece.prefix_len().into(), addr);
                    }
                }
            }
        }
        bit(!cidrs.is_empty(), flag)
    }

    /// Adds the range of the first `length` bits of `addr`.
    fn range(&mut self, list: CidrList, length: u32, addr: Addr) {
        let key = CidrKey {
            list_set: self.list_set,
            list: list as u32,
            addr,
        };
        let entry = (LIST_KEY_BITS + length, key);
        if self.seen.insert(entry) {
            self.cidrs.push(entry);
        }
    }
}

/// `net` without the IPv4-mapped addresses. The trie keeps IPv4 there, and a
/// range of IPv6 such as `::/0` must not speak of IPv4: ip6tables would not.
///
/// Where the mapped addresses are inside `net`, what remains are the siblings
/// of every node on the way from `net` down to them.
fn without_mapped(net: Ipv6Net) -> Vec<Ipv6Net> {
    const MAPPED: u128 = 0xffff << 32;
    const MAPPED_LENGTH: u8 = 96;
    if net.prefix_len() > MAPPED_LENGTH || !net.contains(&Ipv6Addr::from_bits(MAPPED)) {
        return vec![net];
    }
    (net.prefix_len()..MAPPED_LENGTH)
        .filter_map(|depth| {
            let sibling = Ipv6Addr::from_bits(MAPPED ^ 1 << (127 - depth));
            Ipv6Net::new(sibling, depth + 1).ok()
        })
        .map(|sibling| sibling.trunc())
        .collect()
}
