//! A pod as a test writes it down.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use shunt_abi::{Addr, CidrList, Hairpin, NO_OWNER, PodSettings, PortList, flags};
use shunt_decide::{Decision, Inbound, Lists, Outbound, Protocol, inbound, may_capture, outbound};
use shunt_istio_rules::{
    Capture, Dns, Family, Groups, Hook, Outcome, Packet, Protocol as PacketProtocol, Rules, Table,
};

/// A pod: the configuration, and the redirection by both ways that have to
/// agree, ours and Istio's.
#[derive(Clone, Debug)]
pub(crate) struct Pod {
    pub(crate) rules: Rules,
    /// IPv6 follows the rules.
    pub(crate) ipv6: bool,
}

impl Pod {
    /// What Istio's injector asks for.
    pub(crate) fn istio() -> Self {
        Self {
            rules: Rules::istio(),
            ipv6: false,
        }
    }

    /// The defaults of `istio-iptables` alone: nothing is captured.
    pub(crate) fn bare() -> Self {
        Self {
            rules: Rules::default(),
            ipv6: false,
        }
    }

    /// Linkerd's preset.
    pub(crate) fn linkerd() -> Self {
        Self::istio()
            .uids([2102])
            .gids([])
            .hairpin(Hairpin::None)
            .ports(4140, 4143)
            .exclude_inbound_ports([4190, 4191, 4567, 4568])
            .exclude_ports([4567, 4568])
    }

    /// Kuma's preset.
    pub(crate) fn kuma() -> Self {
        Self::istio()
            .uids([5678])
            .gids([])
            .hairpin(Hairpin::Tunnel)
            .tunnel_inbound()
            .exclude_inbound_ports([])
    }

    /// `DUAL_STACK`
    pub(crate) fn dual_stack(mut self) -> Self {
        self.ipv6 = true;
        self
    }

    /// `-p` and `-z`
    pub(crate) fn ports(mut self, outbound: u16, inbound: u16) -> Self {
        self.rules.outbound_port = outbound;
        self.rules.inbound_port = inbound;
        self
    }

    /// `-e`
    pub(crate) fn tunnel_port(mut self, port: u16) -> Self {
        self.rules.tunnel_port = port;
        self
    }

    /// `-u`
    pub(crate) fn uids<const N: usize>(mut self, uids: [u32; N]) -> Self {
        self.rules.uids = uids.into();
        self
    }

    /// `-g`
    pub(crate) fn gids<const N: usize>(mut self, gids: [u32; N]) -> Self {
        self.rules.gids = gids.into();
        self
    }

    /// `-b`
    pub(crate) fn inbound_ports<const N: usize>(mut self, ports: [u16; N]) -> Self {
        self.rules.inbound_ports = Capture::Listed(ports.into());
        self
    }

    /// `-d`
    pub(crate) fn exclude_inbound_ports<const N: usize>(mut self, ports: [u16; N]) -> Self {
        self.rules.inbound_ports_exclude = ports.into();
        self
    }

    /// `-i`
    pub(crate) fn ranges<const N: usize>(mut self, ranges: [&str; N]) -> Self {
        self.rules.outbound_ranges = Capture::Listed(ranges.map(net).into());
        self
    }

    /// `-x`
    pub(crate) fn exclude_ranges<const N: usize>(mut self, ranges: [&str; N]) -> Self {
        self.rules.outbound_ranges_exclude = ranges.map(net).into();
        self
    }

    /// `-q`
    pub(crate) fn include_ports<const N: usize>(mut self, ports: [u16; N]) -> Self {
        self.rules.outbound_ports = ports.into();
        self
    }

    /// `-o`
    pub(crate) fn exclude_ports<const N: usize>(mut self, ports: [u16; N]) -> Self {
        self.rules.outbound_ports_exclude = ports.into();
        self
    }

    /// `-c`
    pub(crate) fn exclude_interfaces<const N: usize>(mut self, names: [&str; N]) -> Self {
        self.rules.interfaces_exclude = names.map(str::to_owned).into();
        self
    }

    /// `-k`
    pub(crate) fn virtual_interfaces<const N: usize>(mut self, names: [&str; N]) -> Self {
        self.rules.interfaces_virtual = names.map(str::to_owned).into();
        self
    }

    /// `REDIRECT_DNS`
    pub(crate) fn dns<const N: usize>(mut self, resolvers: [&str; N]) -> Self {
        let resolvers = resolvers.map(|ip| ip.parse().expect("an address"));
        self.rules.dns = Dns::Resolvers(resolvers.into());
        self
    }

    /// `REDIRECT_DNS` with `CAPTURE_ALL_DNS`
    pub(crate) fn all_dns(mut self) -> Self {
        self.rules.dns = Dns::All;
        self
    }

