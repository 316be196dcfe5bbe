use std::{
    collections::{BTreeMap, HashSet},
    net::{IpAddr, Ipv6Addr},
};

use ipnet::{IpNet, Ipv6Net};
use shunt_abi::{
    Addr, CidrKey, CidrList, LIST_KEY_BITS, PodSettings, PortChunk, PortChunkKey, PortList,
    SpliceMode, flags,
};

use super::{Capture, OwnerGroups, PortSet, Settings};
use crate::userns::{IdMap, IdMaps};

/// What of an enrolment is not in its settings.
pub struct Enrolment<'a> {
    /// The number of the lists in the maps; see [`PodSettings::list_set`].
    pub list_set: u32,
    /// The nameservers of the pod's resolv.conf.
    pub resolvers: &'a [IpAddr],
    /// Which address families the rules speak of.
    pub families: Families,
    /// How the pod's uids and gids are numbered on the node.
    pub ids: &'a IdMaps,
    /// How far the node splices.
    pub splice: SpliceMode,
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

    /// As bits of [`PodSettings::flags`].
    const fn flags(self) -> u32 {
        bit(self.v4, flags::IPV4) | bit(self.v6, flags::IPV6)
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

impl Compiled {
    /// The settings for a pod that has other addresses now.
    pub fn with_families(&self, families: Families) -> PodSettings {
        let others = self.pod.flags & !(flags::IPV4 | flags::IPV6);
        PodSettings {
            flags: others | families.flags(),
            ..self.pod
        }
    }
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
        interfaces(settings),
        enrolment.families.flags(),
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
        splice: settings.splice.within(enrolment.splice) as u32,
        loopback4: u32::from_ne_bytes(settings.loopback.network().octets()),
        loopback4_mask: u32::from_ne_bytes(settings.loopback.netmask().octets()),
        ..PodSettings::empty()
    };
    owners(&mut pod, settings, enrolment.ids);
    Compiled {
        pod,
        ports: lists.ports,
        cidrs: lists.cidrs,
    }
}

/// Set whether the pod has an interface of such a name or not: it may get one.
fn interfaces(settings: &Settings) -> u32 {
    let none = settings.excluded_interfaces.is_empty() && settings.virtual_interfaces.is_empty();
    bit(!none, flags::INTERFACES)
}

const fn bit(set: bool, flag: u32) -> u32 {
    if set { flag } else { 0 }
}

fn owners(pod: &mut PodSettings, settings: &Settings, ids: &IdMaps) {
    pod.uid_count = fill(&mut pod.uids, settings.proxy_uids.as_slice(), &ids.uids);
    pod.gid_count = fill(&mut pod.gids, settings.proxy_gids.as_slice(), &ids.gids);
    let (flag, groups) = match &settings.owner_groups {
        OwnerGroups::All => return,
        OwnerGroups::Only(groups) => (flags::GROUPS_INCLUDE, groups),
        OwnerGroups::Except(groups) => (flags::GROUPS_EXCLUDE, groups),
    };
    pod.flags |= flag;
    pod.group_count = fill(&mut pod.groups, groups.as_slice(), &ids.gids);
}

