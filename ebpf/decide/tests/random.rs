//! Random packets and pods, near to what the rules tell apart.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net};
use proptest::{
    collection::vec,
    prelude::{Just, Strategy, any},
    prop_oneof,
    sample::{select, subsequence},
};
use shunt_abi::Hairpin;
use shunt_istio_rules::{Capture, Dns, Groups, Hook, Owner, Packet, Protocol, Rules};

use crate::support::Pod;

const PORTS: [u16; 16] = [
    22, 53, 80, 443, 4140, 8080, 15001, 15002, 15006, 15008, 15009, 15020, 15021, 15053, 15090,
    65535,
];
const IDS: [u32; 7] = [0, 7, 1000, 1337, 1338, 2102, 5678];
const ADDRESSES: [&str; 12] = [
    "10.244.1.5",
    "127.0.0.1",
    "127.0.0.2",
    "127.0.0.6",
    "127.9.9.9",
    "0.0.0.0",
    "10.96.0.10",
    "10.42.7.7",
    "172.16.9.9",
    "198.51.100.3",
    "198.51.100.77",
    "203.0.113.7",
];
const ADDRESSES6: [&str; 6] = [
    "fd00:244::5",
    "::1",
    "::6",
    "fd00:96::a",
    "2001:db8::7",
    "2001:db8:1::7",
];
const RANGES: [&str; 14] = [
    "0.0.0.0/0",
    "127.0.0.0/8",
    "127.0.0.1/32",
    "10.0.0.0/8",
    "10.244.1.5/32",
    "10.96.0.10/16",
    "198.51.100.0/24",
    "198.51.100.0/28",
    "203.0.113.7/32",
    "::/0",
    "::1/128",
    "fd00::/8",
    "2001:db8::/32",
    "2001:db8:1::/48",
];
const LOOPBACKS: [&str; 4] = [
    "127.0.0.1/32",
    "127.0.0.0/8",
    "127.0.0.0/24",
    "127.0.0.9/30",
];

/// A packet that leaves the pod or comes to it.
pub(crate) fn packet() -> impl Strategy<Value = Packet> {
    let hook = prop_oneof![
        3 => output(),
        1 => select(vec!["eth0", "eth1", "net1", "net2"])
            .prop_map(|name| Hook::Prerouting { interface: name.to_owned() }),
    ];
    (hook, protocol(), addresses(), port()).prop_map(
        |(hook, protocol, (source, destination), port)| Packet {
            // The redirection speaks of TCP alone where it comes from outside.
            protocol: match hook {
                Hook::Prerouting { .. } => Protocol::Tcp,
                Hook::Output { .. } => protocol,
            },
            hook,
            source,
            destination,
            port,
        },
    )
}

/// The destination does not say whether a packet stays in the pod: any address
/// may be one of the pod's own.
fn output() -> impl Strategy<Value = Hook> {
    let interface = prop_oneof![3 => Just("lo"), 3 => select(vec!["eth0", "eth1", "net1"])];
    let owner = prop_oneof![
        1 => Just(None),
        6 => (id(), id()).prop_map(|(uid, gid)| Some(Owner { uid, gid })),
    ];
    (interface, owner).prop_map(|(interface, owner)| Hook::Output {
        interface: interface.to_owned(),
        owner,
    })
}

fn protocol() -> impl Strategy<Value = Protocol> {
    prop_oneof![2 => Just(Protocol::Tcp), 1 => Just(Protocol::Udp)]
}

/// Source and destination, of one family.
fn addresses() -> impl Strategy<Value = (IpAddr, IpAddr)> {
    prop_oneof![
        3 => (address4(), address4()),
        1 => (address6(), address6()),
    ]
}

fn address4() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        8 => select(ADDRESSES.map(address).to_vec()),
        1 => any::<Ipv4Addr>().prop_map(IpAddr::from),
    ]
}

/// No IPv4-mapped address: a packet with one would be an IPv4 packet.
fn address6() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        8 => select(ADDRESSES6.map(address).to_vec()),
        1 => any::<u128>().prop_map(|bits| Ipv6Addr::from(bits | 1 << 127).into()),
    ]
}

fn port() -> impl Strategy<Value = u16> {
    prop_oneof![8 => select(PORTS.to_vec()), 1 => any::<u16>()]
}

/// Any id but the last one, which is nobody's.
fn id() -> impl Strategy<Value = u32> {
    prop_oneof![8 => select(IDS.to_vec()), 1 => 0..u32::MAX]
}

