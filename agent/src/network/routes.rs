//! What a namespace's routing says of each destination, as the programs need
//! it: does it stay in the pod, through which interface does it leave, with
//! which source address.
//!
//! The prefixes come from a dump of all routing tables of both families. What
//! each of them means is asked of the kernel (`ip route get`) for one address
//! that no longer prefix holds, so that rules, metrics and source address
//! selection are the kernel's own. Where there is more than one answer to a
//! prefix it is that for this address:
//!
//! - of a multipath route, the hop that the kernel's hash picks;
//! - of `fe80::/64`, which every interface has, the interface that the kernel
//!   takes when a socket names none. A pod with one interface has no other;
//! - rules by mark, user or source are asked about without any.
//!
//! TCP reaches no broadcast and no multicast address, whatever the tables say.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use anyhow::{Context as _, Result};
use futures_util::TryStreamExt as _;
use ipnet::{IpAdd as _, IpNet, Ipv4Net, Ipv6Net};
use netlink_packet_route::{
    AddressFamily,
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteType},
};
use rtnetlink::{Handle, RouteMessageBuilder};
use shunt_abi::{
    Addr, NetnsCookie, ROUTE_KEY_BITS, ROUTE_LOCAL, ROUTE_UNREACHABLE, Route, RouteKey,
};

/// The routing of a namespace: for each prefix what it comes to.
pub type RouteTable = BTreeMap<IpNet, Route>;

/// The index of `lo` in every namespace (`LOOPBACK_IFINDEX`).
const LOOPBACK: u32 = 1;

const UNREACHABLE: Route = Route {
    source: Addr { words: [0; 4] },
    ifindex: 0,
    flags: ROUTE_UNREACHABLE,
};

/// `0.0.0.0/0`
const EVERY_IPV4: IpNet = IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0));

/// `224.0.0.0/4` and `255.255.255.255`, for which no table has a route. Those of
/// IPv6, and the broadcast addresses of each subnet, are in the tables.
const BEYOND_TCP: [IpNet; 2] = [
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(224, 0, 0, 0), 4)),
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::BROADCAST, 32)),
];

/// The unique local addresses of IPv6: towards them the kernel prefers a source
/// of their kind, even where they share a route with others (RFC 6724).
const UNIQUE_LOCAL: IpNet = IpNet::V6(Ipv6Net::new_assert(
    Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0),
    7,
));

/// The key of a prefix in the trie `ROUTES`, with its length there.
pub fn route_key(cookie: NetnsCookie, prefix: &IpNet) -> (u32, RouteKey) {
    // IPv4 is kept in its mapped form.
    let bits = match prefix {
        IpNet::V4(v4) => 96 + u32::from(v4.prefix_len()),
        IpNet::V6(v6) => u32::from(v6.prefix_len()),
    };
    let key = RouteKey::new(cookie, Addr::from_ip(prefix.network()));
    (ROUTE_KEY_BITS + bits, key)
}

/// Reads the routing of the namespace that `handle` belongs to.
pub(super) async fn read(handle: &Handle) -> Result<RouteTable> {
    let prefixes = prefixes(&dump(handle).await?);
    let mut table = RouteTable::new();
    for prefix in &prefixes {
        if let Some(probe) = representative(prefix, &prefixes) {
            table.insert(*prefix, ask(handle, probe).await?);
        }
    }
    table.extend(BEYOND_TCP.map(|prefix| (prefix, UNREACHABLE)));
    // In the trie IPv4 is a part of IPv6: without a route of its own an IPv4
    // destination would find IPv6's default route.
    table.entry(EVERY_IPV4).or_insert(UNREACHABLE);
    Ok(table)
}

/// The routes of all tables and both families.
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
        found.extend(routes);
    }
    Ok(found)
}

