//! The ids by which the agent's namespace knows the others.

use std::os::fd::{AsFd as _, AsRawFd as _};

use anyhow::{Context as _, Result, bail};
use futures_util::StreamExt as _;
use netlink_packet_route::{
    RouteNetlinkMessage,
    nsid::{NsidAttribute, NsidMessage},
};
use nix::errno::Errno;
use rtnetlink::{
    Handle,
    packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
};
use tokio::runtime;

use crate::netns::Netns;

/// The id of a namespace in the agent's own (`ip netns list-id`): given once, it
/// stays until the namespace is gone, and is then free for another.
pub type Nsid = i32;

/// Gives namespaces their ids.
///
/// An id is an entry in a table of the agent's namespace. The other namespace
/// does not see it, is not held by it, and behaves as before; `ip netns list-id`
/// on the node lists it, as it lists those that container runtimes cause
/// whenever they move one end of a veth pair into a pod. Without an id the
/// kernel does not pass a namespace's notifications on to a socket in another.
/// It cannot be taken back, so it stays when the agent ends, and the next agent
/// finds it.
pub struct Nsids {
    netlink: Handle,
    runtime: runtime::Handle,
}

impl Nsids {
    /// Opens a netlink socket in the calling thread's namespace, which is served
    /// by the current runtime.
    ///
    /// # Errors
    ///
    /// When the kernel gives no socket.
    pub fn open() -> Result<Self> {
        let (connection, netlink, _messages) =
            rtnetlink::new_connection().context("cannot open a netlink socket")?;
        // It ends with the last handle.
        tokio::spawn(connection);
        Ok(Self {
            netlink,
            runtime: runtime::Handle::current(),
        })
    }

    /// The id of a namespace; one is given to it when it has none. Not to be
    /// called from a task of the runtime.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn of(&self, netns: &Netns) -> Result<Nsid> {
        let by_descriptor = NsidAttribute::Fd(netns.as_fd().as_raw_fd().cast_unsigned());
        let asked = || self.find(by_descriptor.clone());
        let found = self.runtime.block_on(async {
            if let Some(id) = asked().await? {
                return Ok(Some(id));
            }
            self.assign(by_descriptor.clone()).await?;
            asked().await
        });
        found
            .and_then(|id| id.context("the kernel gave it no id"))
            .with_context(|| format!("cannot follow changes of {}", netns.path().display()))
    }

    async fn find(&self, of: NsidAttribute) -> Result<Option<Nsid>> {
        let request = RouteNetlinkMessage::GetNsId(message([of]));
        match self.ask(request).await? {
            Answer::Id(id) => Ok(Some(id)),
            Answer::Nothing | Answer::Refused(Errno::ENOENT) => Ok(None),
            Answer::Refused(errno) => {
                Err(errno).context("the kernel does not say the namespace's id")
            }
        }
    }

    async fn assign(&self, to: NsidAttribute) -> Result<()> {
        /// The kernel picks one.
        const ANY: NsidAttribute = NsidAttribute::Id(-1);
        let request = RouteNetlinkMessage::NewNsId(message([to, ANY]));
        match self.ask(request).await? {
            // Somebody else was faster.
            Answer::Id(_) | Answer::Nothing | Answer::Refused(Errno::EEXIST) => Ok(()),
            Answer::Refused(errno) => {
                Err(errno).context("the kernel gives the namespace no id; it takes CAP_NET_ADMIN")
            }
        }
    }

    async fn ask(&self, request: RouteNetlinkMessage) -> Result<Answer> {
        let mut request = NetlinkMessage::from(request);
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK;
        let mut answers = self
            .netlink
            .clone()
            .request(request)
            .context("the netlink socket is closed")?;
        let mut answer = Answer::Nothing;
        while let Some(message) = answers.next().await {
            if let Some(better) = understand(message.payload)? {
                answer = better;
            }
        }
        Ok(answer)
    }
}

/// What the kernel says to a request.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Id(Nsid),
    /// Done, or no id.
    Nothing,
    Refused(Errno),
}

fn understand(payload: NetlinkPayload<RouteNetlinkMessage>) -> Result<Option<Answer>> {
    if let NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNsId(found)) = payload {
        return Ok(id(&found).map(Answer::Id));
    }
    let NetlinkPayload::Error(refused) = payload else {
        bail!("the kernel's answer makes no sense");
    };
    // Without a code it is the acknowledgement.
    Ok(refused
        .code
        .map(|code| Answer::Refused(Errno::from_raw(-code.get()))))
}

/// The id in a message; the kernel says -1 where there is none.
pub(super) fn id(message: &NsidMessage) -> Option<Nsid> {
    message.attributes.iter().find_map(|attribute| {
        if let NsidAttribute::Id(id) = attribute {
            (*id >= 0).then_some(*id)
        } else {
            None
        }
    })
}

fn message<const N: usize>(attributes: [NsidAttribute; N]) -> NsidMessage {
    let mut message = NsidMessage::default();
    message.attributes = attributes.to_vec();
    message
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroI32;

    use rtnetlink::packet_core::ErrorMessage;

    use super::*;

    fn error(code: i32) -> NetlinkPayload<RouteNetlinkMessage> {
        let mut error = ErrorMessage::default();
        error.code = NonZeroI32::new(code);
        NetlinkPayload::Error(error)
    }

    fn found(id: Nsid) -> NetlinkPayload<RouteNetlinkMessage> {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNsId(message([NsidAttribute::Id(
            id,
        )])))
    }

    #[test]
    fn answers_are_told_apart() {
        let understood = |payload| understand(payload).expect("an answer");
        assert_eq!(understood(found(3)), Some(Answer::Id(3)));
        assert_eq!(understood(found(-1)), None);
        assert_eq!(understood(error(0)), None);
        assert_eq!(understood(error(-2)), Some(Answer::Refused(Errno::ENOENT)));
        assert!(understand(NetlinkPayload::Noop).is_err());
    }
}
