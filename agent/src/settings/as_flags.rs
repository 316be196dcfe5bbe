//! Settings as somebody would write them.

use std::fmt::{self, Display};

use ipnet::IpNet;
use shunt_abi::Hairpin;

use super::{
    Capture, Field, Ids, Inputs, Mesh, Origin, OwnerGroups, Settings, Written, written::Excerpt,
};

/// The flags that give settings: the preset of a mesh, and what differs from it.
/// Shown as a shell takes them, but for long lists, which are cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AsFlags(Vec<Written>);

impl Settings {
    /// The fewest flags that give these settings; `None` where none do, which
    /// cannot be of settings that were parsed.
    pub fn as_flags(&self) -> Option<AsFlags> {
        let bare = std::iter::once((None, Self::default()));
        let meshes = Mesh::ALL.map(|mesh| (Some(mesh.name()), mesh.settings()));
        bare.chain(meshes)
            .map(|(mesh, base)| self.beside(mesh, &base))
            // The parser has the last word on what flags mean.
            .filter(|flags| {
                Self::parse(&flags.iter().cloned().collect::<Inputs>()).as_ref() == Ok(self)
            })
            .min_by_key(Vec::len)
            .map(AsFlags)
    }

    /// The flags for what differs from a preset.
    fn beside(&self, mesh: Option<&str>, base: &Self) -> Vec<Written> {
        let mut expected = base.texts();
        for (field, text) in &mut expected {
            // Gids that are not written are the uids, where there are any.
            if *field == Field::ProxyGids && !text.is_empty() {
                *text = id_list(&self.proxy_uids);
            }
        }
        let differing = self.texts().into_iter().zip(expected);
        let differing = differing.filter(|(own, expected)| own != expected);
        let mesh = mesh.map(|name| (Field::Mesh, name.to_owned()));
        mesh.into_iter()
            .chain(differing.map(|(own, _)| own))
            .map(|(field, text)| Written {
                field,
                origin: Origin::Flag,
                text,
            })
            .collect()
    }

    /// What each flag would have to say, in the order of [`Field::ALL`].
    fn texts(&self) -> Vec<(Field, String)> {
        let Self {
            outbound_port,
            inbound_port,
            tunnel_port,
            dns_port,
            proxy_uids,
            proxy_gids,
            inbound_include,
            inbound_exclude,
            outbound_include,
            outbound_exclude,
            outbound_ports_include,
            outbound_ports_exclude,
            excluded_interfaces,
            virtual_interfaces,
            redirect_dns,
            capture_all_dns,
            dual_stack,
            owner_groups,
            loopback,
            drop_invalid,
            hairpin,
            tunnel_inbound,
            splice,
        } = self;
        let (only, except) = match owner_groups {
            OwnerGroups::All => ("*".to_owned(), String::new()),
            OwnerGroups::Only(groups) => (id_list(groups), String::new()),
            OwnerGroups::Except(groups) => ("*".to_owned(), id_list(groups)),
        };
        vec![
            (Field::OutboundPort, outbound_port.to_string()),
            (Field::InboundPort, inbound_port.to_string()),
            (Field::TunnelPort, tunnel_port.to_string()),
            (Field::DnsPort, dns_port.to_string()),
            (Field::ProxyUids, id_list(proxy_uids)),
            (Field::ProxyGids, id_list(proxy_gids)),
            (
                Field::InboundInclude,
                captured(inbound_include, ToString::to_string),
            ),
            (Field::InboundExclude, inbound_exclude.to_string()),
            (
                Field::OutboundInclude,
                captured(outbound_include, |nets| range_list(nets)),
            ),
            (Field::OutboundExclude, range_list(outbound_exclude)),
            (
                Field::OutboundPortsInclude,
                outbound_ports_include.to_string(),
            ),
            (
                Field::OutboundPortsExclude,
                outbound_ports_exclude.to_string(),
            ),
            (
                Field::ExcludedInterfaces,
                excluded_interfaces.as_slice().join(","),
            ),
            (
                Field::VirtualInterfaces,
                virtual_interfaces.as_slice().join(","),
            ),
            (Field::RedirectDns, redirect_dns.to_string()),
            (Field::CaptureAllDns, capture_all_dns.to_string()),
            (Field::DualStack, dual_stack.to_string()),
            (Field::OwnerGroups, only),
            (Field::OwnerGroupsExclude, except),
            (Field::LoopbackCidr, loopback.to_string()),
            (Field::DropInvalid, drop_invalid.to_string()),
            (
                Field::TunnelHairpin,
                (*hairpin == Hairpin::Tunnel).to_string(),
            ),
            (
                Field::LegacyHairpin,
                (*hairpin == Hairpin::Legacy).to_string(),
            ),
            (Field::TunnelInbound, tunnel_inbound.to_string()),
            (Field::Splice, splice.name().to_owned()),
        ]
    }
}

