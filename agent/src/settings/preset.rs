//! What meshes write by default.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use shunt_abi::Hairpin;

use super::{Capture, Interfaces, OwnerGroups, Owners, PortSet, Problem, Settings, Splice};

/// A mesh with known settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mesh {
    /// Istio
    Istio,
    /// Linkerd
    Linkerd,
    /// Kuma, and Kong Mesh
    Kuma,
}

impl Mesh {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Istio, Self::Linkerd, Self::Kuma];

    /// What `--mesh` calls it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Istio => "istio",
            Self::Linkerd => "linkerd",
            Self::Kuma => "kuma",
        }
    }

    /// The defaults of its injector.
    pub(super) fn settings(self) -> Settings {
        match self {
            Self::Istio => istio(),
            Self::Linkerd => linkerd(),
            Self::Kuma => kuma(),
        }
    }

    /// The sidecar's own ports. They are left alone inbound whatever the
    /// annotations of a pod say: health checks and metrics are asked for there.
    pub const fn own_ports(self) -> &'static [u16] {
        match self {
            Self::Istio => &[15090, 15021, 15020],
            Self::Linkerd => &[4190, 4191],
            Self::Kuma => &[],
        }
    }

    /// Whether the pods of this mesh heed an annotation: those of its own domain,
    /// and those of shunt.
    pub(crate) fn heeds(self, annotation: &str) -> bool {
        let mesh = match self {
            Self::Istio => "istio.io",
            Self::Linkerd => "linkerd.io",
            Self::Kuma => "kuma.io",
        };
        let domain = annotation.split('/').next().unwrap_or_default();
        [mesh, "shunt.io"].iter().any(|own| {
            domain
                .strip_suffix(own)
                .is_some_and(|sub| sub.is_empty() || sub.ends_with('.'))
        })
    }
}

/// The defaults of the mesh of that name.
pub(super) fn of_mesh(name: &str) -> Result<Settings, Problem> {
    Mesh::ALL
        .into_iter()
        .find(|mesh| mesh.name() == name)
        .map(Mesh::settings)
        .ok_or_else(|| Problem::Mesh(name.to_owned()))
}

/// istio-iptables without flags: nothing is captured.
pub(super) fn istio_iptables() -> Settings {
    Settings {
        outbound_port: 15001,
        inbound_port: 15006,
        tunnel_port: 15008,
        dns_port: 15053,
        proxy_uids: Owners::one(1337),
        proxy_gids: Owners::one(1337),
        inbound_include: Capture::Listed(PortSet::default()),
        inbound_exclude: PortSet::default(),
        outbound_include: Capture::Listed(Vec::new()),
        outbound_exclude: Vec::new(),
        outbound_ports_include: PortSet::default(),
        outbound_ports_exclude: PortSet::default(),
        excluded_interfaces: Interfaces::default(),
        virtual_interfaces: Interfaces::default(),
        redirect_dns: false,
        capture_all_dns: false,
        dual_stack: false,
        owner_groups: OwnerGroups::All,
        loopback: Ipv4Net::from(Ipv4Addr::LOCALHOST),
        drop_invalid: false,
        hairpin: Hairpin::Spared,
        tunnel_inbound: false,
        splice: Splice::Auto,
    }
}

/// Istio's injector: everything is captured but the sidecar's own ports.
fn istio() -> Settings {
    Settings {
        inbound_exclude: Mesh::Istio.own_ports().iter().copied().collect(),
        ..capturing_everything()
    }
}

/// Linkerd's injector. It looks at the uid alone, leaves every call within the
/// pod alone, and has no tunnel port. Its proxy takes a read that fills less than
/// its buffer for the last one, and would miss what came by TCP after spliced bytes.
fn linkerd() -> Settings {
    Settings {
        outbound_port: 4140,
        inbound_port: 4143,
        proxy_uids: Owners::one(2102),
        proxy_gids: Owners::default(),
        inbound_exclude: PortSet::from_iter([4190, 4191, 4567, 4568]),
        outbound_ports_exclude: PortSet::from_iter([4567, 4568]),
        hairpin: Hairpin::None,
        tunnel_inbound: true,
        splice: Splice::Off,
        ..capturing_everything()
    }
}

/// Kuma's injector. It looks at the uid alone, and has no tunnel port.
fn kuma() -> Settings {
    Settings {
        proxy_uids: Owners::one(5678),
        proxy_gids: Owners::default(),
        hairpin: Hairpin::Tunnel,
        tunnel_inbound: true,
        ..capturing_everything()
    }
}

fn capturing_everything() -> Settings {
    Settings {
        inbound_include: Capture::All,
        outbound_include: Capture::All,
        ..istio_iptables()
    }
}
