//! Settings that come as a message: what they may be is what somebody may write,
//! and the same parser says so.

use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Deserializer, de::Error as _};

use super::{Capture, Ids, Problem, values};

/// A port, host byte order.
#[derive(Deserialize)]
#[serde(try_from = "u32")]
struct Port(u16);

impl TryFrom<u32> for Port {
    type Error = Problem;

    fn try_from(number: u32) -> Result<Self, Problem> {
        values::port(&number.to_string()).map(Self)
    }
}

/// A range of addresses.
#[derive(Deserialize)]
#[serde(try_from = "String")]
struct Range(IpNet);

impl TryFrom<String> for Range {
    type Error = Problem;

    fn try_from(text: String) -> Result<Self, Problem> {
        values::cidr(&text).map(Self)
    }
}

/// The loopback range of IPv4.
#[derive(Deserialize)]
#[serde(try_from = "String")]
struct Loopback(Ipv4Net);

impl TryFrom<String> for Loopback {
    type Error = Problem;

    fn try_from(text: String) -> Result<Self, Problem> {
        values::loopback(&text).map(Self)
    }
}

pub(super) fn port<'de, D: Deserializer<'de>>(from: D) -> Result<u16, D::Error> {
    Port::deserialize(from).map(|Port(port)| port)
}

pub(super) fn loopback<'de, D: Deserializer<'de>>(from: D) -> Result<Ipv4Net, D::Error> {
    Loopback::deserialize(from).map(|Loopback(range)| range)
}

pub(super) fn ranges<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<IpNet>, D::Error> {
    Vec::deserialize(from).map(nets)
}

pub(super) fn captured_ranges<'de, D: Deserializer<'de>>(
    from: D,
) -> Result<Capture<Vec<IpNet>>, D::Error> {
    Ok(match Capture::deserialize(from)? {
        Capture::All => Capture::All,
        Capture::Listed(ranges) => Capture::Listed(nets(ranges)),
    })
}

fn nets(ranges: Vec<Range>) -> Vec<IpNet> {
    ranges.into_iter().map(|Range(net)| net).collect()
}

/// Ids where an empty list would mean nobody. Written, it counts as not given.
pub(super) fn some_ids<'de, D: Deserializer<'de>, const MAX: usize>(
    from: D,
) -> Result<Ids<MAX>, D::Error> {
    let ids = Ids::deserialize(from)?;
    match ids.as_slice() {
        [] => Err(D::Error::custom(Problem::NoIds)),
        _ => Ok(ids),
    }
}