    /// `ISTIO_OUTBOUND_OWNER_GROUPS`
    pub(crate) fn only_groups<const N: usize>(mut self, groups: [u32; N]) -> Self {
        self.rules.groups = Groups::Only(groups.into());
        self
    }

    /// `ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE`
    pub(crate) fn except_groups<const N: usize>(mut self, groups: [u32; N]) -> Self {
        self.rules.groups = Groups::Except(groups.into());
        self
    }

    /// `ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR`
    pub(crate) fn loopback(mut self, range: &str) -> Self {
        self.rules.loopback = range.parse().expect("an IPv4 range");
        self
    }

    pub(crate) fn hairpin(mut self, hairpin: Hairpin) -> Self {
        self.rules.hairpin = hairpin;
        self
    }

    /// The tunnel port is captured inbound, too.
    pub(crate) fn tunnel_inbound(mut self) -> Self {
        self.rules.tunnel_inbound = true;
        self
    }

    /// The settings as the programs get them.
    pub(crate) fn settings(&self) -> PodSettings {
        let rules = &self.rules;
        let mut settings = PodSettings {
            flags: self.flags(),
            outbound_port: rules.outbound_port,
            inbound_port: rules.inbound_port,
            tunnel_port: rules.tunnel_port,
            dns_port: rules.dns_port,
            hairpin: rules.hairpin as u32,
            loopback4: network_order(rules.loopback.network()),
            loopback4_mask: network_order(rules.loopback.netmask()),
            ..PodSettings::empty()
        };
        settings.uid_count = fill(&mut settings.uids, &rules.uids);
        settings.gid_count = fill(&mut settings.gids, &rules.gids);
        let (Groups::Only(groups) | Groups::Except(groups)) = &rules.groups;
        settings.group_count = fill(&mut settings.groups, groups);
        settings
    }

    fn flags(&self) -> u32 {
        let rules = &self.rules;
        let inbound = match &rules.inbound_ports {
            Capture::All => flags::INBOUND_ALL,
            Capture::Listed(ports) => bit(!ports.is_empty(), flags::INBOUND_LISTED),
        };
        let outbound = match &rules.outbound_ranges {
            Capture::All => flags::OUTBOUND_ALL,
            Capture::Listed(nets) => bit(!nets.is_empty(), flags::OUTBOUND_CIDRS),
        };
        let dns = match &rules.dns {
            Dns::All => flags::DNS | flags::DNS_ALL,
            Dns::Off | Dns::Resolvers(_) => bit(rules.dns.is_captured(), flags::DNS),
        };
        let groups = match &rules.groups {
            Groups::Only(_) => flags::GROUPS_INCLUDE,
            Groups::Except(groups) => bit(!groups.is_empty(), flags::GROUPS_EXCLUDE),
        };
        let listed = |len: usize, flag| bit(len > 0, flag);
        inbound
            | outbound
            | dns
            | groups
            | flags::IPV4
            | bit(self.ipv6, flags::IPV6)
            | bit(rules.tunnel_inbound, flags::INBOUND_TUNNEL)
            | bit(rules.captures_loopback(), flags::OUTBOUND_CIDRS_LOOPBACK)
            | listed(rules.inbound_ports_exclude.len(), flags::INBOUND_EXCLUDES)
            | listed(rules.outbound_ranges_exclude.len(), flags::EXCLUDE_CIDRS)
            | listed(rules.outbound_ports.len(), flags::INCLUDE_PORTS)
            | listed(rules.outbound_ports_exclude.len(), flags::EXCLUDE_PORTS)
            | listed(
                rules.interfaces_exclude.len() + rules.interfaces_virtual.len(),
                flags::INTERFACES,
            )
    }

    /// What shunt decides.
    pub(crate) fn decide(&self, packet: &Packet) -> Decision {
        self.decide_by(&self.settings(), packet)
    }

    /// What shunt decides when the programs were given other settings, or not
    /// quite these.
    pub(crate) fn decide_by(&self, settings: &PodSettings, packet: &Packet) -> Decision {
        let decision = match &packet.hook {
            Hook::Output { interface, owner } => {
                let facts = Outbound {
                    protocol: protocol(packet),
                    source: Addr::from_ip(packet.source),
                    destination: Addr::from_ip(packet.destination),
                    port: packet.port,
                    uid: owner.map_or(NO_OWNER, |owner| owner.uid),
                    gid: owner.map_or(NO_OWNER, |owner| owner.gid),
                    to_self: interface == "lo",
                    interface_excluded: self.rules.interfaces_exclude.contains(interface),
                };
                outbound(settings, &facts, self)
            }
            Hook::Prerouting { interface } => {
                let facts = Inbound {
                    destination: Addr::from_ip(packet.destination),
                    port: packet.port,
                    from_self: false,
                    interface_excluded: self.rules.interfaces_exclude.contains(interface),
                    interface_virtual: self.rules.interfaces_virtual.contains(interface),
                };
                inbound(settings, &facts, self)
            }
        };
        // Counters know the rule alone, and tell the verdict by it.
        assert_eq!(decision.verdict, decision.rule.verdict(), "{decision:?}");
        decision
    }

