//! What a pod's redirection is asked to do: the words of mesh users, read,
//! typed and turned into what the programs look up.
//!
//! ```text
//! flags, environment ─┐
//!                     ├─ Inputs ─ parse ─ Settings ─ compile ─ Compiled ─ BPF maps
//! pod annotations ────┘                                            └────── HostLists (explain, tests)
//! ```
//!
//! There is one parser for all of them ([`Settings::parse`]); an error says
//! where the setting was written, and which item of it is wrong. A list is
//! comma separated; blanks around an item and empty items are ignored.

mod annotations;
mod as_flags;
mod compile;
mod error;
mod field;
mod flags;
mod host_lists;
mod preset;
mod received;
mod resolv_conf;
mod splice;
#[cfg(test)]
pub(crate) mod tests;
mod values;
mod written;

use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Serialize};
use shunt_abi::Hairpin;

pub use self::{
    annotations::annotations,
    as_flags::AsFlags,
    compile::{Compiled, Enrolment, Families, compile},
    error::{Problem, SettingsError},
    field::Field,
    flags::{Flags, process_env},
    host_lists::HostLists,
    preset::Mesh,
    resolv_conf::{BadNameserver, ResolvConfError, read_resolv_conf, resolv_conf},
    splice::Splice,
    values::{Capture, Groups, Ids, Interfaces, Owners, PortSet, truth},
    written::{Inputs, Origin, Written},
};

/// The settings of one pod. Ports and ids are plain numbers (host byte order),
/// ids as the pod numbers them.
///
/// There is no interception mode: REDIRECT is the only one (see
/// [`Problem::Tproxy`]).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// `-p`: where the proxy takes outbound connections.
    #[serde(deserialize_with = "received::port")]
    pub outbound_port: u16,
    /// `-z`: where the proxy takes inbound connections.
    #[serde(deserialize_with = "received::port")]
    pub inbound_port: u16,
    /// `-e`: the port of the mesh's own tunnel.
    #[serde(deserialize_with = "received::port")]
    pub tunnel_port: u16,
    /// Where the proxy answers DNS.
    #[serde(deserialize_with = "received::port")]
    pub dns_port: u16,
    /// `-u`: the uids that the proxy runs as.
    #[serde(deserialize_with = "received::some_ids")]
    pub proxy_uids: Owners,
    /// `-g`: the gids that the proxy runs as.
    pub proxy_gids: Owners,
    /// `-b`: inbound ports to capture.
    pub inbound_include: Capture<PortSet>,
    /// `-d`: inbound ports to leave alone when all are captured.
    pub inbound_exclude: PortSet,
    /// `-i`: destinations to capture.
    #[serde(deserialize_with = "received::captured_ranges")]
    pub outbound_include: Capture<Vec<IpNet>>,
    /// `-x`: destinations to leave alone.
    #[serde(deserialize_with = "received::ranges")]
    pub outbound_exclude: Vec<IpNet>,
    /// `-q`: outbound ports to capture whatever the destination.
    pub outbound_ports_include: PortSet,
    /// `-o`: outbound ports to leave alone.
    pub outbound_ports_exclude: PortSet,
    /// `-c`: interfaces to leave alone.
    pub excluded_interfaces: Interfaces,
    /// `-k`: interfaces whose inbound connections count as outbound.
    pub virtual_interfaces: Interfaces,
    /// `REDIRECT_DNS`
    pub redirect_dns: bool,
    /// `CAPTURE_ALL_DNS`; without `redirect_dns` it means nothing.
    pub capture_all_dns: bool,
    /// `DUAL_STACK`
    pub dual_stack: bool,
    /// `ISTIO_OUTBOUND_OWNER_GROUPS` and `_EXCLUDE`
    pub owner_groups: OwnerGroups,
    /// `ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR`
    #[serde(deserialize_with = "received::loopback")]
    pub loopback: Ipv4Net,
    /// `DROP_INVALID`: kept for whoever asks; without connection tracking there
    /// is nothing to drop.
    pub drop_invalid: bool,
    /// What becomes of the proxy's calls to its own pod.
    #[serde(with = "HairpinName")]
    pub hairpin: Hairpin,
    /// The tunnel port is captured inbound like any other.
    pub tunnel_inbound: bool,
    /// How far connections are spliced, within what the node allows.
    pub splice: Splice,
}

