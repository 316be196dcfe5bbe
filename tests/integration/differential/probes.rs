//! What is asked: classes of connections, in each form of address.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use shunt_tests::{Node, Owner, Probe, Source, Stack};

use super::{
    expect::Explainer,
    setting::{SIX, Setting},
    world::{self, World},
};

/// Every port that a rule speaks of, and two that none does.
pub(crate) const PORTS: [u16; 10] = [22, 53, 80, 8080, 15001, 15006, 15008, 15020, 15021, 15090];
/// A port on which nobody listens.
pub(crate) const CLOSED: u16 = 9;
/// Enough where the port hardly matters.
const FEW: [u16; 4] = [53, 80, 8080, 15008];

/// Connections that are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Class {
    AppOut,
    AppOwn,
    AppLoopback,
    AppUnspecified,
    ProxyOut,
    ProxyOwn,
    ProxyLoopback,
    UidOnly,
    GidOnly,
    SecondProxy,
    Groups,
    FromSix,
    Bound,
    Check,
    Inbound,
    MachineIn,
    MachineOut,
}

impl Class {
    pub(crate) const ALL: [Self; 17] = [
        Self::AppOut,
        Self::AppOwn,
        Self::AppLoopback,
        Self::AppUnspecified,
        Self::ProxyOut,
        Self::ProxyOwn,
        Self::ProxyLoopback,
        Self::UidOnly,
        Self::GidOnly,
        Self::SecondProxy,
        Self::Groups,
        Self::FromSix,
        Self::Bound,
        Self::Check,
        Self::Inbound,
        Self::MachineIn,
        Self::MachineOut,
    ];

    /// For the reader of the documentation.
    pub(crate) const fn describe(self) -> &'static str {
        match self {
            Self::AppOut => "an application calls hosts outside",
            Self::AppOwn => "an application calls addresses of its own pod",
            Self::AppLoopback => "an application calls 127.0.0.1, 127.0.0.2, 127.0.0.6, ::1, ::6",
            Self::AppUnspecified => "an application calls 0.0.0.0 or ::",
            Self::ProxyOut => "the proxy calls hosts outside",
            Self::ProxyOwn => "the proxy calls addresses of its own pod",
            Self::ProxyLoopback => "the proxy calls loopback, 0.0.0.0, ::",
            Self::UidOnly => "somebody with the proxy's uid and another gid calls anyone",
            Self::GidOnly => "somebody with the proxy's gid and another uid calls anyone",
            Self::SecondProxy => "the second of two proxies, or a stranger, calls anyone",
            Self::Groups => "applications of the groups 2001 and 2002 call anyone",
            Self::FromSix => "anyone calls the pod from 127.0.0.6 or ::6",
            Self::Bound => {
                "anyone calls anyone from a bound address, a bound port, or an address whose \
                 port is chosen late"
            }
            Self::Check => {
                "the mesh's start-up check: the proxy calls 127.0.0.6:15002 from 127.0.0.1, or \
                 ::6 from ::1"
            }
            Self::Inbound => "hosts outside call the pod",
            Self::MachineIn => "a machine behind the pod's interface `vif0` calls the pod",
            Self::MachineOut => "that machine calls hosts outside (asked only with `-k vif0`)",
        }
    }
}

/// The form of address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Version {
    V4,
    V6,
    /// An IPv6 socket that is given IPv4 addresses.
    Mapped,
}

impl Version {
    pub(crate) const ALL: [Self; 3] = [Self::V4, Self::V6, Self::Mapped];
}

/// Where a connection comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum From {
    Pod,
    Outside,
    Machine,
}

/// One connection to compare.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Question {
    pub(crate) class: Class,
    pub(crate) version: Version,
    pub(crate) from: From,
    pub(crate) probe: Probe,
}

/// Source ports for probes, in turn, all below 1024. Two connections whose ports the kernel
/// chose, from 32768 on, may look alike behind the rules; netfilter then draws another source
/// port for the later one, any from 1024 on (`nf_nat_l4proto_unique_tuple`). Were that a port
/// of these, the probe from it would be moved too, and on the rules' side alone.
#[derive(Debug, Default)]
pub(crate) struct SourcePorts(u16);