/// The prefixes to ask about, each once, ascending.
fn prefixes(routes: &[RouteMessage]) -> Vec<IpNet> {
    let mut prefixes: Vec<IpNet> = routes.iter().map(prefix).collect();
    if prefixes.iter().any(|prefix| prefix.contains(&UNIQUE_LOCAL)) {
        prefixes.push(UNIQUE_LOCAL);
    }
    prefixes.sort_unstable();
    prefixes.dedup();
    prefixes
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
        if route.header.address_family == AddressFamily::Inet {
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

/// An address of `prefix` that none of the others inside it holds: the trie
/// answers for it with this prefix. None when the others hold all of it, so that
/// nobody will ever ask.
fn representative(prefix: &IpNet, all: &[IpNet]) -> Option<IpAddr> {
    let inside: Vec<&IpNet> = all
        .iter()
        .filter(|other| *other != prefix && prefix.contains(*other))
        .collect();
    let (first, again) = first_addresses(prefix);
    outside(first, prefix, &inside).or_else(|| outside(again?, prefix, &inside))
}

/// Where to start to look. Of a default route from what is kept for
/// documentation and hardly has a route of its own, and if all that follows has,
/// from the beginning.
fn first_addresses(prefix: &IpNet) -> (IpAddr, Option<IpAddr>) {
    match prefix {
        IpNet::V4(v4) if v4.prefix_len() == 0 => (
            Ipv4Addr::new(192, 0, 2, 1).into(),
            Some(Ipv4Addr::new(1, 0, 0, 1).into()),
        ),
        IpNet::V6(v6) if v6.prefix_len() == 0 => {
            let documentation = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
            (documentation.into(), None)
        }
        IpNet::V4(v4) => (v4.hosts().next().unwrap_or(v4.network()).into(), None),
        // The first address of a subnet stands for any of its routers.
        IpNet::V6(v6) if v6.prefix_len() < 127 => (v6.network().saturating_add(1).into(), None),
        IpNet::V6(v6) => (v6.network().into(), None),
    }
}

/// The first address from `candidate` on that is in `prefix` and in none of
/// those `inside` it.
fn outside(mut candidate: IpAddr, prefix: &IpNet, inside: &[&IpNet]) -> Option<IpAddr> {
    while let Some(holder) = inside.iter().find(|other| other.contains(&candidate)) {
        let last = holder.broadcast();
        candidate = match last {
            IpAddr::V4(v4) => v4.saturating_add(1).into(),
            IpAddr::V6(v6) => v6.saturating_add(1).into(),
        };
        if candidate == last || !prefix.contains(&candidate) {
            return None;
        }
    }
    Some(candidate)
}

/// Asks the kernel what it would do with a packet to `to`.
async fn ask(handle: &Handle, to: IpAddr) -> Result<Route> {
    let answer = look_up(handle, to).await?;
    Ok(answer.map_or(UNREACHABLE, |answer| meaning(to, &answer)))
}

/// Whether the kernel takes packets to `to` in, which it does not yet when it
/// sends them through lo.
pub(super) async fn is_delivered(handle: &Handle, to: IpAddr) -> Result<bool> {
    let answer = look_up(handle, to).await?;
    Ok(answer.is_some_and(|answer| answer.header.kind == RouteType::Local))
}

/// The route to `to`, if there is one.
async fn look_up(handle: &Handle, to: IpAddr) -> Result<Option<RouteMessage>> {
    let request = match to {
        IpAddr::V4(v4) => RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(v4, 32)
            .build(),
        IpAddr::V6(v6) => RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(v6, 128)
            .build(),
    };
    match handle.route().get(request).execute().try_next().await {
        Ok(answer) => Ok(answer),
        // ENETUNREACH, EHOSTUNREACH, EACCES, EINVAL: the kernel sends nothing there.
        Err(rtnetlink::Error::NetlinkError(_)) => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot ask for the route to {to}")),
    }
}

/// What the kernel's answer for `to` means to the programs.
fn meaning(to: IpAddr, answer: &RouteMessage) -> Route {
    let mut route = Route::default();
    for attribute in &answer.attributes {
        if let RouteAttribute::PrefSource(source) = attribute {
            route.source = ip(source).map(Addr::from_ip).unwrap_or_default();
        } else if let RouteAttribute::Oif(index) = attribute {
            route.ifindex = *index;
        }
    }
    let kind = answer.header.kind;
    let remote = kind == RouteType::Unicast;
    // The anycast addresses of a namespace are its own as well.
    if !remote && !matches!(kind, RouteType::Local | RouteType::Anycast) {
        return UNREACHABLE;
    }
    // What iptables calls "routed to lo" is all that leaves through lo.
    if !remote || route.ifindex == LOOPBACK {
        route.flags |= ROUTE_LOCAL;
        if route.source.same(&Addr::from_ip(to)) {
            // The source is the destination itself, whichever of the prefix.
            route.source = Addr::default();
        }
    }
    route
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().expect("a literal")
    }

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| net(text)).collect()
    }

    fn probe(prefix: &str, all: &[&str]) -> Option<String> {
        representative(&net(prefix), &nets(all)).map(|ip| ip.to_string())
    }

    fn address(text: &str) -> RouteAddress {
        match text.parse().expect("a literal") {
            IpAddr::V4(v4) => RouteAddress::Inet(v4),
            IpAddr::V6(v6) => RouteAddress::Inet6(v6),
        }
    }

    fn message(kind: RouteType, attributes: Vec<RouteAttribute>) -> RouteMessage {
        let mut message = RouteMessage::default();
        message.header.kind = kind;
        message.attributes = attributes;
        message
    }

    /// What an answer of this kind for `to` comes to.
    fn meant(to: &str, kind: RouteType, device: u32, source: &str) -> Route {
        let attributes = vec![
            RouteAttribute::Oif(device),
            RouteAttribute::PrefSource(address(source)),
        ];
        meaning(to.parse().expect("a literal"), &message(kind, attributes))
    }

    fn addr(text: &str) -> Addr {
        Addr::from_ip(text.parse().expect("a literal"))
    }

    #[test]
    fn a_prefix_is_the_destination_of_its_route() {
        let mut route = message(
            RouteType::Unicast,
            vec![RouteAttribute::Destination(address("10.1.0.0"))],
        );
        route.header.destination_prefix_length = 16;
        assert_eq!(prefix(&route), net("10.1.0.0/16"));
        let mut default = RouteMessage::default();
        default.header.address_family = AddressFamily::Inet6;
        assert_eq!(prefix(&default), net("::/0"));
        default.header.address_family = AddressFamily::Inet;
        assert_eq!(prefix(&default), net("0.0.0.0/0"));
    }

    #[test]
    fn a_prefix_of_several_tables_is_asked_about_once() {
        let v4 = || {
            let mut route = RouteMessage::default();
            route.header.address_family = AddressFamily::Inet;
            route
        };
        assert_eq!(prefixes(&[v4(), v4()]), nets(&["0.0.0.0/0"]));
    }

    #[test]
    fn unique_local_destinations_are_asked_about_where_they_share_a_route() {
        let mut default = RouteMessage::default();
        default.header.address_family = AddressFamily::Inet6;
        assert_eq!(prefixes(&[default]), nets(&["::/0", "fc00::/7"]));
        assert!(prefixes(&[]).is_empty());
    }

    #[test]
    fn a_representative_is_in_no_longer_prefix() {
        assert_eq!(probe("10.0.0.0/8", &[]), Some("10.0.0.1".into()));
        assert_eq!(
            probe("10.0.0.0/8", &["10.0.0.0/8", "10.0.0.0/24", "10.0.1.0/32"]),
            Some("10.0.1.1".into())
        );
        assert_eq!(
            probe("127.0.0.0/8", &["127.0.0.1/32", "0.0.0.0/0"]),
            Some("127.0.0.2".into())
        );
        assert_eq!(
            probe("10.0.0.4/32", &["10.0.0.0/8"]),
            Some("10.0.0.4".into())
        );
        assert_eq!(probe("fe80::/64", &["fe80::/128"]), Some("fe80::1".into()));
        assert_eq!(probe("fd00::9/128", &[]), Some("fd00::9".into()));
    }

    #[test]
    fn a_default_route_is_asked_about_where_hardly_anybody_has_a_route() {
        assert_eq!(probe("0.0.0.0/0", &[]), Some("192.0.2.1".into()));
        assert_eq!(probe("::/0", &[]), Some("2001:db8::1".into()));
        assert_eq!(probe("0.0.0.0/0", &["128.0.0.0/1"]), Some("1.0.0.1".into()));
        assert_eq!(probe("::/0", &["2000::/3"]), Some("4000::".into()));
    }

    #[test]
    fn what_longer_prefixes_hold_altogether_is_not_asked_about() {
        assert_eq!(probe("0.0.0.0/0", &["0.0.0.0/1", "128.0.0.0/1"]), None);
        assert_eq!(probe("::/0", &["::/1", "8000::/1"]), None);
        assert_eq!(
            probe(
                "10.0.0.0/31",
                &["10.0.0.0/32", "10.0.0.1/32", "10.0.0.2/32"]
            ),
            None
        );
    }

    #[test]
    fn a_remote_destination_has_an_interface_and_a_source() {
        assert_eq!(
            meant("192.0.2.1", RouteType::Unicast, 2, "10.0.0.5"),
            Route {
                source: addr("10.0.0.5"),
                ifindex: 2,
                flags: 0
            }
        );
    }

    #[test]
    fn an_own_address_is_local_and_its_own_source() {
        assert_eq!(
            meant("10.0.0.5", RouteType::Local, 1, "10.0.0.5"),
            Route {
                source: Addr::default(),
                ifindex: 1,
                flags: ROUTE_LOCAL
            }
        );
        let loopback = meant("127.0.0.2", RouteType::Local, 1, "127.0.0.1");
        assert_eq!(loopback.source, addr("127.0.0.1"));
    }

    #[test]
    fn what_leaves_through_lo_is_local() {
        assert_eq!(
            meant("10.9.0.1", RouteType::Unicast, 1, "10.0.0.5").flags,
            ROUTE_LOCAL
        );
        assert_eq!(
            meant("fd00::", RouteType::Anycast, 1, "fd00::5").flags,
            ROUTE_LOCAL
        );
    }

    #[test]
    fn nothing_else_is_reachable() {
        for kind in [
            RouteType::Broadcast,
            RouteType::Multicast,
            RouteType::BlackHole,
            RouteType::Unreachable,
            RouteType::Prohibit,
        ] {
            assert_eq!(meant("10.0.0.255", kind, 2, "10.0.0.5"), UNREACHABLE);
        }
    }

    #[test]
    fn ipv4_stands_in_the_trie_where_it_is_mapped() {
        let (bits, key) = route_key(9, &net("10.1.2.3/8"));
        assert_eq!(bits, 64 + 96 + 8);
        assert_eq!(key, RouteKey::new(9, addr("10.0.0.0")));
        assert_eq!(route_key(9, &net("fd00::/16")).0, 64 + 16);
    }
}