/// Whose sockets are captured, by the gid of their owner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OwnerGroups {
    /// Everybody's.
    All,
    /// Those of the listed groups.
    Only(#[serde(deserialize_with = "received::some_ids")] Groups),
    /// Those of all but the listed groups.
    Except(#[serde(deserialize_with = "received::some_ids")] Groups),
}

/// How [`Hairpin`] is written where the settings are stored or sent.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Hairpin", rename_all = "snake_case")]
enum HairpinName {
    Spared,
    Tunnel,
    Legacy,
    None,
}

/// The defaults of istio-iptables, which capture nothing.
impl Default for Settings {
    fn default() -> Self {
        preset::istio_iptables()
    }
}

impl Settings {
    /// Understands what was written. What was not written has the default of
    /// the mesh that [`Field::Mesh`] names, or else of istio-iptables.
    ///
    /// # Errors
    ///
    /// The first setting that does not mean anything, in the order of
    /// [`Field::ALL`].
    pub fn parse(inputs: &Inputs) -> Result<Self, SettingsError> {
        let read = Reader { inputs };
        let base = read.value(Field::Mesh, preset::of_mesh, Self::default())?;
        let outbound_port = read.value(Field::OutboundPort, values::port, base.outbound_port)?;
        let inbound_port = read.value(Field::InboundPort, values::port, base.inbound_port)?;
        let tunnel_port = read.value(Field::TunnelPort, values::port, base.tunnel_port)?;
        let dns_port = read.value(Field::DnsPort, values::port, base.dns_port)?;
        let (proxy_uids, proxy_gids) = read.owners(&base)?;
        read.value(Field::Mode, values::mode, ())?;
        let listed_ports = |text: &str| Capture::parse(text, PortSet::parse);
        let listed_cidrs = |text: &str| Capture::parse(text, values::cidrs);
        Ok(Self {
            outbound_port,
            inbound_port,
            tunnel_port,
            dns_port,
            proxy_uids,
            proxy_gids,
            inbound_include: read.list(
                Field::InboundInclude,
                listed_ports,
                base.inbound_include,
            )?,
            inbound_exclude: read.list(
                Field::InboundExclude,
                PortSet::parse,
                base.inbound_exclude,
            )?,
            outbound_include: read.list(
                Field::OutboundInclude,
                listed_cidrs,
                base.outbound_include,
            )?,
            outbound_exclude: read.list(
                Field::OutboundExclude,
                excluded_cidrs,
                base.outbound_exclude,
            )?,
            outbound_ports_include: read.list(
                Field::OutboundPortsInclude,
                PortSet::parse,
                base.outbound_ports_include,
            )?,
            outbound_ports_exclude: read.list(
                Field::OutboundPortsExclude,
                PortSet::parse,
                base.outbound_ports_exclude,
            )?,
            excluded_interfaces: read.list(
                Field::ExcludedInterfaces,
                Interfaces::parse,
                base.excluded_interfaces,
            )?,
            virtual_interfaces: read.list(
                Field::VirtualInterfaces,
                Interfaces::parse,
                base.virtual_interfaces,
            )?,
            redirect_dns: read.truth(Field::RedirectDns, base.redirect_dns)?,
            capture_all_dns: read.truth(Field::CaptureAllDns, base.capture_all_dns)?,
            dual_stack: read.truth(Field::DualStack, base.dual_stack)?,
            owner_groups: read.owner_groups()?,
            loopback: read.value(Field::LoopbackCidr, values::loopback, base.loopback)?,
            drop_invalid: read.truth(Field::DropInvalid, base.drop_invalid)?,
            hairpin: read.hairpin(base.hairpin)?,
            tunnel_inbound: read.truth(Field::TunnelInbound, base.tunnel_inbound)?,
            splice: read.value(Field::Splice, Splice::parse, base.splice)?,
        })
    }
}

/// `-x` takes no `*`.
fn excluded_cidrs(text: &str) -> Result<Vec<IpNet>, Problem> {
    match Capture::parse(text, values::cidrs)? {
        Capture::All => Err(Problem::ExcludesEverything),
        Capture::Listed(cidrs) => Ok(cidrs),
    }
}

/// Reads settings one by one.
struct Reader<'a> {
    inputs: &'a Inputs,
}

