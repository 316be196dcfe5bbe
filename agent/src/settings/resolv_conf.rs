use std::net::IpAddr;

use thiserror::Error;

use super::written::Excerpt;

/// A line of a resolv.conf that names no nameserver although it should.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "line {line}: \"nameserver {}\" does not give an IP address",
    Excerpt(.address)
)]
pub struct ResolvConfError {
    /// The number of the line, from 1.
    pub line: usize,
    /// What stands in the place of the address.
    pub address: String,
}

/// The nameservers that the text of a resolv.conf lists, in its order.
///
/// All of them, as Istio takes them, although glibc asks the first three only.
/// The scope of an IPv6 address (`fe80::1%eth0`) is left out, comments (`#`,
/// `;`) and every other keyword are passed over.
///
/// # Errors
///
/// The first nameserver that is no address.
pub fn resolv_conf(text: &str) -> Result<Vec<IpAddr>, ResolvConfError> {
    text.lines()
        .zip(1..)
        .filter_map(|(line, number)| Some((nameserver(line)?, number)))
        .map(|(address, line)| {
            let without_scope = address.split('%').next().unwrap_or(address);
            match without_scope.parse::<IpAddr>() {
                Ok(ip) => Ok(ip.to_canonical()),
                Err(_) => Err(ResolvConfError {
                    line,
                    address: address.to_owned(),
                }),
            }
        })
        .collect()
}

/// What a line gives as the address of a nameserver, if it is about one.
fn nameserver(line: &str) -> Option<&str> {
    let before_comment = line.split(['#', ';']).next()?;
    let mut words = before_comment.split_whitespace();
    match words.next() {
        Some("nameserver") => Some(words.next().unwrap_or("")),
        Some(_) | None => None,
    }
}
