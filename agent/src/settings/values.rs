//! The values that settings are made of, and how each of them is read. Reading
//! never panics, whatever the text.

use std::{fmt, net::IpAddr, ops::RangeInclusive, str::FromStr};

use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Serialize};
use shunt_abi::{MAX_GROUPS, MAX_OWNERS, NO_OWNER};

use super::Problem;

/// The items of a list: comma separated, blanks around them and empty ones
/// ignored.
pub(super) fn items(text: &str) -> impl Iterator<Item = &str> {
    text.split(',')
        .map(str::trim)
        .filter(|item| !item.is_empty())
}

/// Everything, or what a list says; an empty list is nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Capture<T> {
    /// `*`
    All,
    /// What the list holds.
    Listed(T),
}

impl<T> Capture<T> {
    /// Reads `*`, or else a list. Istio takes `*` for everything only when it
    /// is all there is, and so does this.
    pub(super) fn parse(
        text: &str,
        list: impl FnOnce(&str) -> Result<T, Problem>,
    ) -> Result<Self, Problem> {
        let mut wildcards = items(text).map(|item| item == "*");
        let (first, others) = (wildcards.next(), wildcards.collect::<Vec<_>>());
        match first {
            Some(true) if others.is_empty() => Ok(Self::All),
            _ if first == Some(true) || others.contains(&true) => Err(Problem::WildcardAmongOthers),
            _ => Ok(Self::Listed(list(text)?)),
        }
    }
}

/// A set of ports, 1 to 65535, host byte order. It is written as a list of
/// ports and ranges: `80,443,8000-8999`.
///
/// Kept as ranges that neither touch nor overlap, ascending, so that a list
/// that says `1-65535` a thousand times costs no more than one that says it
/// once.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PortSet(Vec<RangeInclusive<u16>>);

impl PortSet {
    /// Reads a list of ports and of ranges of ports, which are written `A-B`
    /// or, as iptables does, `A:B`.
    pub(super) fn parse(text: &str) -> Result<Self, Problem> {
        let ranges = items(text).map(port_range).collect::<Result<_, _>>()?;
        Ok(Self::merged(ranges))
    }

    fn merged(mut ranges: Vec<RangeInclusive<u16>>) -> Self {
        ranges.sort_unstable_by_key(|range| *range.start());
        let mut merged: Vec<RangeInclusive<u16>> = Vec::new();
        for range in ranges {
            match merged.last_mut() {
                Some(last) if *range.start() <= last.end().saturating_add(1) => {
                    *last = *last.start()..=*last.end().max(range.end());
                }
                _ => merged.push(range),
            }
        }
        Self(merged)
    }

    /// The ports, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u16> {
        self.0.iter().cloned().flatten()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<u16> for PortSet {
    /// Port 0 is left out: nobody can be reached there.
    fn from_iter<T: IntoIterator<Item = u16>>(ports: T) -> Self {
        let ports = ports.into_iter().filter(|&port| port != 0);
        Self::merged(ports.map(|port| port..=port).collect())
    }
}

impl TryFrom<String> for PortSet {
    type Error = Problem;

    fn try_from(text: String) -> Result<Self, Problem> {
        Self::parse(&text)
    }
}

impl From<PortSet> for String {
    fn from(ports: PortSet) -> Self {
        ports.to_string()
    }
}

impl fmt::Display for PortSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, range) in self.0.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            match (range.start(), range.end()) {
                (start, end) if start == end => write!(f, "{comma}{start}")?,
                (start, end) => write!(f, "{comma}{start}-{end}")?,
            }
        }
        Ok(())
    }
}

fn port_range(item: &str) -> Result<RangeInclusive<u16>, Problem> {
    let not_a_port = || Problem::Port(item.to_owned());
    let (first, last) = item.split_once(['-', ':']).unwrap_or((item, item));
    let start = digits(first).ok_or_else(not_a_port)?;
    let end = digits(last).ok_or_else(not_a_port)?;
    if start == 0 || end == 0 {
        return Err(not_a_port());
    }
    if start > end {
        return Err(Problem::BackwardRange(item.to_owned()));
    }
    Ok(start..=end)
}

/// Reads one port.
pub(super) fn port(text: &str) -> Result<u16, Problem> {
    digits(text)
        .filter(|&port| port != 0)
        .ok_or_else(|| Problem::Port(text.to_owned()))
}

/// Reads a number that is written in digits alone: `u16::from_str` and its like
/// take a `+`, too.
fn digits<T: FromStr>(text: &str) -> Option<T> {
    let text = text.trim();
    if text.bytes().all(|byte| byte.is_ascii_digit()) {
        text.parse().ok()
    } else {
        None
    }
}

/// Uids or gids, in the order in which they were written, each once, at most
/// `MAX` of them, because the programs walk through them one by one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<u32>", into = "Vec<u32>")]
pub struct Ids<const MAX: usize>(Vec<u32>);

/// The uids or the gids that a proxy runs as.
pub type Owners = Ids<MAX_OWNERS>;

/// The gids of an owner-group list.
pub type Groups = Ids<MAX_GROUPS>;

