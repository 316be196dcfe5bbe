//! Who owns a socket.

use std::fmt;

use nix::unistd::{Gid, Uid, setfsgid, setfsuid};

/// The user and the group that own a socket: what `iptables -m owner` compares.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub struct Owner {
    /// The file system user id.
    pub uid: u32,
    /// The file system group id.
    pub gid: u32,
}

impl Owner {
    /// An application.
    pub const APP: Self = Self::new(1000, 1000);
    /// Root, which is an application like any other.
    pub const ROOT: Self = Self::new(0, 0);
    /// The sidecar proxy.
    pub const PROXY: Self = Self::new(1337, 1337);
    /// A process with the proxy's user and a group of its own.
    pub const PROXY_UID: Self = Self::new(1337, 1000);
    /// A process with the proxy's group and a user of its own.
    pub const PROXY_GID: Self = Self::new(1000, 1337);

    /// An owner by its ids.
    pub const fn new(uid: u32, gid: u32) -> Self {
        Self { uid, gid }
    }

    /// Makes the calling thread, and no other, open its next sockets as this
    /// owner. The user id proper stays root's, so that the thread can change
    /// its mind.
    pub fn assume(self) {
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        // Neither call reports errors: both answer with the id from before.
        setfsgid(gid);
        setfsuid(uid);
        assert!(
            setfsuid(uid) == uid && setfsgid(gid) == gid,
            "the thread cannot take on the identity {self}"
        );
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.uid, self.gid)
    }
}
