use std::net::IpAddr;

/// A transport protocol that the rules tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP
    Tcp,
    /// UDP
    Udp,
}

/// Whose socket a packet comes from, as `-m owner` sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The file system uid at `socket()`.
    pub uid: u32,
    /// The file system gid at `socket()`.
    pub gid: u32,
}

/// Where a packet meets the `nat` table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hook {
    /// It was made in the namespace.
    Output {
        /// The interface that it leaves through.
        interface: String,
        /// The owner of its socket, `None` where the socket has no file.
        owner: Option<Owner>,
    },
    /// It came from outside.
    Prerouting {
        /// The interface that it came in through.
        interface: String,
    },
}

/// The first packet of a connection: the `nat` table sees no other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Where it meets the table.
    pub hook: Hook,
    /// Its protocol.
    pub protocol: Protocol,
    /// Its source address, of the family of `destination`.
    pub source: IpAddr,
    /// Its destination address.
    pub destination: IpAddr,
    /// Its destination port.
    pub port: u16,
}

/// What becomes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It goes where it was sent.
    Accept,
    /// It goes to this port of the namespace.
    Redirect(u16),
}