/// Writes the ids to the front of `slots` and returns how many they are; a list
/// of ids is never longer than its slots.
fn fill(slots: &mut [u32], ids: &[u32], map: &IdMap) -> u32 {
    slots
        .iter_mut()
        .zip(ids)
        .map(|(slot, &id)| *slot = map.on_node(id))
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

#[cfg(test)]
mod tests {
    use shunt_abi::{CidrKey, Hairpin};

    use super::*;
    use crate::settings::tests::settings;

    fn map(text: &str) -> IdMap {
        IdMap::parse(text).expect("a map of ids")
    }

    fn compiled(args: &str, resolvers: &[&str]) -> Compiled {
        let resolvers: Vec<IpAddr> = resolvers
            .iter()
            .map(|ip| ip.parse().expect("a literal"))
            .collect();
        let enrolment = Enrolment {
            list_set: 7,
            resolvers: &resolvers,
            families: Families {
                v4: true,
                v6: false,
            },
            ids: &IdMaps {
                uids: map("0 100000 65536"),
                gids: map("0 200000 10"),
            },
            splice: SpliceMode::Proxy,
        };
        compile(&settings(args).expect(args), &enrolment)
    }

    #[test]
    fn every_setting_sets_its_flag_and_no_other() {
        let rows = [
            ("", 0),
            ("-b '*'", flags::INBOUND_ALL),
            ("-b 80", flags::INBOUND_LISTED),
            ("-b '*' -d 22", flags::INBOUND_ALL | flags::INBOUND_EXCLUDES),
            ("-b 80 -d 22", flags::INBOUND_LISTED),
            ("-d 22", 0),
            ("--tunnel-inbound", flags::INBOUND_TUNNEL),
            ("-i '*'", flags::OUTBOUND_ALL),
            ("-i 10.0.0.0/8", flags::OUTBOUND_CIDRS),
            ("-i 0.0.0.0/0", flags::OUTBOUND_CIDRS),
            (
                "-i 127.1.0.0/16",
                flags::OUTBOUND_CIDRS | flags::OUTBOUND_CIDRS_LOOPBACK,
            ),
            (
                "-i 10.0.0.0/8,::1",
                flags::OUTBOUND_CIDRS | flags::OUTBOUND_CIDRS_LOOPBACK,
            ),
            ("-x 127.0.0.0/8", flags::EXCLUDE_CIDRS),
            ("-q 80", flags::INCLUDE_PORTS),
            ("-o 80", flags::EXCLUDE_PORTS),
            ("-c eth1", flags::INTERFACES),
            ("-k tap+", flags::INTERFACES),
            ("--outbound-owner-groups 5", flags::GROUPS_INCLUDE),
            ("--outbound-owner-groups-exclude 5", flags::GROUPS_EXCLUDE),
            ("--redirect-dns", flags::DNS),
            (
                "--redirect-dns --capture-all-dns",
                flags::DNS | flags::DNS_ALL,
            ),
            ("--capture-all-dns", 0),
        ];
        for (args, expected) in rows {
            let found = compiled(args, &["10.96.0.10"]).pod.flags;
            assert_eq!(found, expected | flags::IPV4, "{args}");
        }
    }

    #[test]
    fn families_can_change_by_themselves() {
        let compiled = compiled("-q 80", &[]);
        let both = compiled.with_families(Families { v4: true, v6: true });
        assert_eq!(both.flags, compiled.pod.flags | flags::IPV6);
        let same = compiled.with_families(Families {
            v4: true,
            v6: false,
        });
        assert_eq!(same, compiled.pod);
    }

    #[test]
    fn numbers_arrive_where_the_programs_look_for_them() {
        let pod = compiled(
            "-p 1 -z 2 -e 3 --dns-port 4 -u 5,6 -g 7 --outbound-owner-groups 8,9,10 \
             --outbound-ipv4-loopback-cidr 127.0.9.9/16 --legacy-hairpin",
            &[],
        )
        .pod;
        assert_eq!(
            (pod.list_set, pod.outbound_port, pod.inbound_port),
            (7, 1, 2)
        );
        assert_eq!((pod.tunnel_port, pod.dns_port), (3, 4));
        assert_eq!(
            (pod.uid_count, pod.uids[..3].to_vec()),
            (2, vec![100_005, 100_006, shunt_abi::NOBODY])
        );
        assert_eq!(
            (pod.gid_count, pod.gids[..2].to_vec()),
            (1, vec![200_007, shunt_abi::NOBODY])
        );
        assert_eq!((pod.group_count, pod.groups[1]), (3, 200_009));
        assert_eq!(pod.loopback4.to_ne_bytes(), [127, 0, 0, 0]);
        assert_eq!(pod.loopback4_mask.to_ne_bytes(), [255, 255, 0, 0]);
        assert_eq!(Hairpin::try_from(pod.hairpin), Ok(Hairpin::Legacy));
    }

    #[test]
    fn the_way_to_splice_is_the_lesser_of_two() {
        let splice = |args| compiled(args, &[]).pod.splice;
        assert_eq!(splice(""), SpliceMode::Proxy as u32);
        assert_eq!(splice("--splice all"), SpliceMode::Proxy as u32);
        assert_eq!(splice("--splice off"), SpliceMode::Off as u32);
        assert_eq!(splice("--mesh linkerd"), SpliceMode::Off as u32);
    }

    #[test]
    fn a_range_is_masked_and_kept_once_with_its_prefix_length() {
        let key = |list: CidrList, ip: &str| CidrKey {
            list_set: 7,
            list: list as u32,
            addr: Addr::from_ip(ip.parse().expect("a literal")),
        };
        let args = "-i 10.1.2.3/8,10.0.0.0/8,10.9.9.9,::ffff:10.9.9.9 -x fd00::9/16,10.0.0.0/8";
        assert_eq!(
            compiled(args, &[]).cidrs,
            [
                (64 + 96 + 8, key(CidrList::OutboundInclude, "10.0.0.0")),
                (64 + 128, key(CidrList::OutboundInclude, "10.9.9.9")),
                (64 + 16, key(CidrList::OutboundExclude, "fd00::")),
                (64 + 96 + 8, key(CidrList::OutboundExclude, "10.0.0.0")),
            ]
        );
    }

    #[test]
    fn resolvers_are_listed_only_when_somebody_asks_for_them() {
        let resolvers = ["10.96.0.10", "fd00::a"];
        assert_eq!(compiled("--redirect-dns", &resolvers).cidrs.len(), 2);
        assert!(compiled("", &resolvers).cidrs.is_empty());
        let all = compiled("--redirect-dns --capture-all-dns", &resolvers);
        assert!(all.cidrs.is_empty());
    }

    #[test]
    fn without_a_resolver_there_is_no_dns_capture() {
        assert_eq!(compiled("--redirect-dns", &[]).pod.flags, flags::IPV4);
    }

    #[test]
    fn lists_may_be_as_long_as_they_get() {
        let cidrs: Vec<String> = (0..10_000)
            .map(|i| format!("10.{}.{}.0/24", i / 256, i % 256))
            .collect();
        let args = format!("-b 1-65535 -o 1-65535 -i {} -q 80", cidrs.join(","));
        let compiled = compiled(&args, &[]);
        assert_eq!(compiled.cidrs.len(), 10_000);
        assert_eq!(compiled.ports.len(), 16 + 16 + 1);
    }

    #[test]
    fn the_families_are_those_that_istio_concludes() {
        let families = |addresses: &[&str], dual_stack| {
            let ips: Vec<IpAddr> = addresses
                .iter()
                .map(|ip| ip.parse().expect("a literal"))
                .collect();
            Families::of(&ips, dual_stack).v6
        };
        assert!(!families(&["127.0.0.1", "::1", "10.1.1.5"], false));
        assert!(!families(&["10.1.1.5", "fd00::5"], false));
        assert!(families(&["10.1.1.5", "fd00::5"], true));
        assert!(families(
            &["127.0.0.1", "::1", "fe80::1", "fd00::5", "10.1.1.5"],
            false
        ));
        assert!(!families(&["10.1.1.5", "fe80::1", "::1"], true));
        assert!(!families(&["::ffff:10.1.1.5"], true));
        assert!(!families(&[], true));
    }
}
