use thiserror::Error;

use super::{Written, written::Excerpt};

/// A setting that cannot be understood: what was written, where, and what is
/// wrong with it. Nothing of the settings is then used.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{written}: {problem}")]
pub struct SettingsError {
    /// The setting, as it was written.
    pub written: Box<Written>,
    /// What is wrong with it.
    pub problem: Problem,
}

/// What can be wrong with a setting. The text is the item of the list.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Problem {
    /// Not a port number.
    #[error("\"{}\" is not a port; ports are 1 to 65535", Excerpt(.0))]
    Port(String),
    /// A range of ports whose end is before its start.
    #[error("\"{}\" runs backwards; write the lower port first", Excerpt(.0))]
    BackwardRange(String),
    /// `*` beside other items.
    #[error(
        "\"*\" means everything and stands alone; leave the other items out, or leave out \"*\""
    )]
    WildcardAmongOthers,
    /// `*` where everything would be left alone.
    #[error(
        "\"*\" would leave every destination alone; to capture nothing outbound, leave -i empty"
    )]
    ExcludesEverything,
    /// Not an address and not a range of addresses.
    #[error(
        "\"{}\" is not an address range; write an IP address, \
         or one with a prefix length, such as 10.0.0.0/8",
        Excerpt(.0)
    )]
    Cidr(String),
    /// Not a loopback range of IPv4.
    #[error(
        "\"{}\" is not a loopback range; write one of IPv4 within 127.0.0.0/8, \
         such as 127.0.0.1/32",
        Excerpt(.0)
    )]
    Loopback(String),
    /// Not a uid or gid.
    #[error(
        "\"{}\" is not a uid or gid; names are not looked up, give the number (0 to 4294967294)",
        Excerpt(.0)
    )]
    Id(String),
    /// More ids than fit.
    #[error("there are more than {0} ids; that is the most that this list can have")]
    TooMany(usize),
    /// No id where there has to be one.
    #[error("the list is empty; it needs one id at least")]
    NoIds,
    /// Not the name of an interface.
    #[error(
        "\"{}\" is not an interface name; \
         names have 1 to 15 characters, without blanks and slashes",
        Excerpt(.0)
    )]
    Interface(String),
    /// Neither true nor false.
    #[error("\"{}\" is neither true nor false", Excerpt(.0))]
    Bool(String),
    /// Not a mesh with a preset.
    #[error("\"{}\" is not a mesh with known settings; there are istio, linkerd and kuma", Excerpt(.0))]
    Mesh(String),
    /// Interception by TPROXY.
    #[error(
        "TPROXY needs packet marks and policy routing, which shunt does not set up; \
         use REDIRECT, where the proxy sees the client's address as well"
    )]
    Tproxy,
    /// No interception.
    #[error("NONE means no redirection; do not enroll this network namespace")]
    NoInterception,
    /// Not a mode.
    #[error("\"{}\" is not an interception mode; use REDIRECT", Excerpt(.0))]
    Mode(String),
    /// Not a way to splice.
    #[error("\"{}\" is no way to splice; there are auto, off, between, proxy and all", Excerpt(.0))]
    Splice(String),
    /// A setting of a mesh that shunt has nothing for.
    #[error("shunt cannot do that; take the annotation away, or leave the pod to iptables")]
    NotFollowed,
    /// Both older kinds of hairpin.
    #[error("it excludes --tunnel-hairpin; give the one that is meant")]
    TwoHairpins,
}
