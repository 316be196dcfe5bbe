//! The rows of the contract's settings, the values that each of them is compared
//! with, and how to take them away again.

use shunt_abi::Hairpin;
use shunt_istio_rules::{Capture, Dns, Groups, Rules};

use super::setting::{Setting, range};

/// A row of the settings of the contract that can be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Row {
    OutboundPort,
    InboundPort,
    TunnelPort,
    Owners,
    InboundInclude,
    InboundExclude,
    OutboundInclude,
    OutboundExclude,
    PortsInclude,
    PortsExclude,
    ExcludedInterfaces,
    VirtualInterfaces,
    RedirectDns,
    CaptureAllDns,
    DualStack,
    OwnerGroups,
    OwnerGroupsExclude,
    Loopback,
    DropInvalid,
    Hairpin,
    TunnelInbound,
}

/// A change of one row.
pub(crate) type Change = fn(&mut Setting);

impl Row {
    /// In an order in which a later one does not undo an earlier one.
    pub(crate) const ALL: [Self; 21] = [
        Self::OutboundPort,
        Self::InboundPort,
        Self::TunnelPort,
        Self::Owners,
        Self::InboundInclude,
        Self::InboundExclude,
        Self::OutboundInclude,
        Self::OutboundExclude,
        Self::PortsInclude,
        Self::PortsExclude,
        Self::ExcludedInterfaces,
        Self::VirtualInterfaces,
        Self::RedirectDns,
        Self::CaptureAllDns,
        Self::DualStack,
        Self::OwnerGroups,
        Self::OwnerGroupsExclude,
        Self::Loopback,
        Self::DropInvalid,
        Self::Hairpin,
        Self::TunnelInbound,
    ];

    /// Rows that are two values of one thing: a setting has one of them.
    pub(crate) fn excludes(self, other: Self) -> bool {
        let pair = [self, other];
        [
            [Self::RedirectDns, Self::CaptureAllDns],
            [Self::OwnerGroups, Self::OwnerGroupsExclude],
        ]
        .iter()
        .any(|both| both.iter().all(|row| pair.contains(row)))
    }

    /// Whether this row is not as in the setting's base.
    pub(crate) fn is_set(self, setting: &Setting) -> bool {
        let mut reset = setting.clone();
        self.reset(&mut reset);
        reset != *setting
    }

    /// Takes the row back to what it is in the base.
    pub(crate) fn reset(self, setting: &mut Setting) {
        let base = setting.base();
        let own = &mut setting.rules;
        match self {
            Self::OutboundPort => own.outbound_port = base.outbound_port,
            Self::InboundPort => own.inbound_port = base.inbound_port,
            Self::TunnelPort => own.tunnel_port = base.tunnel_port,
            Self::Owners => (own.uids, own.gids) = (base.uids, base.gids),
            Self::InboundInclude => own.inbound_ports = base.inbound_ports,
            Self::InboundExclude => own.inbound_ports_exclude = base.inbound_ports_exclude,
            Self::OutboundInclude => own.outbound_ranges = base.outbound_ranges,
            Self::OutboundExclude => own.outbound_ranges_exclude = base.outbound_ranges_exclude,
            Self::PortsInclude => own.outbound_ports = base.outbound_ports,
            Self::PortsExclude => own.outbound_ports_exclude = base.outbound_ports_exclude,
            Self::ExcludedInterfaces => own.interfaces_exclude = base.interfaces_exclude,
            Self::VirtualInterfaces => own.interfaces_virtual = base.interfaces_virtual,
            Self::RedirectDns => {
                if let Dns::Resolvers(_) = own.dns {
                    own.dns = base.dns;
                }
            }
            Self::CaptureAllDns => {
                if own.dns == Dns::All {
                    own.dns = base.dns;
                }
            }
            Self::DualStack => setting.dual_stack = true,
            Self::OwnerGroups => {
                if let Groups::Only(_) = own.groups {
                    own.groups = base.groups;
                }
            }
            Self::OwnerGroupsExclude => {
                if let Groups::Except(_) = own.groups {
                    own.groups = base.groups;
                }
            }
            Self::Loopback => own.loopback = base.loopback,
            Self::DropInvalid => own.drop_invalid = base.drop_invalid,
            Self::Hairpin => own.hairpin = base.hairpin,
            Self::TunnelInbound => own.tunnel_inbound = base.tunnel_inbound,
        }
    }