impl Reader<'_> {
    /// A single value; an empty one counts as not written.
    fn value<T>(
        &self,
        field: Field,
        parse: impl FnOnce(&str) -> Result<T, Problem>,
        default: T,
    ) -> Result<T, SettingsError> {
        match self.inputs.get(field) {
            Some(written) if !written.text.trim().is_empty() => {
                blame(written, parse(written.text.trim()))
            }
            Some(_) | None => Ok(default),
        }
    }

    /// A list; an empty one is a list without items.
    fn list<T>(
        &self,
        field: Field,
        parse: impl FnOnce(&str) -> Result<T, Problem>,
        default: T,
    ) -> Result<T, SettingsError> {
        match self.inputs.get(field) {
            Some(written) => blame(written, parse(&written.text)),
            None => Ok(default),
        }
    }

    fn truth(&self, field: Field, default: bool) -> Result<bool, SettingsError> {
        self.value(field, values::truth, default)
    }

    /// The uids and gids of the proxy. An empty list counts as not written, as
    /// in istio-iptables; gids that are not written are those of the mesh, and
    /// where the mesh looks at gids at all, the same numbers as the uids.
    fn owners(&self, base: &Settings) -> Result<(Owners, Owners), SettingsError> {
        let written = |field| self.value(field, Owners::parse, Owners::default());
        let or = |ids: Owners, default: &Owners| match ids.as_slice() {
            [] => default.clone(),
            _ => ids,
        };
        let uids = or(written(Field::ProxyUids)?, &base.proxy_uids);
        let gids = written(Field::ProxyGids)?;
        let gids = match base.proxy_gids.as_slice() {
            [] => gids,
            _ => or(gids, &uids),
        };
        Ok((uids, gids))
    }

    /// As in Istio, groups to leave out only count where all others are
    /// captured. An empty list of groups to capture counts as not written:
    /// istio-iptables would capture nobody.
    fn owner_groups(&self) -> Result<OwnerGroups, SettingsError> {
        let groups = |text: &str| Capture::parse(text, Groups::parse);
        let only = self.list(Field::OwnerGroups, groups, Capture::All)?;
        let except = self.list(Field::OwnerGroupsExclude, Groups::parse, Groups::default())?;
        Ok(match (only, except) {
            (Capture::Listed(only), _) if !only.as_slice().is_empty() => OwnerGroups::Only(only),
            (_, except) if !except.as_slice().is_empty() => OwnerGroups::Except(except),
            _ => OwnerGroups::All,
        })
    }

    fn hairpin(&self, base: Hairpin) -> Result<Hairpin, SettingsError> {
        let tunnel = self.truth(Field::TunnelHairpin, base == Hairpin::Tunnel)?;
        let legacy = self.truth(Field::LegacyHairpin, false)?;
        let asked = |field| self.inputs.get(field);
        match (asked(Field::LegacyHairpin), asked(Field::TunnelHairpin)) {
            (Some(written), Some(_)) if legacy && tunnel => {
                blame(written, Err(Problem::TwoHairpins))
            }
            _ if legacy => Ok(Hairpin::Legacy),
            _ if tunnel => Ok(Hairpin::Tunnel),
            _ if base == Hairpin::Tunnel => Ok(Hairpin::Spared),
            _ => Ok(base),
        }
    }
}

fn blame<T>(written: &Written, outcome: Result<T, Problem>) -> Result<T, SettingsError> {
    outcome.map_err(|problem| SettingsError {
        written: Box::new(written.clone()),
        problem,
    })
}
