//! The interfaces of a namespace, and which of them the settings name.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result};
use futures_util::TryStreamExt as _;
use netlink_packet_route::{
    AddressFamily,
    address::{AddressHeaderFlags, AddressMessage, AddressScope},
    link::{LinkAttribute, LinkLayerType, LinkMessage},
};
use rtnetlink::Handle;
use shunt_abi::{Addr, INTERFACE_EXCLUDED, INTERFACE_VIRTUAL, Interface, LINK_HEADER_UNKNOWN};

use crate::settings::Settings;

/// An interface of a namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its name.
    pub name: String,
    /// How many bytes of its packets come before the IP header, if that is known.
    pub header: Option<u32>,
}

/// The interfaces, by index.
pub(super) async fn read(handle: &Handle) -> Result<BTreeMap<u32, Link>> {
    let messages: Vec<LinkMessage> = handle
        .link()
        .get()
        .execute()
        .try_collect()
        .await
        .context("cannot list the interfaces")?;
    Ok(messages.iter().filter_map(link).collect())
}

fn link(message: &LinkMessage) -> Option<(u32, Link)> {
    message.attributes.iter().find_map(|attribute| {
        if let LinkAttribute::IfName(name) = attribute {
            let link = Link {
                name: name.clone(),
                header: header(message.header.link_layer_type),
            };
            Some((message.header.index, link))
        } else {
            None
        }
    })
}

/// The length of the link layer's header: tap, veth and bridges have that of
/// Ethernet, tun has none.
fn header(kind: LinkLayerType) -> Option<u32> {
    if kind == LinkLayerType::Ether {
        Some(14)
    } else if kind == LinkLayerType::None {
        Some(0)
    } else {
        None
    }
}

/// The addresses that stand for an interface when something is redirected to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OwnAddresses {
    v4: Option<Addr>,
    v6: Option<Addr>,
}

/// The addresses that `REDIRECT` takes, by the index of the interface: the first
/// of each family, in the order of a dump. Of IPv6 one that reaches beyond the
/// link where there is one, and none that the kernel has not made sure of yet.
pub(super) fn own_addresses(messages: &[AddressMessage]) -> BTreeMap<u32, OwnAddresses> {
    let usable = |message: &&AddressMessage| {
        let unsure = AddressHeaderFlags::Tentative | AddressHeaderFlags::Dadfailed;
        !message.header.flags.intersects(unsure)
    };
    let beyond = |message: &&AddressMessage| message.header.scope != AddressScope::Link;
    let (first, then): (Vec<_>, Vec<_>) = messages.iter().filter(usable).partition(beyond);
    let mut own = BTreeMap::<u32, OwnAddresses>::new();
    for message in first.into_iter().chain(then) {
        let of = own.entry(message.header.index).or_default();
        let slot = if message.header.family == AddressFamily::Inet {
            &mut of.v4
        } else {
            &mut of.v6
        };
        *slot = slot.or_else(|| super::addresses::own(message).map(Addr::from_ip));
    }
    own
}

/// What the programs have to know of the interfaces that the settings name, by
/// index: the entries of the map `INTERFACES`.
pub type MarkedInterfaces = BTreeMap<u32, Interface>;

/// The indices of those that lead to virtual machines.
pub fn virtual_ones(interfaces: &MarkedInterfaces) -> BTreeSet<u32> {
    interfaces
        .iter()
        .filter(|(_, interface)| interface.flags & INTERFACE_VIRTUAL != 0)
        .map(|(index, _)| *index)
        .collect()
}

