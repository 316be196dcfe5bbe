use std::collections::{BTreeMap, HashMap, HashSet};

use shunt_abi::{Addr, CidrKey, CidrList, LIST_KEY_BITS, PortChunk, PortChunkKey, PortList};
use shunt_decide::Lists;

use super::Compiled;

/// The lists of a pod, looked up on the host by the very entries that the
/// kernel gets: what `shunt explain` and the tests ask.
#[derive(Clone, Debug)]
pub struct HostLists {
    list_set: u32,
    ports: HashMap<PortChunkKey, PortChunk>,
    /// By prefix length, because there are few of them and many keys.
    cidrs: BTreeMap<u32, HashSet<CidrKey>>,
}

impl From<&Compiled> for HostLists {
    fn from(compiled: &Compiled) -> Self {
        let mut cidrs: BTreeMap<u32, HashSet<CidrKey>> = BTreeMap::new();
        for &(length, key) in &compiled.cidrs {
            cidrs.entry(length).or_default().insert(key);
        }
        Self {
            list_set: compiled.pod.list_set,
            ports: compiled.ports.iter().copied().collect(),
            cidrs,
        }
    }
}

impl Lists for HostLists {
    fn port(&self, list: PortList, port: u16) -> bool {
        self.ports
            .get(&PortChunkKey::of(self.list_set, list, port))
            .is_some_and(|chunk| chunk.contains(port))
    }

    fn cidr(&self, list: CidrList, addr: &Addr) -> bool {
        self.cidrs.iter().any(|(&length, keys)| {
            keys.contains(&CidrKey {
                list_set: self.list_set,
                list: list as u32,
                addr: first_bits(addr, length - LIST_KEY_BITS),
            })
        })
    }
}

/// `addr` with all but its first `length` bits cleared.
fn first_bits(addr: &Addr, length: u32) -> Addr {
    let mut masked = *addr;
    for (word, before) in masked.words.iter_mut().zip((0..).step_by(32)) {
        let kept = length.saturating_sub(before).min(32);
        let mask = u32::MAX.checked_shl(32 - kept).unwrap_or(0);
        *word &= mask.to_be();
    }
    masked
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    use ipnet::{IpNet, Ipv4Net, Ipv6Net};
    use proptest::prelude::*;

    use super::*;
    use crate::{
        settings::{Capture, Enrolment, Families, PortSet, Settings, compile},
        userns::IdMaps,
    };

    fn lists(settings: &Settings) -> HostLists {
        HostLists::from(&compile(
            settings,
            &Enrolment {
                list_set: 3,
                resolvers: &[],
                families: Families { v4: true, v6: true },
                ids: &IdMaps::same(),
                splice: shunt_abi::SpliceMode::Off,
            },
        ))
    }

    /// Addresses that are near each other, so that ranges hold some of them.
    fn v4() -> impl Strategy<Value = Ipv4Addr> {
        (
            prop_oneof![Just(0), Just(0x0a00_0000), any::<u32>()],
            0..32_u8,
            any::<bool>(),
        )
            .prop_map(|(base, bit, flip)| Ipv4Addr::from_bits(base ^ u32::from(flip) << bit))
    }

    fn v6() -> impl Strategy<Value = Ipv6Addr> {
        const BASES: [u128; 4] = [0, 0xffff << 32, 0xffff_0a00_0000, 0xfd00 << 112];
        (
            proptest::sample::select(&BASES[..]),
            0..128_u8,
            any::<bool>(),
        )
            .prop_map(|(base, bit, flip)| Ipv6Addr::from_bits(base ^ u128::from(flip) << bit))
    }

    fn net() -> impl Strategy<Value = IpNet> {
        let v4 = (v4(), 0..=32_u8).prop_map(|(ip, n)| Ipv4Net::new_assert(ip, n).into());
        let v6 = (v6(), 0..=128_u8).prop_map(|(ip, n)| Ipv6Net::new_assert(ip, n).into());
        // Through the parser, which turns mapped ranges into those of IPv4.
        prop_oneof![v4, v6].prop_map(|net: IpNet| {
            super::super::values::cidr(&net.to_string()).expect("a range as it is written")
        })
    }

    proptest! {
        #[test]
        fn an_address_is_listed_when_a_range_of_its_family_holds_it(
            nets in prop::collection::vec(net(), 0..6),
            ips in prop::collection::vec(
                prop_oneof![v4().prop_map(IpAddr::V4), v6().prop_map(IpAddr::V6)], 1..20),
        ) {
            let settings = Settings { outbound_exclude: nets.clone(), ..Settings::default() };
            let lists = lists(&settings);
            for ip in ips {
                let ip = ip.to_canonical();
                let held = nets.iter().any(|net| net.contains(&ip));
                let addr = Addr::from_ip(ip);
                prop_assert_eq!(lists.cidr(CidrList::OutboundExclude, &addr), held, "{}", ip);
                prop_assert!(!lists.cidr(CidrList::OutboundInclude, &addr));
            }
        }

        #[test]
        fn a_port_is_listed_when_it_is_in_the_set(
            ports in prop::collection::btree_set(1..=u16::MAX, 0..40),
            others in prop::collection::vec(any::<u16>(), 0..40),
        ) {
            let settings = Settings {
                inbound_include: Capture::Listed(PortSet::from_iter(ports.clone())),
                ..Settings::default()
            };
            let lists = lists(&settings);
            for port in ports.iter().copied().chain(others) {
                prop_assert_eq!(lists.port(PortList::InboundInclude, port), ports.contains(&port));
                prop_assert!(!lists.port(PortList::InboundExclude, port));
            }
        }
    }
}
