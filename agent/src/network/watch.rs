//! Notices when a namespace changes, or goes.

use std::{
    collections::BTreeSet,
    io::{self, IoSliceMut},
    os::fd::AsRawFd as _,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};
use netlink_packet_route::RouteNetlinkMessage;
use nix::{
    cmsg_space,
    errno::Errno,
    libc,
    sys::socket::{
        ControlMessageOwned, MsgFlags, NetlinkAddr, recvmsg, setsockopt, sockopt::RcvBufForce,
    },
};
use rtnetlink::{
    MulticastGroup,
    packet_core::{NetlinkBuffer, NetlinkMessage, NetlinkPayload},
    sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE},
};
use tokio::io::unix::AsyncFd;

use super::nsid::{self, Nsid};

/// How long changes are gathered: one `ip` command makes several.
const GATHER: Duration = Duration::from_millis(50);

/// Room for what arrives while changes are gathered, in bytes.
const QUEUE: usize = 4 << 20;

/// Everything that bears on routes, addresses and interfaces, and the end of a
/// namespace. The rules belong to it because they change what routes come to.
const GROUPS: [MulticastGroup; 9] = [
    MulticastGroup::Link,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
    MulticastGroup::Ipv4Rule,
    MulticastGroup::Ipv6Rule,
    MulticastGroup::Nexthop,
    MulticastGroup::Nsid,
];

/// What has happened since the last look.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Namespaces of which something has changed.
    pub changed: BTreeSet<Nsid>,
    /// Ids that a namespace lost, because it is gone. Another may have the id by
    /// now.
    pub gone: BTreeSet<Nsid>,
    /// More happened than could be reported: any namespace may have changed, or
    /// be gone.
    pub missed: bool,
}

/// One socket for the notifications of all namespaces that have an id in the
/// agent's own. It is opened there: one that was opened in a pod's namespace
/// would keep that alive for ever.
pub struct Watch {
    socket: AsyncFd<Socket>,
}

impl Watch {
    /// Starts to listen, in the calling thread's namespace, by the current
    /// runtime.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn open() -> Result<Self> {
        let socket = listen().context("cannot listen for changes of the pods' networks")?;
        // SAFETY: a Socket gives the same descriptor until it is dropped.
        let socket = unsafe { AsyncFd::register(socket) }
            .map_err(|error| anyhow!("cannot wait for changes of the pods' networks: {error}"))?;
        Ok(Self { socket })
    }

    /// Waits for changes, and gathers those that follow at once.
    ///
    /// # Errors
    ///
    /// When the socket fails; then nothing is to be expected of it any more.
    pub async fn changes(&mut self) -> Result<Changes> {
        let mut ready = self
            .socket
            .readable()
            .await
            .context("cannot wait for changes of the pods' networks")?;
        tokio::time::sleep(GATHER).await;
        let changes = drain(self.socket.get_ref())?;
        ready.clear_ready();
        Ok(changes)
    }
}

fn listen() -> Result<Socket> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.set_non_blocking(true)?;
    socket
        .set_listen_all_namespaces(true)
        .context("it takes CAP_NET_BROADCAST, or root")?;
    setsockopt(&socket, RcvBufForce, &QUEUE).context("it takes CAP_NET_ADMIN, or root")?;
    let groups = GROUPS
        .iter()
        .fold(0, |all, group| all | 1 << (*group as u32 - 1));
    socket.bind(&SocketAddr::new(0, groups))?;
    Ok(socket)
}

