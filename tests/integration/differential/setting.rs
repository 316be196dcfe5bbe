//! One pod's settings, in the two languages that are compared: flags of shunt,
//! and Istio's rules.

use std::{
    fmt::{self, Display},
    net::{IpAddr, Ipv4Addr},
};

use shunt::settings::{Field, Inputs, Origin, Settings, Written};
use shunt_abi::Hairpin;
use shunt_istio_rules::{Capture, Dns, Groups, Rules};
use shunt_tests::{Owner, Stack};

/// A mesh whose preset is taken (`--mesh`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mesh {
    Istio,
    Linkerd,
    Kuma,
}

impl Mesh {
    const fn name(self) -> &'static str {
        match self {
            Self::Istio => "istio",
            Self::Linkerd => "linkerd",
            Self::Kuma => "kuma",
        }
    }

    /// What that mesh's own init container would write.
    fn rules(self) -> Rules {
        let everything = || Rules {
            inbound_ports_exclude: Vec::new(),
            gids: Vec::new(),
            tunnel_inbound: true,
            ..Rules::istio()
        };
        match self {
            Self::Istio => Rules::istio(),
            Self::Linkerd => Rules {
                outbound_port: 4140,
                inbound_port: 4143,
                uids: vec![2102],
                inbound_ports_exclude: vec![4190, 4191, 4567, 4568],
                outbound_ports_exclude: vec![4567, 4568],
                hairpin: Hairpin::None,
                ..everything()
            },
            Self::Kuma => Rules {
                uids: vec![5678],
                hairpin: Hairpin::Tunnel,
                ..everything()
            },
        }
    }
}

/// The settings of a pod, and which addresses it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Setting {
    pub(crate) stack: Stack,
    /// The preset that the flags start from.
    pub(crate) mesh: Option<Mesh>,
    pub(crate) rules: Rules,
    pub(crate) dual_stack: bool,
}

impl Setting {
    /// Those of istio-iptables without any flag, which capture nothing.
    pub(crate) fn bare() -> Self {
        Self {
            stack: Stack::Dual,
            mesh: None,
            rules: Rules::default(),
            dual_stack: true,
        }
    }

    /// A mesh's preset, in a pod of both families.
    pub(crate) fn of(mesh: Mesh) -> Self {
        Self {
            mesh: Some(mesh),
            rules: mesh.rules(),
            ..Self::bare()
        }
    }

    pub(crate) fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    /// What is in force without a flag of its own.
    pub(crate) fn base(&self) -> Rules {
        self.mesh.map_or_else(Rules::default, Mesh::rules)
    }

    /// Whether rules of IPv6 belong to it: as Istio concludes from the pod's
    /// first global address, or with dual stack from any.
    pub(crate) fn covers_ipv6(&self) -> bool {
        match self.stack {
            Stack::V4 => false,
            Stack::V6 => true,
            Stack::Dual => self.dual_stack,
        }
    }

    /// Whether lo has `::6`, as Istio's init container adds it.
    pub(crate) fn has_six(&self) -> bool {
        self.covers_ipv6() && matches!(self.rules.hairpin, Hairpin::Spared | Hairpin::Tunnel)
    }

    /// The proxy.
    pub(crate) fn proxy(&self) -> Owner {
        let uid = self.rules.uids[0];
        Owner::new(uid, *self.rules.gids.first().unwrap_or(&uid))
    }

    /// The last of several proxies, or somebody who would be one.
    pub(crate) fn second_proxy(&self) -> Owner {
        let second = |ids: &[u32]| ids.get(1).copied().unwrap_or(1338);
        Owner::new(second(&self.rules.uids), second(&self.rules.gids))
    }

    /// The nameservers of the pod.
    pub(crate) fn resolvers(&self) -> &[IpAddr] {
        match &self.rules.dns {
            Dns::Resolvers(servers) => servers,
            Dns::Off | Dns::All => &[],
        }
    }

    /// The tables for `iptables-restore`.
    pub(crate) fn ipv4_rules(&self) -> String {
        self.rules.ipv4() + &self.rules.mangle()
    }

    /// The tables for `ip6tables-restore`; empty ones where IPv6 passes
    /// untouched.
    pub(crate) fn ipv6_rules(&self) -> String {
        if self.covers_ipv6() {
            self.rules.ipv6() + &self.rules.mangle()
        } else {
            NO_RULES.to_owned()
        }
    }

    /// The settings that are not those of the base, as they are written.
    fn written(&self) -> Vec<(Field, String)> {
        let base = self.base();
        let mut written = Vec::new();
        if let Some(mesh) = self.mesh {
            written.push((Field::Mesh, mesh.name().to_owned()));
        }
        // Uids alone would have the gids follow.
        if (&self.rules.uids, &self.rules.gids) != (&base.uids, &base.gids) {
            written.push((Field::ProxyUids, list(&self.rules.uids)));
            written.push((Field::ProxyGids, list(&self.rules.gids)));
        }
        let all = values(&self.rules).into_iter().zip(values(&base));
        let differing = all.filter(|(own, base)| own != base);
        written.extend(differing.map(|(own, _)| own));
        if self.dual_stack {
            written.push((Field::DualStack, true.to_string()));
        }
        written
    }

