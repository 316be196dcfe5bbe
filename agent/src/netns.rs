//! A network namespace: opened, identified, entered.

use std::{
    fs::File,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Context as _, Result, anyhow, bail};
use nix::{
    getsockopt_impl, libc,
    sched::{CloneFlags, setns},
    sockopt_impl,
    sys::{
        socket::{AddressFamily, SockFlag, SockType, getsockopt, socket},
        statfs::{NSFS_MAGIC, fstatfs},
    },
};
use serde::{Deserialize as _, Deserializer, de::Error as _};
use shunt_abi::NetnsCookie;

/// An open network namespace. While it is open the namespace stays, even when
/// nobody is in it: keep it no longer than a request takes.
#[derive(Debug)]
pub struct Netns {
    file: File,
    path: PathBuf,
    cookie: NetnsCookie,
}

/// Reads the path of a namespace from a message: who sent it may be in another
/// directory than the agent.
pub(crate) fn absolute_path<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
    let path = PathBuf::deserialize(from)?;
    if path.is_absolute() {
        Ok(path)
    } else {
        Err(D::Error::custom(format!(
            "{path:?} does not begin with \"/\"; name the namespace as /run/netns/NAME or \
             /proc/PID/ns/net"
        )))
    }
}

impl Netns {
    /// Opens the namespace at `path`, such as `/run/netns/NAME` or
    /// `/proc/PID/ns/net`.
    ///
    /// # Errors
    ///
    /// When there is nothing at `path`, or no network namespace.
    pub fn open(path: &Path) -> Result<Self> {
        let shown = path.display();
        let file = File::open(path).with_context(|| {
            format!("cannot open the network namespace {shown}; is the pod still there?")
        })?;
        let found = fstatfs(&file).with_context(|| format!("cannot look at {shown}"))?;
        if found.filesystem_type() != NSFS_MAGIC {
            bail!(
                "{shown} is no network namespace; name one as /run/netns/NAME or /proc/PID/ns/net"
            );
        }
        let mut netns = Self {
            file,
            path: path.to_owned(),
            cookie: 0,
        };
        netns.cookie = netns.within(cookie_of_current)??;
        Ok(netns)
    }

    /// The kernel's name of the namespace.
    pub const fn cookie(&self) -> NetnsCookie {
        self.cookie
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs `work` in the namespace, on a thread of its own: a namespace is
    /// entered by thread, and a thread that failed to return would be lost.
    ///
    /// # Errors
    ///
    /// When the namespace cannot be entered, or `work` panics.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        thread::scope(|scope| {
            scope
                .spawn(|| {
                    setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET).with_context(|| {
                        format!(
                            "cannot enter {}; either it is another kind of namespace, \
                             or CAP_SYS_ADMIN is missing",
                            self.path.display()
                        )
                    })?;
                    Ok(work())
                })
                .join()
                .map_err(|_panic| anyhow!("the work in {} panicked", self.path.display()))?
        })
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

sockopt_impl!(
    /// `SO_NETNS_COOKIE`
    SocketNetns,
    GetOnly,
    libc::SOL_SOCKET,
    libc::SO_NETNS_COOKIE,
    NetnsCookie
);

/// The cookie of the calling thread's namespace (`SO_NETNS_COOKIE`, Linux 5.14).
///
/// # Errors
///
/// When the kernel does not say it.
pub(crate) fn cookie_of_current() -> Result<NetnsCookie> {
    let socket = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .context("cannot open a socket in the namespace")?;
    getsockopt(&socket, SocketNetns)
        .context("the kernel does not say the namespace's cookie; it takes Linux 5.14 or newer")
}