    /// Values of this row that are not those of Istio's injector, each of which
    /// the table has alone; the first one also in pairs.
    pub(crate) fn changes(self) -> &'static [Change] {
        match self {
            Self::OutboundPort => &[
                |s| s.rules.outbound_port = 16001,
                // Nobody listens there.
                |s| s.rules.outbound_port = 15999,
            ],
            Self::InboundPort => &[
                |s| s.rules.inbound_port = 16006,
                |s| s.rules.inbound_port = 15999,
                // That of the other direction.
                |s| s.rules.inbound_port = s.rules.outbound_port,
            ],
            Self::TunnelPort => &[|s| s.rules.tunnel_port = 8080],
            Self::Owners => &[
                |s| owners(s, &[1337, 1338], &[1337, 2001]),
                |s| owners(s, &[1338], &[1338]),
                |s| owners(s, &[0], &[0]),
                |s| owners(s, &[1337], &[2001]),
                |s| owners(s, &[1337, 1338], &[1337, 1338]),
            ],
            Self::InboundInclude => &[
                |s| s.rules.inbound_ports = Capture::Listed(vec![80, 15020]),
                |s| s.rules.inbound_ports = Capture::Listed(vec![80, 15008]),
                |s| s.rules.inbound_ports = Capture::Listed(Vec::new()),
            ],
            Self::InboundExclude => &[
                |s| s.rules.inbound_ports_exclude = vec![22, 8080],
                |s| s.rules.inbound_ports_exclude = Vec::new(),
            ],
            Self::OutboundInclude => &[
                |s| ranges(s, &["198.51.100.0/24", "172.16.0.0/12", "2001:db8::/32"]),
                |s| ranges(s, &[]),
                |s| ranges(s, &["127.0.0.0/8", "2001:db8::/32"]),
                |s| ranges(s, &["::1/128", "198.51.100.0/24"]),
                |s| ranges(s, &["0.0.0.0/0", "::/0"]),
                |s| ranges(s, &["10.42.0.0/16", "fd00:42::/32"]),
            ],
            Self::OutboundExclude => &[
                |s| ranges_exclude(s, &["203.0.113.0/24", "3fff::/20", "10.42.0.0/16"]),
                |s| ranges_exclude(s, &["0.0.0.0/0"]),
                |s| ranges_exclude(s, &["::/0"]),
                |s| ranges_exclude(s, &["198.51.100.7/32", "2001:db8::7/128"]),
                |s| ranges_exclude(s, &["127.0.0.0/8", "fd00:42::/32"]),
            ],
            Self::PortsInclude => &[
                |s| s.rules.outbound_ports = vec![53, 8080],
                |s| {
                    s.rules.outbound_ports = vec![8080];
                    ranges(s, &[]);
                },
            ],
            Self::PortsExclude => &[
                |s| s.rules.outbound_ports_exclude = vec![8080, 15090],
                |s| s.rules.outbound_ports_exclude = vec![53],
                |s| s.rules.outbound_ports_exclude = vec![15001, 15006],
            ],
            Self::ExcludedInterfaces => &[
                |s| s.rules.interfaces_exclude = names(&["eth0"]),
                |s| s.rules.interfaces_exclude = names(&["lo"]),
                |s| s.rules.interfaces_exclude = names(&["eth+"]),
                |s| s.rules.interfaces_exclude = names(&["vif0", "eth1"]),
            ],
            Self::VirtualInterfaces => &[
                |s| s.rules.interfaces_virtual = names(&["vif0"]),
                |s| s.rules.interfaces_virtual = names(&["vif1", "vif0"]),
            ],
            Self::RedirectDns => &[
                |s| resolvers(s, &["172.16.5.5", "fd00:172::5"]),
                |s| resolvers(s, &["172.16.5.5"]),
                |s| resolvers(s, &["10.42.0.4", "127.0.0.2", "fd00:42::4"]),
            ],
            Self::CaptureAllDns => &[|s| s.rules.dns = Dns::All],
            Self::DualStack => &[|s| s.dual_stack = false],
            Self::OwnerGroups => &[
                |s| s.rules.groups = Groups::Only(vec![2001]),
                |s| s.rules.groups = Groups::Only(vec![1000, 2002]),
            ],
            Self::OwnerGroupsExclude => &[
                |s| s.rules.groups = Groups::Except(vec![2001, 2002]),
                |s| s.rules.groups = Groups::Except(vec![1000]),
            ],
            Self::Loopback => &[
                |s| s.rules.loopback = range("127.0.0.0/8"),
                |s| {
                    s.rules.loopback = range("127.0.0.0/30");
                    ranges(s, &["127.0.0.0/8", "2001:db8::/32"]);
                },
            ],
            Self::DropInvalid => &[|s| s.rules.drop_invalid = true],
            Self::Hairpin => &[
                |s| s.rules.hairpin = Hairpin::Tunnel,
                |s| s.rules.hairpin = Hairpin::Legacy,
            ],
            Self::TunnelInbound => &[|s| s.rules.tunnel_inbound = true],
        }
    }

    /// Settings in which this row says less: reset, or with an item less.
    pub(crate) fn smaller(self, setting: &Setting) -> Vec<Setting> {
        let mut smaller = vec![setting.clone().with(|s| self.reset(s))];
        macro_rules! without_items {
            ($($list:tt)+) => {
                for index in 0..setting.rules.$($list)+.len() {
                    smaller.push(setting.clone().with(|s| {
                        s.rules.$($list)+.remove(index);
                    }));
                }
            };
        }
        match self {
            Self::Owners if setting.rules.uids.len() > 1 => without_items!(uids),
            Self::InboundExclude => without_items!(inbound_ports_exclude),
            Self::OutboundExclude => without_items!(outbound_ranges_exclude),
            Self::PortsInclude => without_items!(outbound_ports),
            Self::PortsExclude => without_items!(outbound_ports_exclude),
            Self::ExcludedInterfaces => without_items!(interfaces_exclude),
            Self::VirtualInterfaces => without_items!(interfaces_virtual),
            Self::OutboundPort
            | Self::InboundPort
            | Self::TunnelPort
            | Self::Owners
            | Self::InboundInclude
            | Self::OutboundInclude
            | Self::RedirectDns
            | Self::CaptureAllDns
            | Self::DualStack
            | Self::OwnerGroups
            | Self::OwnerGroupsExclude
            | Self::Loopback
            | Self::DropInvalid
            | Self::Hairpin
            | Self::TunnelInbound => {}
        }
        if self == Self::Owners && setting.rules.gids.len() > 1 {
            without_items!(gids);
        }
        smaller.extend(self.shorter(setting));
        smaller.retain(|other| other != setting);
        smaller
    }

    /// The same for lists that are one of two kinds of value.
    fn shorter(self, setting: &Setting) -> Vec<Setting> {
        let rules = &setting.rules;
        let with = |change: &dyn Fn(&mut Rules)| setting.clone().with(|s| change(&mut s.rules));
        match (self, &rules.inbound_ports, &rules.outbound_ranges) {
            (Self::InboundInclude, Capture::Listed(ports), _) => each_less(ports)
                .map(|less| with(&|rules| rules.inbound_ports = Capture::Listed(less.clone())))
                .collect(),
            (Self::OutboundInclude, _, Capture::Listed(nets)) => each_less(nets)
                .map(|less| with(&|rules| rules.outbound_ranges = Capture::Listed(less.clone())))
                .collect(),
            _ => self.shorter_groups_or_resolvers(setting),
        }
    }

    fn shorter_groups_or_resolvers(self, setting: &Setting) -> Vec<Setting> {
        let rules = &setting.rules;
        let with = |change: &dyn Fn(&mut Rules)| setting.clone().with(|s| change(&mut s.rules));
        // An empty list of groups counts as not given.
        match (self, &rules.groups, &rules.dns) {
            (Self::OwnerGroups, Groups::Only(gids), _) if gids.len() > 1 => each_less(gids)
                .map(|less| with(&|rules| rules.groups = Groups::Only(less.clone())))
                .collect(),
            (Self::OwnerGroupsExclude, Groups::Except(gids), _) => each_less(gids)
                .map(|less| with(&|rules| rules.groups = Groups::Except(less.clone())))
                .collect(),
            (Self::RedirectDns, _, Dns::Resolvers(servers)) if servers.len() > 1 => {
                each_less(servers)
                    .map(|less| with(&|rules| rules.dns = Dns::Resolvers(less.clone())))
                    .collect()
            }
            _ => Vec::new(),
        }
    }
}

/// The list without one of its items, for each.
fn each_less<T: Clone>(items: &[T]) -> impl Iterator<Item = Vec<T>> {
    (0..items.len()).map(|index| {
        let mut less = items.to_vec();
        less.remove(index);
        less
    })
}

fn owners(setting: &mut Setting, uids: &[u32], gids: &[u32]) {
    setting.rules.uids = uids.to_vec();
    setting.rules.gids = gids.to_vec();
}

fn ranges(setting: &mut Setting, texts: &[&str]) {
    setting.rules.outbound_ranges = Capture::Listed(texts.iter().map(|text| range(text)).collect());
}

fn ranges_exclude(setting: &mut Setting, texts: &[&str]) {
    setting.rules.outbound_ranges_exclude = texts.iter().map(|text| range(text)).collect();
}

fn resolvers(setting: &mut Setting, texts: &[&str]) {
    setting.rules.dns = Dns::Resolvers(texts.iter().map(|text| range(text)).collect());
}

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}
