use crate::SpliceMode;

/// How many uids, and how many gids, may own a proxy (`-u`, `-g`).
pub const MAX_OWNERS: usize = if cfg!(feature = "other-layout") {
    8
} else {
    16
};

/// How many gids an owner-group list may have
/// (`ISTIO_OUTBOUND_OWNER_GROUPS`; Istio has the same limit).
pub const MAX_GROUPS: usize = 64;

/// An id that no socket has, not even one without an owner
/// ([`NO_OWNER`](crate::NO_OWNER)).
pub const NOBODY: u32 = u32::MAX - 1;

/// The settings of one enrolled network namespace: the value of the map `PODS`,
/// replaced as a whole and therefore never seen half changed.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodSettings {
    /// Names what this version of the settings has in the maps `PORTS`, `CIDRS` and
    /// `INTERFACES`. A new version brings its own under a new number.
    pub list_set: u32,
    /// Bits of [`flags`].
    pub flags: u32,
    /// Where the proxy takes outbound connections (`-p`), host byte order.
    pub outbound_port: u16,
    /// Where the proxy takes inbound connections (`-z`), host byte order.
    pub inbound_port: u16,
    /// The port of the mesh's own tunnel (`-e`), host byte order.
    pub tunnel_port: u16,
    /// Where the proxy answers DNS, host byte order.
    pub dns_port: u16,
    /// Other ports of the proxy, host byte order, 0 for none: those of the
    /// settings that these replace, or that will replace these. Its listeners
    /// there are known, and connections to them under way are followed.
    pub other_ports: [u16; 4],
    /// A [`Hairpin`] code.
    pub hairpin: u32,
    /// A [`SpliceMode`] code.
    pub splice: u32,
    /// The IPv4 loopback CIDR that is always direct, network byte order.
    pub loopback4: u32,
    /// Its mask, network byte order.
    pub loopback4_mask: u32,
    /// How many of `uids` are set.
    pub uid_count: u32,
    /// How many of `gids` are set.
    pub gid_count: u32,
    /// How many of `groups` are set.
    pub group_count: u32,
    /// Uids that own a proxy, in order, as the node numbers them; the rest is
    /// [`NOBODY`].
    pub uids: [u32; MAX_OWNERS],
    /// Gids that own a proxy, likewise.
    pub gids: [u32; MAX_OWNERS],
    /// Gids that [`flags::GROUPS_INCLUDE`] or [`flags::GROUPS_EXCLUDE`] speak of,
    /// likewise.
    pub groups: [u32; MAX_GROUPS],
}

impl PodSettings {
    /// Settings that capture nothing.
    pub const fn empty() -> Self {
        Self {
            list_set: 0,
            flags: 0,
            outbound_port: 0,
            inbound_port: 0,
            tunnel_port: 0,
            dns_port: 0,
            other_ports: [0; 4],
            hairpin: Hairpin::Spared as u32,
            splice: SpliceMode::Off as u32,
            loopback4: u32::from_ne_bytes([127, 0, 0, 1]),
            loopback4_mask: u32::MAX,
            uid_count: 0,
            gid_count: 0,
            group_count: 0,
            uids: [NOBODY; MAX_OWNERS],
            gids: [NOBODY; MAX_OWNERS],
            groups: [NOBODY; MAX_GROUPS],
        }
    }

    /// Whether every bit of `flag` is set.
    #[inline(always)]
    pub const fn has(&self, flag: u32) -> bool {
        self.flags & flag == flag
    }

    /// Whether the proxy takes redirected connections on `port` (host byte
    /// order).
    #[inline(always)]
    pub fn is_proxy_port(&self, port: u16) -> bool {
        port != 0 && (self.proxy_ports().contains(&port) || self.other_ports.contains(&port))
    }

    /// The ports on which the proxy takes what these settings redirect, host
    /// byte order; 0 for none. The last is spare, and keeps the layout even.
    #[inline(always)]
    pub const fn proxy_ports(&self) -> [u16; 4] {
        let dns = if self.has(flags::DNS) {
            self.dns_port
        } else {
            0
        };
        [self.outbound_port, self.inbound_port, dns, 0]
    }

    /// The same settings, with the ports of `others` known as well.
    #[must_use]
    pub const fn with_ports_of(&self, others: &Self) -> Self {
        Self {
            other_ports: others.proxy_ports(),
            ..*self
        }
    }
}

/// Bits of [`PodSettings::flags`]. A list that is empty has its bit clear, so
/// that the programs look nothing up for it.
pub mod flags {
    /// `-b *`: capture inbound, except the ports of the list and the tunnel's.
    pub const INBOUND_ALL: u32 = 1 << 0;
    /// `-b LIST`: capture inbound the ports of the list.
    pub const INBOUND_LISTED: u32 = 1 << 1;
    /// `-d` is not empty.
    pub const INBOUND_EXCLUDES: u32 = 1 << 2;
    /// The tunnel port is captured inbound like any other.
    pub const INBOUND_TUNNEL: u32 = 1 << 3;
    /// `-i *`: capture outbound whatever the destination.
    pub const OUTBOUND_ALL: u32 = 1 << 4;
    /// `-i LIST`: capture outbound what is in a CIDR of the list.
    pub const OUTBOUND_CIDRS: u32 = 1 << 5;
    /// One of the CIDRs of `-i` is loopback.
    pub const OUTBOUND_CIDRS_LOOPBACK: u32 = 1 << 6;
    /// `-x` is not empty.
    pub const EXCLUDE_CIDRS: u32 = 1 << 7;
    /// `-q` is not empty.
    pub const INCLUDE_PORTS: u32 = 1 << 8;
    /// `-o` is not empty.
    pub const EXCLUDE_PORTS: u32 = 1 << 9;
    /// Only sockets of the listed groups are captured.
    pub const GROUPS_INCLUDE: u32 = 1 << 10;
    /// Sockets of the listed groups are not captured.
    pub const GROUPS_EXCLUDE: u32 = 1 << 11;
    /// `REDIRECT_DNS`: port 53 of the pod's resolvers goes to the DNS port.
    pub const DNS: u32 = 1 << 12;
    /// `CAPTURE_ALL_DNS`: so does port 53 of everybody else.
    pub const DNS_ALL: u32 = 1 << 13;
    /// IPv6 follows the rules; without it IPv6 passes untouched.
    pub const IPV6: u32 = 1 << 14;
    /// Some interfaces are excluded or virtual (`-c`, `-k`).
    pub const INTERFACES: u32 = 1 << 16;
    /// IPv4 follows the rules. Clear only where a pod has none to speak of.
    pub const IPV4: u32 = 1 << 15;
}

/// What becomes of the proxy's connections to an address of its own pod.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hairpin {
    /// To the inbound port, the tunnel port spared (Istio from 1.22 on).
    Spared = 0,
    /// To the inbound port, the tunnel port too (Istio 1.10 to 1.21, Kuma).
    Tunnel = 1,
    /// Anybody's connection to an address of the pod outside loopback goes to
    /// the outbound port (Istio before 1.10).
    Legacy = 2,
    /// Not redirected (Linkerd).
    None = 3,
}

impl TryFrom<u32> for Hairpin {
    type Error = u32;

    #[inline(always)]
    fn try_from(code: u32) -> Result<Self, u32> {
        match code {
            0 => Ok(Self::Spared),
            1 => Ok(Self::Tunnel),
            2 => Ok(Self::Legacy),
            3 => Ok(Self::None),
            other => Err(other),
        }
    }
}
