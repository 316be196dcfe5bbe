//! A TCP packet of an interface: found in its frame, and given other addresses.

use shunt_abi::{Addr, Endpoint};

use crate::ctx::{Checksum, Frame, FullSocket, HelperFailed};

/// `ETH_P_IP`
const IPV4: u16 = 0x0800;
/// `ETH_P_IPV6`
const IPV6: u16 = 0x86dd;
/// `IPPROTO_TCP`
const TCP: u8 = 6;

/// Bits of [`TcpHeader::flags`].
const SYN: u8 = 1 << 1;
/// The sender ends the connection at once.
const RST: u8 = 1 << 2;
/// It acknowledges something.
const ACK: u8 = 1 << 4;

/// The part of an IPv4 header that says whether it is of a fragment: the offset,
/// and whether more follow.
const FRAGMENT4: u16 = 0x3fff;

/// How many extension headers of IPv6 are looked behind.
const MAX_EXTENSIONS: u32 = 8;

/// An IPv4 header as it is sent.
#[repr(C)]
#[derive(Clone, Copy)]
struct Header4 {
    version_and_length: u8,
    service: u8,
    length: u16,
    id: u16,
    fragment: u16,
    lifetime: u8,
    protocol: u8,
    checksum: u16,
    source: u32,
    destination: u32,
}

/// An IPv6 header as it is sent.
#[repr(C)]
#[derive(Clone, Copy)]
struct Header6 {
    flow: u32,
    length: u16,
    next: u8,
    lifetime: u8,
    source: [u32; 4],
    destination: [u32; 4],
}

/// The beginning of an extension header of IPv6.
#[repr(C)]
#[derive(Clone, Copy)]
struct Extension {
    next: u8,
    length: u8,
}

/// The first 16 bytes of a TCP header as it is sent.
#[repr(C)]
#[derive(Clone, Copy)]
struct TcpHeader {
    source: u16,
    destination: u16,
    sequence: u32,
    acknowledged: u32,
    length: u8,
    flags: u8,
    window: u16,
}

/// What is in a frame.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// No TCP.
    Other,
    /// TCP.
    Tcp,
    /// TCP as it seems, but no whole packet of it: a fragment, or one cut short.
    Unreadable,
}

/// A packet of TCP in its frame.
pub struct Packet {
    frame: Frame,
    /// Where the IP header is.
    network: u32,
    /// Where the TCP header is.
    transport: u32,
    /// Who has sent it.
    pub source: Endpoint,
    /// Where to.
    pub destination: Endpoint,
    flags: u8,
}

/// Where something is in a packet, or why it is not.
enum Transport {
    At(u32),
    Other,
    Unreadable,
}

impl Packet {
    /// What is behind a link layer header of that many bytes, to be found.
    #[inline(always)]
    pub const fn behind(frame: Frame, link_header: u32) -> Self {
        const NOWHERE: Endpoint = Endpoint::new(Addr::from_v6([0; 4]), 0);
        Self {
            frame,
            network: link_header,
            transport: 0,
            source: NOWHERE,
            destination: NOWHERE,
            flags: 0,
        }
    }

    /// Looks for TCP. When it is unreadable, where it is sent to is known all the same, but
    /// no port, and the address is unspecified if it is not to be read either.
    #[inline(always)]
    pub fn find(&mut self) -> Content {
        match self.frame.protocol() {
            IPV4 => self.find4(),
            IPV6 => self.find6(),
            _ => Content::Other,
        }
    }

    #[inline(always)]
    fn find4(&mut self) -> Content {
        self.destination.addr = Addr::from_v4(0);
        let Some(header) = self.frame.load::<Header4>(self.network) else {
            return Content::Unreadable;
        };
        if header.protocol != TCP {
            return Content::Other;
        }
        self.source.addr = Addr::from_v4(header.source);
        self.destination.addr = Addr::from_v4(header.destination);
        if u16::from_be(header.fragment) & FRAGMENT4 != 0 {
            return Content::Unreadable;
        }
        self.transport = self.network + 4 * u32::from(header.version_and_length & 0xf);
        self.read()
    }

    #[inline(always)]
    fn find6(&mut self) -> Content {
        let Some(header) = self.frame.load::<Header6>(self.network) else {
            return Content::Unreadable;
        };
        self.source.addr = Addr::from_v6(header.source);
        self.destination.addr = Addr::from_v6(header.destination);
        let behind = self.network + size_of::<Header6>() as u32;
        match behind_extensions(self.frame, behind, header.next) {
            Transport::Other => Content::Other,
            Transport::Unreadable => Content::Unreadable,
            Transport::At(transport) => {
                self.transport = transport;
                self.read()
            }
        }
    }

