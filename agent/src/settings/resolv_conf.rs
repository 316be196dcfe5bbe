use std::{
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use thiserror::Error;

use super::written::Excerpt;

/// A resolv.conf that is of no use.
#[derive(Debug, Error)]
pub enum ResolvConfError {
    /// It cannot be read.
    #[error("cannot read {}: {cause}; --resolv-conf names the resolv.conf of the pod", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        cause: io::Error,
    },
    /// It cannot be understood.
    #[error("{}: {cause}", .path.display())]
    Nameserver {
        /// The file.
        path: PathBuf,
        /// The line.
        cause: BadNameserver,
    },
}

/// The nameservers that the resolv.conf at `path` lists.
///
/// # Errors
///
/// When it cannot be read, or a nameserver in it is no address.
pub fn read_resolv_conf(path: &Path) -> Result<Vec<IpAddr>, ResolvConfError> {
    let text = fs::read_to_string(path).map_err(|cause| ResolvConfError::Read {
        path: path.to_owned(),
        cause,
    })?;
    resolv_conf(&text).map_err(|cause| ResolvConfError::Nameserver {
        path: path.to_owned(),
        cause,
    })
}

/// A line of a resolv.conf that names no nameserver although it should.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "line {line}: \"nameserver {}\" does not give an IP address",
    Excerpt(.address)
)]
pub struct BadNameserver {
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
pub fn resolv_conf(text: &str) -> Result<Vec<IpAddr>, BadNameserver> {
    text.lines()
        .zip(1..)
        .filter_map(|(line, number)| Some((nameserver(line)?, number)))
        .map(|(address, line)| {
            let without_scope = address.split('%').next().unwrap_or(address);
            match without_scope.parse::<IpAddr>() {
                Ok(ip) => Ok(ip.to_canonical()),
                Err(_) => Err(BadNameserver {
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_nameserver_is_found_in_order() {
        let text = "\
            # nameserver 192.0.2.1\n\
            ; nameserver 192.0.2.2\n\
            search default.svc.cluster.local svc.cluster.local\n\
            nameserver 10.96.0.10\n\
            nameserver\t10.96.0.11 # the second\n\
            nameserver fe80::1%eth0\r\n\
            nameservers 192.0.2.3\n\
            options ndots:5\n  \
            nameserver ::ffff:10.96.0.12";
        let ips = ["10.96.0.10", "10.96.0.11", "fe80::1", "10.96.0.12"];
        let expected: Vec<IpAddr> = ips.map(|ip| ip.parse().expect("a literal")).to_vec();
        assert_eq!(resolv_conf(text), Ok(expected));
        assert_eq!(resolv_conf(""), Ok(Vec::new()));
    }

    #[test]
    fn a_nameserver_that_is_no_address_is_named_with_its_line() {
        let rows = [
            (
                "search x\nnameserver 10.96.0",
                "line 2: \"nameserver 10.96.0\" does not give an IP address",
            ),
            (
                "nameserver",
                "line 1: \"nameserver \" does not give an IP address",
            ),
            (
                "nameserver dns.example",
                "line 1: \"nameserver dns.example\" does not give an IP address",
            ),
            (
                "nameserver %eth0",
                "line 1: \"nameserver %eth0\" does not give an IP address",
            ),
        ];
        for (text, expected) in rows {
            let error = resolv_conf(text).expect_err(text);
            assert_eq!(error.to_string(), expected);
        }
    }

    proptest! {
        #[test]
        fn no_text_is_too_strange(text in "(nameserver|#|;|[ \t\n%:.0-9a-f]|\\PC){0,60}") {
            if let Err(error) = resolv_conf(&text) {
                prop_assert!(!error.to_string().contains(char::is_control));
            }
        }
    }
}
