//! What a namespace's routing says of each destination, as the programs need
//! it: does it stay in the pod, through which interface does it leave, with
//! which source address.
//!
//! The prefixes come from a dump of all routing tables. What each of them means
//! is asked of the kernel (`ip route get`), so that rules, metrics and source
//! address selection are the kernel's own.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use anyhow::{Context as _, Result};
use futures_util::TryStreamExt as _;
use ipnet::IpNet;
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use rtnetlink::{Handle, RouteMessageBuilder};
use shunt_abi::{
    Addr, NetnsCookie, ROUTE_KEY_BITS, ROUTE_LOCAL, ROUTE_UNREACHABLE, Route, RouteKey,
};

use crate::netns::Netns;

/// The routing table of a namespace: for each prefix what it comes to.
pub type RouteTable = BTreeMap<IpNet, Route>;

/// Reads the routing table of a namespace.
///
/// # Errors
///
/// When the kernel does not answer.
pub fn read(netns: &Netns) -> Result<RouteTable> {
    let table = netns.within(|| {
        // A runtime of its own: the socket belongs to the namespace in which it
        // is opened, and is closed before the thread ends.
        tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .context("cannot start a runtime")?
            .block_on(read_current())
    })?;
    table.with_context(|| {
        format!(
            "cannot read the routing table of {}",
            netns.path().display()
        )
    })
}

/// The key of a prefix in the trie, with its length there.
pub fn key(cookie: NetnsCookie, prefix: &IpNet) -> (u32, RouteKey) {
    (
        ROUTE_KEY_BITS + trie_bits(prefix),
        RouteKey::new(cookie, Addr::from_ip(prefix.network())),
    )
}

/// The length of a prefix when IPv4 is kept in its mapped form.
fn trie_bits(prefix: &IpNet) -> u32 {
    match prefix {
        IpNet::V4(v4) => 96 + u32::from(v4.prefix_len()),
        IpNet::V6(v6) => u32::from(v6.prefix_len()),
    }
}

async fn read_current() -> Result<RouteTable> {
    let (connection, handle, _messages) =
        rtnetlink::new_connection().context("cannot open a netlink socket")?;
    let connection = tokio::spawn(connection);
    let mut table = RouteTable::new();
    for route in dump(&handle).await? {
        let prefix = prefix(&route);
        let mut answer = ask(&handle, probe_of(&prefix)).await?;
        if answer.flags & ROUTE_LOCAL != 0 && !has_preferred_source(&route) {
            // The source is the destination itself, whichever of the prefix.
            answer.source = Addr::default();
        }
        table.insert(prefix, answer);
    }
    connection.abort();
    Ok(table)
}

/// The routes of all tables and both families that TCP can take.
async fn dump(handle: &Handle) -> Result<Vec<RouteMessage>> {
    let mut found = Vec::new();
    let requests = [
        RouteMessageBuilder::<Ipv4Addr>::new().build(),
        RouteMessageBuilder::<Ipv6Addr>::new().build(),
    ];
    for request in requests {
        let routes: Vec<RouteMessage> = handle
            .route()
            .get(request)
            .execute()
            .try_collect()
            .await
            .context("cannot list the routes")?;
        found.extend(routes.into_iter().filter(is_unicast));
    }
    Ok(found)
}

/// Whether an answer for this route names a source of the route's own choice.
fn has_preferred_source(route: &RouteMessage) -> bool {
    route
        .attributes
        .iter()
        .any(|attribute| matches!(attribute, RouteAttribute::PrefSource(_)))
}

/// Whether TCP can ever go there: broadcast and multicast routes are left out.
fn is_unicast(route: &RouteMessage) -> bool {
    !matches!(
        route.header.kind,
        RouteType::Broadcast | RouteType::Multicast | RouteType::Anycast
    )
}

/// The destination prefix; a default route has none.
fn prefix(route: &RouteMessage) -> IpNet {
    let length = route.header.destination_prefix_length;
    let address = route.attributes.iter().find_map(|attribute| {
        if let RouteAttribute::Destination(address) = attribute {
            ip(address)
        } else {
            None
        }
    });
    let address = address.unwrap_or_else(|| {
        if route.header.address_family == netlink_packet_route::AddressFamily::Inet {
            Ipv4Addr::UNSPECIFIED.into()
        } else {
            Ipv6Addr::UNSPECIFIED.into()
        }
    });
    // The kernel's lengths fit its addresses.
    IpNet::new(address, length).unwrap_or_else(|_too_long| address.into())
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    if let RouteAddress::Inet(v4) = address {
        Some((*v4).into())
    } else if let RouteAddress::Inet6(v6) = address {
        Some((*v6).into())
    } else {
        None
    }
}

/// An address that stands for a prefix. For a default route one that hardly
/// has a route of its own: from the ranges kept for documentation.
fn probe_of(prefix: &IpNet) -> IpAddr {
    match prefix {
        IpNet::V4(v4) if v4.prefix_len() == 0 => Ipv4Addr::new(192, 0, 2, 1).into(),
        IpNet::V6(v6) if v6.prefix_len() == 0 => {
            Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into()
        }
        IpNet::V4(v4) => v4.hosts().next().unwrap_or(v4.network()).into(),
        IpNet::V6(v6) => v6.hosts().next().unwrap_or(v6.network()).into(),
    }
}

/// Asks the kernel what it would do with a packet to `to`.
async fn ask(handle: &Handle, to: IpAddr) -> Result<Route> {
    let request = match to {
        IpAddr::V4(v4) => RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(v4, 32)
            .build(),
        IpAddr::V6(v6) => RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(v6, 128)
            .build(),
    };
    match handle.route().get(request).execute().try_next().await {
        Ok(Some(answer)) => Ok(meaning(&answer)),
        // ENETUNREACH, EHOSTUNREACH, EACCES, EINVAL: the kernel sends nothing there.
        Ok(None) | Err(rtnetlink::Error::NetlinkError(_)) => Ok(unreachable_route()),
        Err(error) => Err(error).with_context(|| format!("cannot ask for the route to {to}")),
    }
}

const fn unreachable_route() -> Route {
    Route {
        source: Addr { words: [0; 4] },
        ifindex: 0,
        flags: ROUTE_UNREACHABLE,
    }
}

/// What an answer of the kernel means to the programs.
fn meaning(answer: &RouteMessage) -> Route {
    let mut route = Route::default();
    if answer.header.kind == RouteType::Local {
        route.flags |= ROUTE_LOCAL;
    } else if answer.header.kind != RouteType::Unicast {
        return unreachable_route();
    }
    for attribute in &answer.attributes {
        if let RouteAttribute::PrefSource(source) = attribute {
            route.source = ip(source).map(Addr::from_ip).unwrap_or_default();
        } else if let RouteAttribute::Oif(index) = attribute {
            route.ifindex = *index;
        }
    }
    route
}