    /// Reads the TCP header.
    #[inline(always)]
    fn read(&mut self) -> Content {
        let Some(header) = self.frame.load::<TcpHeader>(self.transport) else {
            return Content::Unreadable;
        };
        self.source.port = u16::from_be(header.source);
        self.destination.port = u16::from_be(header.destination);
        self.flags = header.flags;
        Content::Tcp
    }

    /// Whether it opens a connection: a SYN that answers none.
    #[inline(always)]
    pub const fn is_first(&self) -> bool {
        self.flags & (SYN | ACK) == SYN
    }

    /// Whether it takes up a connection: a SYN that answers one.
    #[inline(always)]
    pub const fn is_answer_to_first(&self) -> bool {
        self.flags & (SYN | ACK) == SYN | ACK
    }

    /// Whether it ends a connection at once.
    #[inline(always)]
    pub const fn is_reset(&self) -> bool {
        self.flags & RST != 0
    }

    /// Lets `look` see the socket that has a connection between the sender and `server`,
    /// as [`Frame::receiver`] does.
    #[inline(always)]
    pub fn receiver<R>(&self, server: &Endpoint, look: impl FnOnce(FullSocket) -> R) -> Option<R> {
        self.frame.receiver(&self.source, server, look)
    }

    /// Sends it somewhere else, of the same family.
    ///
    /// Fails when there is no memory; it may be half changed then.
    #[inline(always)]
    pub fn set_destination(&self, to: &Endpoint) -> Result<(), HelperFailed> {
        self.replace(Side::Destination, &self.destination, to)
    }

    /// Makes it come from somewhere else, of the same family.
    ///
    /// Fails as [`set_destination`](Self::set_destination).
    #[inline(always)]
    pub fn set_source(&self, from: &Endpoint) -> Result<(), HelperFailed> {
        self.replace(Side::Source, &self.source, from)
    }

    #[inline(always)]
    fn replace(&self, side: Side, old: &Endpoint, new: &Endpoint) -> Result<(), HelperFailed> {
        let sum = self.transport + 16;
        if new.addr.is_v4() {
            let (old, new) = (old.addr.v4(), new.addr.v4());
            let at = self.network + side.select(12, 16);
            let header = Checksum::Header(self.network + 10);
            self.frame.correct(Checksum::TcpAddress(sum), old, new)?;
            self.frame.replace(at, old, new, header)?;
        } else {
            let at = self.network + side.select(8, 24);
            for word in 0..4 {
                let (old, new) = (old.addr.words[word], new.addr.words[word]);
                let at = at + 4 * word as u32;
                self.frame
                    .replace(at, old, new, Checksum::TcpAddress(sum))?;
            }
        }
        let (old, new) = (old.port.to_be(), new.port.to_be());
        let at = self.transport + side.select(0, 2);
        self.frame.replace(at, old, new, Checksum::Tcp(sum))
    }
}

/// One of the two ends that a packet names.
#[derive(Clone, Copy)]
enum Side {
    Source,
    Destination,
}

impl Side {
    #[inline(always)]
    const fn select(self, source: u32, destination: u32) -> u32 {
        match self {
            Self::Source => source,
            Self::Destination => destination,
        }
    }
}

/// `IPPROTO_HOPOPTS`
const HOP_BY_HOP: u8 = 0;
/// `IPPROTO_ROUTING`
const ROUTING: u8 = 43;
/// `IPPROTO_FRAGMENT`
const FRAGMENT: u8 = 44;
/// `IPPROTO_AH`
const AUTHENTICATION: u8 = 51;
/// `IPPROTO_DSTOPTS`
const DESTINATION: u8 = 60;

/// Where TCP is behind the extension headers, the first of which is of kind
/// `next` and at `at`.
#[inline(always)]
fn behind_extensions(frame: Frame, mut at: u32, mut next: u8) -> Transport {
    for _ in 0..MAX_EXTENSIONS {
        if next == TCP {
            return Transport::At(at);
        }
        if !is_extension(next) {
            return Transport::Other;
        }
        let Some(extension) = frame.load::<Extension>(at) else {
            return Transport::Unreadable;
        };
        if next == FRAGMENT {
            // Only the first has what comes next.
            return if extension.next == TCP || is_extension(extension.next) {
                Transport::Unreadable
            } else {
                Transport::Other
            };
        }
        let length = u32::from(extension.length);
        at += if next == AUTHENTICATION {
            4 * (length + 2)
        } else {
            8 * (length + 1)
        };
        next = extension.next;
    }
    Transport::Unreadable
}

#[inline(always)]
const fn is_extension(kind: u8) -> bool {
    matches!(
        kind,
        HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION
    )
}