/// Finds the interfaces that the settings name.
pub(super) fn marks(
    interfaces: &BTreeMap<u32, Link>,
    own: &BTreeMap<u32, OwnAddresses>,
    settings: &Settings,
) -> MarkedInterfaces {
    let bit = |set: bool, bit| if set { bit } else { 0 };
    interfaces
        .iter()
        .map(|(&index, link)| {
            let name = &link.name;
            let flags = bit(
                settings.excluded_interfaces.contains(name),
                INTERFACE_EXCLUDED,
            ) | bit(
                settings.virtual_interfaces.contains(name),
                INTERFACE_VIRTUAL,
            );
            let own = own.get(&index).copied().unwrap_or_default();
            let interface = Interface {
                flags,
                link_header: link.header.unwrap_or(LINK_HEADER_UNKNOWN),
                v4: own.v4.unwrap_or_default(),
                v6: own.v6.unwrap_or_default(),
            };
            (index, interface)
        })
        .filter(|(_, interface)| interface.flags != 0)
        .collect()
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use netlink_packet_route::address::AddressAttribute;

    use super::*;
    use crate::settings::tests::settings;

    #[test]
    fn an_interface_has_an_index_and_a_name() {
        let mut message = LinkMessage::default();
        message.header.index = 7;
        message.attributes = vec![
            LinkAttribute::Mtu(1500),
            LinkAttribute::IfName("eth0".into()),
        ];
        message.header.link_layer_type = LinkLayerType::Ether;
        let eth0 = Link {
            name: "eth0".to_owned(),
            header: Some(14),
        };
        assert_eq!(link(&message), Some((7, eth0)));
        message.attributes.pop();
        assert_eq!(link(&message), None);
    }

    #[test]
    fn those_that_the_settings_name_are_marked() {
        let interfaces = BTreeMap::from([
            (1, named("lo")),
            (2, named("eth0")),
            (3, named("net1")),
            (4, named("k6t-eth0")),
            (5, named("tap1")),
        ]);
        let own = own_addresses(&[address(4, "10.0.2.1", AddressScope::Universe)]);
        let settings = settings("-c net1,tap1,absent0 -k k6t-+,tap1").expect("settings");
        let marked = |flags| Interface {
            flags,
            link_header: 14,
            ..Interface::default()
        };
        assert_eq!(
            marks(&interfaces, &own, &settings),
            BTreeMap::from([
                (3, marked(INTERFACE_EXCLUDED)),
                (
                    4,
                    Interface {
                        v4: Addr::from_ip([10, 0, 2, 1].into()),
                        ..marked(INTERFACE_VIRTUAL)
                    }
                ),
                (5, marked(INTERFACE_EXCLUDED | INTERFACE_VIRTUAL)),
            ])
        );
    }

    fn named(name: &str) -> Link {
        Link {
            name: name.to_owned(),
            header: Some(14),
        }
    }

    fn address(index: u32, ip: &str, scope: AddressScope) -> AddressMessage {
        let ip: IpAddr = ip.parse().expect("a literal");
        let mut message = AddressMessage::default();
        message.header.index = index;
        message.header.scope = scope;
        message.header.family = match ip {
            IpAddr::V4(_) => AddressFamily::Inet,
            IpAddr::V6(_) => AddressFamily::Inet6,
        };
        message.attributes = vec![AddressAttribute::Address(ip)];
        message
    }

    #[test]
    fn the_first_usable_address_of_each_family_stands_for_an_interface() {
        let mut unsure = address(3, "fd00::1", AddressScope::Universe);
        unsure.header.flags = AddressHeaderFlags::Tentative;
        let own = own_addresses(&[
            address(3, "10.0.0.1", AddressScope::Universe),
            address(3, "10.0.0.2", AddressScope::Universe),
            address(3, "fe80::1", AddressScope::Link),
            unsure,
            address(3, "fd00::2", AddressScope::Universe),
            address(4, "fe80::4", AddressScope::Link),
        ]);
        let addr = |ip: &str| Some(Addr::from_ip(ip.parse().expect("a literal")));
        assert_eq!(
            (own[&3].v4, own[&3].v6),
            (addr("10.0.0.1"), addr("fd00::2"))
        );
        assert_eq!((own[&4].v4, own[&4].v6), (None, addr("fe80::4")));
    }
}