/// A pod with any settings.
///
/// Left out is where Istio's rules are narrower than the contract; see
/// `settings::istio_knows_less_of_virtual_interfaces`.
pub(crate) fn pod() -> impl Strategy<Value = Pod> {
    (proxy(), inbound(), outbound(), any::<bool>()).prop_map(|(proxy, inbound, outbound, ipv6)| {
        let interfaces_virtual = match outbound.outbound_ranges {
            Capture::All => inbound.interfaces_virtual,
            Capture::Listed(_) => Vec::new(),
        };
        Pod {
            rules: Rules {
                inbound_ports: inbound.inbound_ports,
                inbound_ports_exclude: inbound.inbound_ports_exclude,
                interfaces_exclude: inbound.interfaces_exclude,
                interfaces_virtual,
                tunnel_inbound: inbound.tunnel_inbound,
                outbound_ranges: outbound.outbound_ranges,
                outbound_ranges_exclude: outbound.outbound_ranges_exclude,
                outbound_ports: outbound.outbound_ports,
                outbound_ports_exclude: outbound.outbound_ports_exclude,
                dns: outbound.dns,
                groups: outbound.groups,
                ..proxy
            },
            ipv6,
        }
    })
}

/// The settings that say who the proxy is.
fn proxy() -> impl Strategy<Value = Rules> {
    let hairpin = prop_oneof![
        4 => Just(Hairpin::Spared),
        2 => Just(Hairpin::Tunnel),
        1 => Just(Hairpin::Legacy),
        1 => Just(Hairpin::None),
    ];
    let loopback = select(LOOPBACKS.map(loopback).to_vec());
    (
        [or(15001), or(15006), or(15008), or(15053)],
        vec(id(), 0..4),
        vec(id(), 0..4),
        hairpin,
        loopback,
    )
        .prop_map(|(ports, uids, gids, hairpin, loopback)| Rules {
            outbound_port: ports[0],
            inbound_port: ports[1],
            tunnel_port: ports[2],
            dns_port: ports[3],
            uids,
            gids,
            hairpin,
            loopback,
            ..Rules::default()
        })
}

fn inbound() -> impl Strategy<Value = Rules> {
    (
        capture(port()),
        list(port()),
        subsequence(vec!["lo", "eth0", "eth1"], 0..3),
        subsequence(vec!["net1", "net2"], 0..3),
        any::<bool>(),
    )
        .prop_map(|(include, exclude, excluded, virtuals, tunnel)| Rules {
            inbound_ports: include,
            inbound_ports_exclude: exclude,
            interfaces_exclude: excluded.into_iter().map(str::to_owned).collect(),
            interfaces_virtual: virtuals.into_iter().map(str::to_owned).collect(),
            tunnel_inbound: tunnel,
            ..Rules::default()
        })
}

fn outbound() -> impl Strategy<Value = Rules> {
    let range = || select(RANGES.map(range).to_vec());
    let server = prop_oneof![address4(), address6()];
    let dns = prop_oneof![
        2 => Just(Dns::Off),
        2 => list(server).prop_map(Dns::Resolvers),
        1 => Just(Dns::All),
    ];
    let groups = prop_oneof![
        2 => list(id()).prop_map(Groups::Except),
        1 => list(id()).prop_map(Groups::Only),
    ];
    (
        capture(range()),
        list(range()),
        list(port()),
        list(port()),
        dns,
        groups,
    )
        .prop_map(|(include, exclude, ports, no_ports, dns, groups)| Rules {
            outbound_ranges: include,
            outbound_ranges_exclude: exclude,
            outbound_ports: ports,
            outbound_ports_exclude: no_ports,
            dns,
            groups,
            ..Rules::default()
        })
}

fn capture<T: Strategy>(item: T) -> impl Strategy<Value = Capture<T::Value>>
where
    T::Value: Clone,
{
    prop_oneof![Just(Capture::All), list(item).prop_map(Capture::Listed),]
}

/// A short list, often an empty one.
fn list<T: Strategy>(item: T) -> impl Strategy<Value = Vec<T::Value>>
where
    T::Value: Clone,
{
    vec(item, 0..4).prop_flat_map(|items| prop_oneof![Just(Vec::new()), Just(items)])
}

/// Mostly this port.
fn or(usual: u16) -> impl Strategy<Value = u16> {
    prop_oneof![4 => Just(usual), 1 => port()]
}

fn address(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn range(text: &str) -> IpNet {
    text.parse().expect("an address range")
}

fn loopback(text: &str) -> Ipv4Net {
    text.parse().expect("an IPv4 range")
}
