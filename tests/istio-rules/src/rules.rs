use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};
use shunt_abi::Hairpin;

/// What of one direction is captured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Capture<T> {
    /// `*`
    All,
    /// What is in the list; an empty list captures nothing.
    Listed(Vec<T>),
}

/// Which DNS is captured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dns {
    /// None.
    Off,
    /// `REDIRECT_DNS`: what goes to these resolvers. Without one it is the same
    /// as [`Dns::Off`].
    Resolvers(Vec<IpAddr>),
    /// `REDIRECT_DNS` with `CAPTURE_ALL_DNS`: whatever the server.
    All,
}

impl Dns {
    /// Whether the rules speak of DNS at all.
    pub const fn is_captured(&self) -> bool {
        match self {
            Self::Off => false,
            Self::Resolvers(servers) => !servers.is_empty(),
            Self::All => true,
        }
    }
}

/// Whose sockets are captured, by gid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Groups {
    /// Only those of these groups (`ISTIO_OUTBOUND_OWNER_GROUPS`).
    Only(Vec<u32>),
    /// All but those of these groups (`ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE`).
    Except(Vec<u32>),
}

/// The configuration of `istio-iptables`, as far as the redirection depends on
/// it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    /// `-p`
    pub outbound_port: u16,
    /// `-z`
    pub inbound_port: u16,
    /// `-e`
    pub tunnel_port: u16,
    /// Where the proxy answers DNS: 15053 for Istio.
    pub dns_port: u16,
    /// `-u`, in order.
    pub uids: Vec<u32>,
    /// `-g`, in order.
    pub gids: Vec<u32>,
    /// `-b`
    pub inbound_ports: Capture<u16>,
    /// `-d`
    pub inbound_ports_exclude: Vec<u16>,
    /// `-i`
    pub outbound_ranges: Capture<IpNet>,
    /// `-x`
    pub outbound_ranges_exclude: Vec<IpNet>,
    /// `-q`
    pub outbound_ports: Vec<u16>,
    /// `-o`
    pub outbound_ports_exclude: Vec<u16>,
    /// `-c`
    pub interfaces_exclude: Vec<String>,
    /// `-k`
    pub interfaces_virtual: Vec<String>,
    /// `REDIRECT_DNS`, `CAPTURE_ALL_DNS` and the resolvers.
    pub dns: Dns,
    /// The owner groups.
    pub groups: Groups,
    /// `ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR`
    pub loopback: Ipv4Net,
    /// Which generation's rules for the proxy's calls to its own pod.
    pub hairpin: Hairpin,
    /// The tunnel port is captured inbound like any other, as before the tunnel
    /// was there.
    pub tunnel_inbound: bool,
    /// `DROP_INVALID`
    pub drop_invalid: bool,
}

impl Default for Rules {
    /// The defaults of `istio-iptables`, which capture nothing, with the proxy's
    /// uid and gid of 1337.
    fn default() -> Self {
        Self {
            outbound_port: 15001,
            inbound_port: 15006,
            tunnel_port: 15008,
            dns_port: 15053,
            uids: vec![1337],
            gids: vec![1337],
            inbound_ports: Capture::Listed(Vec::new()),
            inbound_ports_exclude: Vec::new(),
            outbound_ranges: Capture::Listed(Vec::new()),
            outbound_ranges_exclude: Vec::new(),
            outbound_ports: Vec::new(),
            outbound_ports_exclude: Vec::new(),
            interfaces_exclude: Vec::new(),
            interfaces_virtual: Vec::new(),
            dns: Dns::Off,
            groups: Groups::Except(Vec::new()),
            loopback: Ipv4Net::from(Ipv4Addr::LOCALHOST),
            hairpin: Hairpin::Spared,
            tunnel_inbound: false,
            drop_invalid: false,
        }
    }
}

impl Rules {
    /// What Istio's injector asks for: everything but the sidecar's own ports
    /// (`-b '*' -d 15090,15021,15020 -i '*'`).
    pub fn istio() -> Self {
        Self {
            inbound_ports: Capture::All,
            inbound_ports_exclude: vec![15090, 15021, 15020],
            outbound_ranges: Capture::All,
            ..Self::default()
        }
    }

    /// Whether one of the ranges of `-i` starts with a loopback address. Istio
    /// asks both families at once.
    pub fn captures_loopback(&self) -> bool {
        match &self.outbound_ranges {
            Capture::All => false,
            Capture::Listed(nets) => nets.iter().any(|net| net.addr().is_loopback()),
        }
    }
}