    /// Whether shunt would ask for a decision on this at all when it leaves.
    pub(crate) fn may_capture(&self, packet: &Packet) -> bool {
        may_capture(&self.settings(), protocol(packet), packet.port)
    }

    /// What shunt decides over a connection that arrives over lo.
    pub(crate) fn decide_inside(&self, destination: IpAddr, port: u16) -> Decision {
        let facts = Inbound {
            destination: Addr::from_ip(destination),
            port,
            from_self: true,
            interface_excluded: false,
            interface_virtual: true,
        };
        inbound(&self.settings(), &facts, self)
    }

    /// What shunt decides, in the words of iptables.
    pub(crate) fn outcome(&self, packet: &Packet) -> Outcome {
        let verdict = self.decide(packet).verdict;
        verdict
            .port(&self.settings())
            .map_or(Outcome::Accept, Outcome::Redirect)
    }

    /// Istio's rules for this pod.
    pub(crate) fn tables(&self) -> Tables {
        let parse = |family, text: &str| {
            Table::parse(family, text).unwrap_or_else(|error| panic!("{error}\n{text}"))
        };
        Tables {
            v4: parse(Family::V4, &self.rules.ipv4()),
            v6: self.ipv6.then(|| parse(Family::V6, &self.rules.ipv6())),
        }
    }
}

/// The `nat` tables of a pod; a family that has none passes untouched.
pub(crate) struct Tables {
    pub(crate) v4: Table,
    pub(crate) v6: Option<Table>,
}

impl Tables {
    pub(crate) fn outcome(&self, packet: &Packet) -> Outcome {
        match (Family::of(packet.destination), &self.v6) {
            (Family::V4, _) => self.v4.decide(packet),
            (Family::V6, Some(v6)) => v6.decide(packet),
            (Family::V6, None) => Outcome::Accept,
        }
    }
}

impl Lists for Pod {
    fn port(&self, list: PortList, port: u16) -> bool {
        let ports = match list {
            PortList::InboundInclude => match &self.rules.inbound_ports {
                Capture::All => panic!("-b * has no list to look at"),
                Capture::Listed(ports) => ports,
            },
            PortList::InboundExclude => &self.rules.inbound_ports_exclude,
            PortList::OutboundInclude => &self.rules.outbound_ports,
            PortList::OutboundExclude => &self.rules.outbound_ports_exclude,
        };
        assert!(!ports.is_empty(), "{list:?} is empty: a lookup for nothing");
        ports.contains(&port)
    }

    fn cidr(&self, list: CidrList, addr: &Addr) -> bool {
        let ip = addr.to_ip();
        let holds = |nets: &[IpNet]| {
            assert!(!nets.is_empty(), "{list:?} is empty: a lookup for nothing");
            nets.iter().any(|net| net.contains(&ip))
        };
        match list {
            CidrList::OutboundInclude => match &self.rules.outbound_ranges {
                Capture::All => panic!("-i * has no list to look at"),
                Capture::Listed(nets) => holds(nets),
            },
            CidrList::OutboundExclude => holds(&self.rules.outbound_ranges_exclude),
            CidrList::Resolvers => match &self.rules.dns {
                Dns::Resolvers(servers) => servers.contains(&ip),
                Dns::Off | Dns::All => panic!("there is no list of resolvers to look at"),
            },
        }
    }
}

fn protocol(packet: &Packet) -> Protocol {
    match packet.protocol {
        PacketProtocol::Tcp => Protocol::Tcp,
        PacketProtocol::Udp => Protocol::Udp,
    }
}

fn net(range: &str) -> IpNet {
    range.parse().expect("an address range")
}

fn network_order(ip: Ipv4Addr) -> u32 {
    u32::from_ne_bytes(ip.octets())
}

fn bit(set: bool, flag: u32) -> u32 {
    if set { flag } else { 0 }
}

/// Copies `ids` to the front of `to`; how many there are.
fn fill(to: &mut [u32], ids: &[u32]) -> u32 {
    to[..ids.len()].copy_from_slice(ids);
    ids.len().try_into().expect("a short list")
}
