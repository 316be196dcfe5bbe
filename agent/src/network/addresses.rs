//! The addresses of a namespace.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use futures_util::TryStreamExt as _;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::Handle;
use shunt_abi::Addr;

use super::routes;

/// The addresses in the order of a dump of all families: IPv4 first, each family
/// by interface. That is how Go's `net.InterfaceAddrs` has them, from which
/// istio-iptables concludes whether the pod is one of IPv6.
pub(super) async fn read(handle: &Handle) -> Result<Vec<AddressMessage>> {
    handle
        .address()
        .get()
        .execute()
        .try_collect()
        .await
        .context("cannot list the addresses")
}

/// The index of lo, in every namespace (`LOOPBACK_IFINDEX`).
const LO: u32 = 1;

/// How long the kernel may take to make an address usable that was just added. Its thread waits
/// for a lock of the whole node (`rtnl_mutex`), which is held while namespaces of pods end.
const PATIENCE: Duration = Duration::from_secs(5);

/// Gives lo the address from which the proxy calls its application over IPv6.
pub(super) async fn add_proxy_source(handle: Handle) -> Result<()> {
    let source = Addr::SIX6.to_ip();
    handle
        .address()
        .add(LO, source, 128)
        .execute()
        .await
        .context("the kernel refuses the address")?;
    // Its route comes a moment later, from a thread of the kernel.
    let end = Instant::now() + PATIENCE;
    while !routes::is_delivered(&handle, source).await? {
        if Instant::now() > end {
            bail!("the kernel has added no route to the address within {PATIENCE:?}");
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(())
}

/// Undoes that.
pub(super) async fn remove_proxy_source(handle: Handle) -> Result<()> {
    let source = Addr::SIX6.to_ip();
    let is_it =
        |message: &AddressMessage| message.header.index == LO && own(message) == Some(source);
    let Some(message) = read(&handle).await?.into_iter().find(is_it) else {
        return Ok(());
    };
    handle
        .address()
        .del(message)
        .execute()
        .await
        .context("the kernel keeps the address")
}

/// The address itself: where an interface has a peer, `Address` is the peer's.
pub(super) fn own(message: &AddressMessage) -> Option<IpAddr> {
    let mut found = None;
    for attribute in &message.attributes {
        if let AddressAttribute::Local(own) = attribute {
            return Some(*own);
        }
        if let AddressAttribute::Address(ip) = attribute {
            found = Some(*ip);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(attributes: Vec<AddressAttribute>) -> AddressMessage {
        let mut message = AddressMessage::default();
        message.attributes = attributes;
        message
    }

    #[test]
    fn the_own_address_counts_and_not_the_peers() {
        let peer: IpAddr = [10, 0, 0, 2].into();
        let own: IpAddr = [10, 0, 0, 1].into();
        let both = [
            AddressAttribute::Address(peer),
            AddressAttribute::Local(own),
        ];
        assert_eq!(super::own(&message(both.to_vec())), Some(own));
    }

    #[test]
    fn ipv6_says_only_the_address() {
        let ip: IpAddr = "fd00::5".parse().expect("a literal");
        assert_eq!(own(&message(vec![AddressAttribute::Address(ip)])), Some(ip));
        assert_eq!(own(&message(Vec::new())), None);
    }
}