    /// The flags of shunt.
    pub(crate) fn flags(&self) -> Vec<String> {
        let flags = self
            .written()
            .into_iter()
            .map(|(field, text)| match field.short() {
                Some(short) => vec![format!("-{short}"), text],
                None => vec![format!("--{}={text}", field.long())],
            });
        flags.flatten().collect()
    }

    /// What shunt understands.
    pub(crate) fn settings(&self) -> Settings {
        let written = self.written().into_iter().map(|(field, text)| Written {
            field,
            origin: Origin::Flag,
            text,
        });
        Settings::parse(&Inputs::from_iter(written))
            .unwrap_or_else(|error| panic!("{self}: {error}"))
    }
}

/// How each setting is written, owners apart.
fn values(rules: &Rules) -> [(Field, String); 20] {
    let (only, except): (&[u32], &[u32]) = match &rules.groups {
        Groups::Only(gids) => (gids, &[]),
        Groups::Except(gids) => (&[], gids),
    };
    let hairpin = |is| (rules.hairpin == is).to_string();
    [
        (Field::OutboundPort, rules.outbound_port.to_string()),
        (Field::InboundPort, rules.inbound_port.to_string()),
        (Field::TunnelPort, rules.tunnel_port.to_string()),
        (Field::InboundInclude, capture(&rules.inbound_ports)),
        (Field::InboundExclude, list(&rules.inbound_ports_exclude)),
        (Field::OutboundInclude, capture(&rules.outbound_ranges)),
        (Field::OutboundExclude, list(&rules.outbound_ranges_exclude)),
        (Field::OutboundPortsInclude, list(&rules.outbound_ports)),
        (
            Field::OutboundPortsExclude,
            list(&rules.outbound_ports_exclude),
        ),
        (Field::ExcludedInterfaces, list(&rules.interfaces_exclude)),
        (Field::VirtualInterfaces, list(&rules.interfaces_virtual)),
        (Field::RedirectDns, (rules.dns != Dns::Off).to_string()),
        (Field::CaptureAllDns, (rules.dns == Dns::All).to_string()),
        (Field::OwnerGroups, list(only)),
        (Field::OwnerGroupsExclude, list(except)),
        (Field::LoopbackCidr, rules.loopback.to_string()),
        (Field::DropInvalid, rules.drop_invalid.to_string()),
        (Field::TunnelHairpin, hairpin(Hairpin::Tunnel)),
        (Field::LegacyHairpin, hairpin(Hairpin::Legacy)),
        (Field::TunnelInbound, rules.tunnel_inbound.to_string()),
    ]
}

/// Tables that are empty.
const NO_RULES: &str = "*nat\nCOMMIT\n*mangle\nCOMMIT\n";

/// The flags, as a shell takes them.
impl Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let quoted = self.flags().into_iter().map(|word| {
            if word == "*" || word.is_empty() {
                format!("'{word}'")
            } else {
                word
            }
        });
        f.write_str(&quoted.collect::<Vec<_>>().join(" "))?;
        if let [first, others @ ..] = self.resolvers() {
            write!(f, " (nameservers {first}")?;
            others.iter().try_for_each(|ip| write!(f, ", {ip}"))?;
            f.write_str(")")?;
        }
        Ok(())
    }
}

fn list<T: Display>(items: &[T]) -> String {
    let items: Vec<_> = items.iter().map(T::to_string).collect();
    items.join(",")
}

fn capture<T: Display>(captured: &Capture<T>) -> String {
    match captured {
        Capture::All => "*".to_owned(),
        Capture::Listed(items) => list(items),
    }
}

/// Where what is asked about differs from the rules on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Deviation {
    /// The contract has the virtual interface lead to the outbound port
    /// whatever the destination, and puts `-c` before `-k`. The rules of Istio
    /// ask `-i` first, and `-k` before `-c`.
    VirtualInterface,
}

impl Deviation {
    pub(crate) const ALL: [Self; 1] = [Self::VirtualInterface];

    /// Why, for the reader of the documentation.
    pub(crate) const fn why(self) -> &'static str {
        match self {
            Self::VirtualInterface => {
                "what comes in through a `-k` interface goes to the outbound port whatever \
                 `-i` lists, and `-c` beats `-k`; with Istio's rules `-i` limits `-k`, and `-k` \
                 beats `-c`"
            }
        }
    }
}

impl Setting {
    /// Whether what a machine behind the pod's virtual interface sends is one
    /// of the deviations.
    pub(crate) fn deviation_of_machines(&self) -> Option<Deviation> {
        let own = &self.rules;
        let is_virtual = |pattern: &String| {
            let names = &own.interfaces_virtual;
            match pattern.strip_suffix('+') {
                Some(prefix) => names.iter().any(|name| name.starts_with(prefix)),
                None => names.contains(pattern),
            }
        };
        let deviates = own.outbound_ranges != Capture::All && !own.interfaces_virtual.is_empty()
            || own.interfaces_exclude.iter().any(is_virtual);
        deviates.then_some(Deviation::VirtualInterface)
    }
}

/// An address or a range.
pub(crate) fn range<T: std::str::FromStr<Err: fmt::Debug>>(text: &str) -> T {
    text.parse().expect("it is well written")
}

/// The source address of the proxy's calls to its application.
pub(crate) const SIX: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 6));