impl SourcePorts {
    const LAST: u16 = 1023;

    fn next(&mut self) -> Source {
        loop {
            self.0 = self.0 % Self::LAST + 1;
            // Where somebody listens nobody else may bind, and from the closed port to itself
            // a socket would be its own peer.
            if !PORTS.contains(&self.0) && self.0 != CLOSED {
                return Source::Port(self.0);
            }
        }
    }
}

/// Everything that is asked about a setting.
pub(crate) fn questions(setting: &Setting, ports: &mut SourcePorts) -> Vec<Question> {
    let mut questions = Vec::new();
    for version in Version::ALL {
        let mut asker = Asker {
            setting,
            version,
            places: Places::of(version, setting.stack),
            ports,
            questions: Vec::new(),
        };
        asker.ask();
        questions.append(&mut asker.questions);
    }
    let explainer = Explainer::new(setting);
    questions.retain(|question| explainer.is_answered(question));
    questions
}

/// Every owner from every source to every port of every destination.
pub(crate) fn combinations(
    setting: &Setting,
    version: Version,
    ports: &mut SourcePorts,
) -> Vec<Question> {
    let mut asker = Asker {
        setting,
        version,
        places: Places::of(version, setting.stack),
        ports,
        questions: Vec::new(),
    };
    asker.ask_combinations();
    let explainer = Explainer::new(setting);
    let mut questions = asker.questions;
    questions.retain(|question| explainer.is_answered(question));
    questions
}

/// Addresses of one version.
struct Places {
    outside: [IpAddr; 3],
    /// The pod's, on the interface to the node.
    own: Option<IpAddr>,
    /// The pod's, on the interface to the machine.
    gateway: Option<IpAddr>,
    /// The first is the one of which the rules speak.
    loopback: Vec<IpAddr>,
    six: IpAddr,
    unspecified: IpAddr,
}

impl Places {
    fn of(version: Version, stack: Stack) -> Self {
        let own = world::addresses(stack);
        let find = |ips: &[IpAddr], v4: bool| ips.iter().copied().find(|ip| ip.is_ipv4() == v4);
        let gateways: &[IpAddr] = match stack {
            Stack::Dual => &world::GATEWAYS,
            Stack::V4 | Stack::V6 => &[],
        };
        match version {
            Version::V4 => Self {
                outside: [Node::OUTSIDE, Node::FAR_OUTSIDE, Node::PRIVATE],
                own: find(&own, true),
                gateway: find(gateways, true),
                loopback: [1, 2]
                    .map(|last| Ipv4Addr::new(127, 0, 0, last).into())
                    .into(),
                six: SIX,
                unspecified: Ipv4Addr::UNSPECIFIED.into(),
            },
            Version::V6 => Self {
                outside: [Node::OUTSIDE6, Node::FAR_OUTSIDE6, Node::PRIVATE6],
                own: find(&own, false),
                gateway: find(gateways, false),
                loopback: vec![Ipv6Addr::LOCALHOST.into()],
                six: world::SIX6,
                unspecified: Ipv6Addr::UNSPECIFIED.into(),
            },
            Version::Mapped => Self::of(Version::V4, stack).mapped(),
        }
    }

    fn mapped(self) -> Self {
        Self {
            outside: self.outside.map(mapped),
            own: self.own.map(mapped),
            gateway: self.gateway.map(mapped),
            loopback: self.loopback.into_iter().map(mapped).collect(),
            six: mapped(self.six),
            unspecified: mapped(self.unspecified),
        }
    }
}

fn mapped(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().into(),
        IpAddr::V6(_) => ip,
    }
}

/// Puts questions together, for one version of addresses.
struct Asker<'a> {
    setting: &'a Setting,
    version: Version,
    places: Places,
    ports: &'a mut SourcePorts,
    questions: Vec<Question>,
}

