//! What meshes write by default.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use shunt_abi::Hairpin;

use super::{Capture, Interfaces, OwnerGroups, Owners, PortSet, Problem, Settings, Splice};

type Named = (&'static str, fn() -> Settings);

/// The presets, by the names of the meshes.
pub(super) const ALL: [Named; 3] = [("istio", istio), ("linkerd", linkerd), ("kuma", kuma)];

/// The defaults of the mesh of that name.
pub(super) fn of_mesh(name: &str) -> Result<Settings, Problem> {
    ALL.iter()
        .find(|(known, _)| *known == name)
        .map(|(_, preset)| preset())
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
        inbound_exclude: PortSet::from_iter([15090, 15021, 15020]),
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
