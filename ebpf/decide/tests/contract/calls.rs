//! Who calls whom, in the words of the contract.

use std::net::IpAddr;

use shunt_istio_rules::{Hook, Owner, Packet, Protocol};

/// The pod's own address.
pub(crate) const POD: &str = "10.244.1.5";
/// The pod's own IPv6 address.
pub(crate) const POD6: &str = "fd00:244::5";
/// An address elsewhere.
pub(crate) const REMOTE: &str = "203.0.113.7";
/// An IPv6 address elsewhere.
pub(crate) const REMOTE6: &str = "2001:db8::7";
/// The resolver of the pod.
pub(crate) const RESOLVER: &str = "10.96.0.10";

/// "Any port": those that mean something to somebody, and some that do not.
pub(crate) const ANY_PORT: [u16; 13] = [
    1, 22, 53, 80, 443, 15001, 15002, 15006, 15008, 15020, 15021, 15053, 65535,
];

/// Calls that are alike: every combination of what is listed.
#[derive(Clone)]
pub(crate) struct Calls {
    /// `None` for calls from outside.
    owners: Option<Vec<Option<Owner>>>,
    /// Chosen by the destination where a row does not say.
    source: Option<IpAddr>,
    destinations: Vec<IpAddr>,
    ports: Vec<u16>,
    protocols: Vec<Protocol>,
    /// The interface of what does not stay in the pod.
    interface: &'static str,
}

/// Any process that is not the proxy.
pub(crate) fn app() -> Calls {
    let ids = [0, 1000, 65534].map(|id| Some(Owner { uid: id, gid: id }));
    let mut calls = nobody();
    calls.owners = Some(ids.into_iter().chain([None]).collect());
    calls
}

/// A socket without owner, such as one of the kernel.
pub(crate) fn nobody() -> Calls {
    Calls {
        owners: Some(vec![None]),
        source: None,
        destinations: Vec::new(),
        ports: vec![80],
        protocols: vec![Protocol::Tcp],
        interface: "eth0",
    }
}

/// A process with this uid: the proxy, with its gid and with others.
pub(crate) fn uid(uid: u32) -> Calls {
    let mut calls = nobody();
    calls.owners = Some([uid, 0].map(|gid| Some(Owner { uid, gid })).into());
    calls
}

/// A process with this gid only.
pub(crate) fn gid(gid: u32) -> Calls {
    let mut calls = nobody();
    calls.owners = Some([0, 1000].map(|uid| Some(Owner { uid, gid })).into());
    calls
}

/// Everybody in the pod.
pub(crate) fn anyone() -> Calls {
    let mut calls = app();
    for other in [uid(1337), gid(1337)] {
        calls
            .owners
            .get_or_insert_default()
            .extend(other.owners.unwrap_or_default());
    }
    calls
}

/// Whoever calls from outside the pod.
pub(crate) fn outside() -> Calls {
    let mut calls = nobody();
    calls.owners = None;
    calls
}

impl Calls {
    /// To these addresses.
    pub(crate) fn to<const N: usize>(mut self, destinations: [&str; N]) -> Self {
        self.destinations = destinations.map(address).into();
        self
    }

    /// To these ports; 80 where a row does not say.
    pub(crate) fn ports<const N: usize>(mut self, ports: [u16; N]) -> Self {
        self.ports = ports.into();
        self
    }

    /// From this address.
    pub(crate) fn from(mut self, source: &str) -> Self {
        self.source = Some(address(source));
        self
    }

    /// By UDP instead of TCP.
    pub(crate) fn udp(mut self) -> Self {
        self.protocols = vec![Protocol::Udp];
        self
    }

    /// By TCP and by UDP.
    pub(crate) fn tcp_and_udp(mut self) -> Self {
        self.protocols = vec![Protocol::Tcp, Protocol::Udp];
        self
    }

    /// Through this interface; `eth0` where a row does not say.
    pub(crate) fn through(mut self, interface: &'static str) -> Self {
        self.interface = interface;
        self
    }

    /// All of them.
    pub(crate) fn packets(&self) -> Vec<Packet> {
        let mut packets = Vec::new();
        for &destination in &self.destinations {
            for hook in self.hooks(destination) {
                for &port in &self.ports {
                    for &protocol in &self.protocols {
                        packets.push(Packet {
                            hook: hook.clone(),
                            protocol,
                            source: self.source_to(destination),
                            destination,
                            port,
                        });
                    }
                }
            }
        }
        assert!(!packets.is_empty(), "a row without a packet checks nothing");
        packets
    }

    fn hooks(&self, destination: IpAddr) -> Vec<Hook> {
        let Some(owners) = &self.owners else {
            return vec![Hook::Prerouting {
                interface: self.interface.to_owned(),
            }];
        };
        let interface = if stays(destination) {
            "lo"
        } else {
            self.interface
        };
        owners
            .iter()
            .map(|&owner| Hook::Output {
                interface: interface.to_owned(),
                owner,
            })
            .collect()
    }

    /// The source that the routing table gives.
    fn source_to(&self, destination: IpAddr) -> IpAddr {
        let chosen = match (&self.owners, destination) {
            (None, IpAddr::V4(_)) => address(REMOTE),
            (None, IpAddr::V6(_)) => address(REMOTE6),
            (Some(_), to) if stays(to) => to,
            (Some(_), IpAddr::V4(_)) => address(POD),
            (Some(_), IpAddr::V6(_)) => address(POD6),
        };
        self.source.unwrap_or(chosen)
    }
}

/// Whether this is an address of the pod: then it is routed to lo.
fn stays(to: IpAddr) -> bool {
    to.is_loopback() || [POD, POD6, "::6"].map(address).contains(&to)
}

fn address(text: &str) -> IpAddr {
    text.parse().expect("an address")
}