impl Asker<'_> {
    fn ask(&mut self) {
        let proxy = self.setting.proxy();
        let app = Owner::APP;
        let second = self.setting.second_proxy();
        let groups = [2001, 2002].map(|gid| Owner::new(app.uid, gid));
        self.ask_out(Class::AppOut, app);
        self.ask_out(Class::ProxyOut, proxy);
        self.ask_own(Class::AppOwn, app);
        self.ask_own(Class::ProxyOwn, proxy);
        let unspecified = [self.places.unspecified];
        let loopback = self.places.loopback.clone();
        // Where nobody has added ::6 it is a host that there is not.
        let is_own = self.version != Version::V6 || self.setting.has_six();
        let six = present([is_own.then_some(self.places.six)]);
        self.ask_all(Class::AppLoopback, app, &loopback);
        self.ask_few(Class::AppLoopback, app, &six);
        self.ask_all(Class::AppUnspecified, app, &unspecified);
        self.ask_all(Class::ProxyLoopback, proxy, &loopback);
        self.ask_few(Class::ProxyLoopback, proxy, &six);
        self.ask_all(Class::ProxyLoopback, proxy, &unspecified);
        self.ask_anyone(Class::UidOnly, Owner::new(proxy.uid, app.gid));
        self.ask_anyone(Class::GidOnly, Owner::new(app.uid, proxy.gid));
        self.ask_anyone(Class::SecondProxy, second);
        for owner in groups {
            self.ask_anyone(Class::Groups, owner);
        }
        for owner in [app, proxy] {
            self.ask_from_six(owner);
            self.ask_bound(owner);
        }
        for six in six {
            let check = Probe::new(proxy, (six, 15002));
            self.push(Class::Check, check.from(Source::Addr(loopback[0])));
        }
        if self.version != Version::Mapped {
            self.ask_inbound();
            self.ask_from_machine();
        }
    }

    fn push(&mut self, class: Class, probe: Probe) {
        self.push_from(From::Pod, class, probe);
    }

    fn push_from(&mut self, from: From, class: Class, probe: Probe) {
        self.questions.push(Question {
            class,
            version: self.version,
            from,
            probe,
        });
    }

    fn ask_all(&mut self, class: Class, owner: Owner, ips: &[IpAddr]) {
        for &ip in ips {
            for port in PORTS.into_iter().chain([CLOSED]) {
                self.push(class, Probe::new(owner, (ip, port)));
            }
        }
    }

    fn ask_few(&mut self, class: Class, owner: Owner, ips: &[IpAddr]) {
        for &ip in ips {
            for port in FEW {
                self.push(class, Probe::new(owner, (ip, port)));
            }
        }
    }

    fn ask_out(&mut self, class: Class, owner: Owner) {
        let [outside, others @ ..] = self.places.outside;
        self.ask_all(class, owner, &[outside]);
        self.ask_few(class, owner, &others);
    }

    fn ask_own(&mut self, class: Class, owner: Owner) {
        if let Some(own) = self.places.own {
            self.ask_all(class, owner, &[own]);
        }
        if let Some(gateway) = self.places.gateway {
            self.ask_few(class, owner, &[gateway]);
        }
    }

    fn ask_anyone(&mut self, class: Class, owner: Owner) {
        let second_loopback = self.places.loopback.last().copied();
        let ips = [
            Some(self.places.outside[0]),
            self.places.own,
            second_loopback,
        ];
        self.ask_few(class, owner, &present(ips));
    }

    fn ask_from_six(&mut self, owner: Owner) {
        let six = self.places.six;
        let ips = present([self.places.own, Some(self.places.loopback[0])]);
        for ip in ips {
            for source in [Source::Addr(six), Source::AddrLatePort(six)] {
                for port in FEW {
                    self.push(Class::FromSix, Probe::new(owner, (ip, port)).from(source));
                }
            }
        }
    }

    fn ask_bound(&mut self, owner: Owner) {
        let ips = present([Some(self.places.outside[0]), self.places.own]);
        for ip in ips {
            for port in FEW {
                let probe = Probe::new(owner, (ip, port));
                let any_address = self.ports.next();
                self.push(Class::Bound, probe.from(any_address));
                if let Some(own) = self.places.own {
                    self.push(Class::Bound, probe.from(Source::Addr(own)));
                    self.push(Class::Bound, probe.from(Source::AddrLatePort(own)));
                }
            }
            let from_loopback = Source::Addr(self.places.loopback[0]);
            self.push(
                Class::Bound,
                Probe::new(owner, (ip, 80)).from(from_loopback),
            );
        }
    }

    fn ask_combinations(&mut self) {
        let owners = [
            Owner::APP,
            Owner::ROOT,
            Owner::PROXY,
            Owner::PROXY_UID,
            Owner::PROXY_GID,
            Owner::new(1338, 1338),
        ];
        let places = &self.places;
        let (six, loopback) = (places.six, places.loopback[0]);
        let own = places.own.expect("it is asked of pods that have one");
        let sources = [six, loopback, own].map(Source::Addr);
        let sources = [&sources[..], &[Source::Unbound, Source::AddrLatePort(six)]].concat();
        let destinations = [
            &places.outside[..],
            &places.loopback,
            &[own, six, places.unspecified],
        ]
        .concat();
        let callers = [places.outside[0], places.outside[1]].map(Source::Addr);
        let callers = [&callers[..], &[Source::Unbound]].concat();
        let is_mapped = self.version == Version::Mapped;
        for owner in owners {
            self.ask_from_each(From::Pod, owner, &sources, &destinations);
            if matches!(owner, Owner::APP | Owner::PROXY) && !is_mapped {
                self.ask_from_each(From::Outside, owner, &callers, &[own]);
            }
        }
    }

    /// From each source and from a port.
    fn ask_from_each(&mut self, from: From, owner: Owner, sources: &[Source], ips: &[IpAddr]) {
        let class = match from {
            From::Pod | From::Machine => Class::Bound,
            From::Outside => Class::Inbound,
        };
        for &ip in ips {
            for port in PORTS.into_iter().chain([CLOSED]) {
                let probe = Probe::new(owner, (ip, port));
                let from_port = self.ports.next();
                for source in sources.iter().copied().chain([from_port]) {
                    self.push_from(from, class, probe.from(source));
                }
            }
        }
    }

    fn ask_inbound(&mut self) {
        let Some(own) = self.places.own else {
            return;
        };
        for owner in [Owner::APP, self.setting.proxy()] {
            for port in PORTS.into_iter().chain([CLOSED]) {
                let probe = Probe::new(owner, (own, port));
                let [outside, _, private] = self.places.outside;
                let source = if owner == Owner::APP {
                    Source::Addr(outside)
                } else {
                    Source::Addr(private)
                };
                let from_port = self.ports.next();
                for source in [Source::Unbound, source, from_port] {
                    self.push_from(From::Outside, Class::Inbound, probe.from(source));
                }
            }
        }
    }

    fn ask_from_machine(&mut self) {
        let Some(gateway) = self.places.gateway else {
            return;
        };
        let own = self.places.own;
        for ip in present([Some(gateway), own]) {
            for port in PORTS.into_iter().chain([CLOSED]) {
                let probe = Probe::new(Owner::APP, (ip, port));
                self.push_from(From::Machine, Class::MachineIn, probe);
            }
        }
        let is_virtual = |name: &String| name == world::VIRTUAL;
        if self.setting.rules.interfaces_virtual.iter().any(is_virtual) {
            for ip in self.places.outside {
                for port in FEW {
                    let probe = Probe::new(Owner::APP, (ip, port));
                    self.push_from(From::Machine, Class::MachineOut, probe);
                }
            }
        }
    }
}

/// Those that there are.
fn present<const N: usize>(ips: [Option<IpAddr>; N]) -> Vec<IpAddr> {
    ips.into_iter().flatten().collect()
}

impl World {
    /// Who listens: whether somebody takes connections to this port of a pod,
    /// or of the hosts outside.
    pub(crate) fn listens(place: &str, port: u16) -> bool {
        PORTS.contains(&port) || place == "pod" && world::PROXY_PORTS.contains(&port)
    }
}