/// Reads everything there is.
fn drain(socket: &Socket) -> Result<Changes> {
    let mut changes = Changes::default();
    // A longer message is cut; its beginning says enough.
    let mut buffer = vec![0; 8192];
    let mut ancillary = cmsg_space!(libc::c_int);
    loop {
        let mut into = [IoSliceMut::new(&mut buffer)];
        let received = recvmsg::<NetlinkAddr>(
            socket.as_raw_fd(),
            &mut into,
            Some(&mut ancillary),
            MsgFlags::empty(),
        );
        let (length, from) = match received {
            Ok(message) => (message.bytes, sender(message.cmsgs()?)),
            Err(Errno::EAGAIN) => return Ok(changes),
            Err(Errno::EINTR) => continue,
            Err(Errno::ENOBUFS) => {
                changes.missed = true;
                continue;
            }
            Err(errno) => {
                return Err(io::Error::from(errno))
                    .context("cannot read changes of the pods' networks");
            }
        };
        changes.note(&buffer[..length], from);
    }
}

/// The namespace of a message, which the kernel adds to it; none is added for
/// the agent's own, unless that has an id in itself, as when it is enrolled.
fn sender(mut ancillary: impl Iterator<Item = ControlMessageOwned>) -> Option<Nsid> {
    ancillary.find_map(|message| {
        let ControlMessageOwned::Unknown(message) = message else {
            return None;
        };
        let header = message.cmsg_header;
        let says_id = (header.cmsg_level, header.cmsg_type)
            == (libc::SOL_NETLINK, libc::NETLINK_LISTEN_ALL_NSID);
        let id = message.data_bytes.first_chunk()?;
        says_id.then_some(Nsid::from_ne_bytes(*id))
    })
}

impl Changes {
    /// Whatever may have happened.
    pub fn missed() -> Self {
        Self {
            missed: true,
            ..Self::default()
        }
    }

    /// Whether something may have happened to the namespace of this id.
    pub fn concern(&self, id: Nsid) -> bool {
        self.missed || self.changed.contains(&id) || self.gone.contains(&id)
    }

    /// Takes a datagram into account.
    fn note(&mut self, datagram: &[u8], from: Option<Nsid>) {
        let Ok(message) = NetlinkBuffer::new_checked(datagram) else {
            // Cut: only what tells of interfaces, addresses and routes is so long.
            self.changed.extend(from);
            return;
        };
        match message.message_type() {
            // These are about another namespace than the one they come from.
            libc::RTM_NEWNSID => {}
            libc::RTM_DELNSID => self.gone.extend(lost_id(datagram)),
            _ => self.changed.extend(from),
        }
    }
}

/// The id that a notification says is free again.
fn lost_id(datagram: &[u8]) -> Option<Nsid> {
    let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(datagram).ok()?;
    if let NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelNsId(lost)) = message.payload {
        nsid::id(&lost)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::{
        link::LinkMessage,
        nsid::{NsidAttribute, NsidMessage},
    };

    use super::*;

    fn datagram(message: RouteNetlinkMessage) -> Vec<u8> {
        let mut message = NetlinkMessage::from(message);
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        bytes
    }

    fn of_id(id: Nsid) -> NsidMessage {
        let mut message = NsidMessage::default();
        message.attributes = vec![NsidAttribute::Id(id)];
        message
    }

    #[test]
    fn a_change_belongs_to_the_namespace_that_it_comes_from() {
        let mut changes = Changes::default();
        let link = datagram(RouteNetlinkMessage::NewLink(LinkMessage::default()));
        changes.note(&link, Some(4));
        changes.note(&link, Some(4));
        changes.note(&link, None);
        changes.note(&link[..20], Some(5));
        assert_eq!(
            changes,
            Changes {
                changed: BTreeSet::from([4, 5]),
                ..Changes::default()
            }
        );
    }

    #[test]
    fn the_end_of_a_namespace_is_told_by_its_id() {
        let mut changes = Changes::default();
        changes.note(&datagram(RouteNetlinkMessage::NewNsId(of_id(6))), None);
        changes.note(&datagram(RouteNetlinkMessage::DelNsId(of_id(7))), None);
        assert_eq!(
            changes,
            Changes {
                gone: BTreeSet::from([7]),
                ..Changes::default()
            }
        );
    }
}