fn captured<T>(capture: &Capture<T>, list: impl FnOnce(&T) -> String) -> String {
    match capture {
        Capture::All => "*".to_owned(),
        Capture::Listed(listed) => list(listed),
    }
}

fn id_list<const MAX: usize>(ids: &Ids<MAX>) -> String {
    list(ids.as_slice())
}

fn range_list(nets: &[IpNet]) -> String {
    list(nets)
}

fn list(items: &[impl Display]) -> String {
    let items: Vec<String> = items.iter().map(ToString::to_string).collect();
    items.join(",")
}

impl Display for AsFlags {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, Written { field, text, .. }) in self.0.iter().enumerate() {
            let blank = if i == 0 { "" } else { " " };
            let equals = if field.is_switch() { "=" } else { " " };
            let plain = |c: char| c.is_ascii_alphanumeric() || ".,:/-_+".contains(c);
            let quote = if !text.is_empty() && text.chars().all(plain) {
                ""
            } else {
                "'"
            };
            let text = Excerpt(text);
            write!(out, "{blank}{}{equals}{quote}{text}{quote}", field.flag())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::settings;

    fn shown(args: &str) -> String {
        let settings = settings(args).unwrap_or_else(|error| panic!("{error}"));
        settings
            .as_flags()
            .expect("it was written as flags")
            .to_string()
    }

    #[test]
    fn what_a_mesh_writes_anyway_is_left_out() {
        for args in [
            "",
            "--mesh istio",
            "--mesh linkerd",
            "--mesh kuma",
            "--mesh istio -o 5432 --redirect-dns=true",
            "--mesh istio -u 1338",
            "--mesh istio -g 7",
            "--mesh istio -q 80 -c eth1",
            "--mesh linkerd -g 2102",
            "--mesh kuma --tunnel-hairpin=false",
            "--mesh kuma --tunnel-hairpin=false --legacy-hairpin=true",
            "--mesh istio --outbound-owner-groups 5,6",
            "--mesh istio --outbound-owner-groups-exclude 5",
        ] {
            assert_eq!(shown(args), args);
        }
        let istio_init = "-p 15001 -z 15006 -u 1337 -g 1337 -m REDIRECT -i * -x '' -b * \
                          -d 15090,15021,15020";
        assert_eq!(shown(istio_init), "--mesh istio");
        assert_eq!(shown("-b *"), "-b '*'");
        assert_eq!(shown("--mesh linkerd -o ''"), "--mesh linkerd -o ''");
        assert_eq!(shown("-b 80-90"), "-b 80-90");
    }

    #[test]
    fn long_lists_are_cut() {
        let many: Vec<String> = (0..100).map(|i| format!("10.0.{i}.0/24")).collect();
        let shown = shown(&format!("--mesh istio -x {}", many.join(",")));
        assert!(shown.len() < 150 && shown.ends_with('…'), "{shown}");
    }
}