impl<const MAX: usize> Ids<MAX> {
    /// Reads a list of numbers.
    pub(super) fn parse(text: &str) -> Result<Self, Problem> {
        let ids = items(text)
            .map(|item| digits(item).ok_or_else(|| Problem::Id(item.to_owned())))
            .collect::<Result<Vec<u32>, _>>()?;
        Self::try_from(ids)
    }

    /// A list of one.
    pub(super) fn one(id: u32) -> Self {
        Self(vec![id])
    }

    /// The ids, at most `MAX`.
    pub fn as_slice(&self) -> &[u32] {
        &self.0
    }
}

impl<const MAX: usize> TryFrom<Vec<u32>> for Ids<MAX> {
    type Error = Problem;

    fn try_from(ids: Vec<u32>) -> Result<Self, Problem> {
        let mut seen = Vec::new();
        for id in ids {
            if id == NO_OWNER {
                return Err(Problem::Id(id.to_string()));
            }
            if seen.contains(&id) {
                continue;
            }
            if seen.len() == MAX {
                return Err(Problem::TooMany(MAX));
            }
            seen.push(id);
        }
        Ok(Self(seen))
    }
}

impl<const MAX: usize> From<Ids<MAX>> for Vec<u32> {
    fn from(ids: Ids<MAX>) -> Self {
        ids.0
    }
}

/// Reads a list of address ranges.
pub(super) fn cidrs(text: &str) -> Result<Vec<IpNet>, Problem> {
    items(text).map(cidr).collect()
}

/// Reads an address range, or an address as a range of one. Host bits stay, as
/// they do in iptables' own settings: the range is what it is masked to, but
/// Istio looks at the address itself to tell whether it is loopback. A range of
/// IPv4-mapped addresses is one of IPv4.
pub(super) fn cidr(item: &str) -> Result<IpNet, Problem> {
    let net = match item.parse::<IpNet>() {
        Ok(net) => Some(net),
        Err(_) => item.parse::<IpAddr>().ok().map(IpNet::from),
    };
    let net = net.ok_or_else(|| Problem::Cidr(item.to_owned()))?;
    let IpNet::V6(v6) = net else { return Ok(net) };
    let mapped = v6.addr().to_ipv4_mapped();
    let length = v6.prefix_len().checked_sub(96);
    let v4 = mapped
        .zip(length)
        .map(|(addr, len)| Ipv4Net::new(addr, len));
    Ok(match v4 {
        Some(Ok(v4)) => IpNet::V4(v4),
        Some(Err(_)) | None => net,
    })
}

/// Reads the IPv4 loopback range, with Istio's conditions on it.
pub(super) fn loopback(text: &str) -> Result<Ipv4Net, Problem> {
    let not_loopback = || Problem::Loopback(text.to_owned());
    match cidr(text) {
        Ok(IpNet::V4(net)) if net.addr().is_loopback() && net.prefix_len() >= 8 => Ok(net),
        Ok(_) | Err(_) => Err(not_loopback()),
    }
}

/// Names of network interfaces. As in iptables, a name that ends in `+` stands
/// for every name that begins so.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<String>", into = "Vec<String>")]
pub struct Interfaces(Vec<String>);

impl Interfaces {
    /// Reads a list of names.
    pub(super) fn parse(text: &str) -> Result<Self, Problem> {
        items(text)
            .map(interface)
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// The names, in the order in which they were written.
    pub fn as_slice(&self) -> &[String] {
        &self.0
    }

    /// Whether the interface `name` is meant.
    pub fn contains(&self, name: &str) -> bool {
        self.0
            .iter()
            .any(|pattern| match pattern.strip_suffix('+') {
                Some(start) => name.starts_with(start),
                None => name == pattern,
            })
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl TryFrom<Vec<String>> for Interfaces {
    type Error = Problem;

    fn try_from(names: Vec<String>) -> Result<Self, Problem> {
        let names = names.iter().map(|name| interface(name));
        names.collect::<Result<_, _>>().map(Self)
    }
}

impl From<Interfaces> for Vec<String> {
    fn from(interfaces: Interfaces) -> Self {
        interfaces.0
    }
}

fn interface(item: &str) -> Result<String, Problem> {
    /// `IFNAMSIZ`, without the NUL.
    const LONGEST: usize = 15;
    let bad = |c: char| matches!(c, '/' | ',') || c.is_whitespace() || c.is_control();
    let dots = item == "." || item == "..";
    if item.is_empty() || item.len() > LONGEST || item == "*" || dots || item.contains(bad) {
        return Err(Problem::Interface(item.to_owned()));
    }
    Ok(item.to_owned())
}

/// Reads a truth value, in the spellings that Go's flags take, in any case.
///
/// # Errors
///
/// Everything else.
pub fn truth(text: &str) -> Result<bool, Problem> {
    match text.to_ascii_lowercase().as_str() {
        "1" | "t" | "true" => Ok(true),
        "0" | "f" | "false" => Ok(false),
        _ => Err(Problem::Bool(text.to_owned())),
    }
}

/// Checks the interception mode. Only REDIRECT is left to say then, so there is
/// nothing to return.
pub(super) fn mode(text: &str) -> Result<(), Problem> {
    match text {
        "REDIRECT" => Ok(()),
        "TPROXY" => Err(Problem::Tproxy),
        "NONE" => Err(Problem::NoInterception),
        other => Err(Problem::Mode(other.to_owned())),
    }
}
