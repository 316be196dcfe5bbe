//! The interfaces of a namespace, and which of them the settings name.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use futures_util::TryStreamExt as _;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use rtnetlink::Handle;
use shunt_abi::{INTERFACE_EXCLUDED, INTERFACE_VIRTUAL};

use crate::settings::Settings;

/// The names of the interfaces, by index.
pub(super) async fn read(handle: &Handle) -> Result<BTreeMap<u32, String>> {
    let messages: Vec<LinkMessage> = handle
        .link()
        .get()
        .execute()
        .try_collect()
        .await
        .context("cannot list the interfaces")?;
    Ok(messages.iter().filter_map(named).collect())
}

fn named(message: &LinkMessage) -> Option<(u32, String)> {
    message.attributes.iter().find_map(|attribute| {
        if let LinkAttribute::IfName(name) = attribute {
            Some((message.header.index, name.clone()))
        } else {
            None
        }
    })
}

/// The interfaces that the settings name, with their `INTERFACE_…` bits.
pub(super) fn marks(interfaces: &BTreeMap<u32, String>, settings: &Settings) -> BTreeMap<u32, u32> {
    let bit = |set: bool, bit| if set { bit } else { 0 };
    interfaces
        .iter()
        .map(|(&index, name)| {
            let bits = bit(
                settings.excluded_interfaces.contains(name),
                INTERFACE_EXCLUDED,
            ) | bit(
                settings.virtual_interfaces.contains(name),
                INTERFACE_VIRTUAL,
            );
            (index, bits)
        })
        .filter(|(_, bits)| *bits != 0)
        .collect()
}

#[cfg(test)]
mod tests {
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
        assert_eq!(named(&message), Some((7, "eth0".to_owned())));
        message.attributes.pop();
        assert_eq!(named(&message), None);
    }

    #[test]
    fn those_that_the_settings_name_are_marked() {
        let interfaces = BTreeMap::from([
            (1, "lo".to_owned()),
            (2, "eth0".to_owned()),
            (3, "net1".to_owned()),
            (4, "k6t-eth0".to_owned()),
            (5, "tap1".to_owned()),
        ]);
        let settings = settings("-c net1,tap1,absent0 -k k6t-+,tap1").expect("settings");
        assert_eq!(
            marks(&interfaces, &settings),
            BTreeMap::from([
                (3, INTERFACE_EXCLUDED),
                (4, INTERFACE_VIRTUAL),
                (5, INTERFACE_EXCLUDED | INTERFACE_VIRTUAL),
            ])
        );
    }
}
