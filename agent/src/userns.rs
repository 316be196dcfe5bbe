//! How a pod numbers its users.
//!
//! A pod with a user namespace of its own (`hostUsers: false`) has ids of its
//! own: its uid 1337 is another one on the node. Settings are written in the
//! pod's ids, sockets carry the node's, and `iptables -m owner` translates by
//! the user namespace that owns the network namespace. So does this.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    os::{
        fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
};

use anyhow::{Context as _, Result, anyhow, bail};
use nix::{
    fcntl::OFlag,
    ioctl_none, libc,
    sched::{CloneFlags, setns},
    sys::wait::waitpid,
    unistd::{ForkResult, Pid, fork, pipe2},
};

use crate::netns::Netns;

/// What an id of the pod comes to that the node has no number for: no socket
/// has it, and it is not what unknown owners have either
/// ([`NO_OWNER`](shunt_abi::NO_OWNER)). The kernel maps no id to it.
pub const UNMAPPED: u32 = u32::MAX - 1;

/// The agent's own user namespace.
const OWN: &str = "/proc/self/ns/user";

/// How the ids of a pod are numbered on the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdMaps {
    /// Of users.
    pub uids: IdMap,
    /// Of groups.
    pub gids: IdMap,
}

impl IdMaps {
    /// Those of a pod without a user namespace of its own.
    pub const fn same() -> Self {
        Self {
            uids: IdMap::Same,
            gids: IdMap::Same,
        }
    }

    /// Those of the user namespace that owns `netns`. The node's numbers are
    /// those of the agent's own user namespace, which has to be the node's first.
    ///
    /// # Errors
    ///
    /// When the kernel does not say, or the agent may not enter the user
    /// namespace.
    pub fn of(netns: &Netns) -> Result<Self> {
        let owner = owner(netns)
            .with_context(|| format!("cannot tell who owns {}", netns.path().display()))?;
        let pods = owner
            .metadata()
            .context("cannot look at a user namespace")?;
        let own = fs::metadata(OWN).with_context(|| format!("cannot look at {OWN}"))?;
        if (pods.dev(), pods.ino()) == (own.dev(), own.ino()) {
            return Ok(Self::same());
        }
        read(owner).with_context(|| {
            format!(
                "cannot read how the owner of {} numbers its users",
                netns.path().display()
            )
        })
    }
}

/// How one kind of id is numbered on the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IdMap {
    /// As in the pod.
    Same,
    /// By ranges.
    Ranges(Vec<IdRange>),
}

/// A range of ids, all of which are moved by the same distance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdRange {
    /// The first, as the pod numbers it.
    inside: u32,
    /// The first, as the node numbers it.
    outside: u32,
    /// How many there are.
    count: u32,
}

impl IdMap {
    /// Reads the text of `/proc/PID/uid_map`: on each line the first id inside,
    /// the first outside, and how many.
    ///
    /// # Errors
    ///
    /// When a line is something else; it is in the message.
    pub fn parse(text: &str) -> Result<Self> {
        text.lines()
            .map(|line| range(line).with_context(|| format!("{line:?} is no range of ids")))
            .collect::<Result<_>>()
            .map(Self::Ranges)
    }

    /// The node's number of an id of the pod; [`UNMAPPED`] if there is none.
    pub fn on_node(&self, id: u32) -> u32 {
        match self {
            Self::Same => id,
            Self::Ranges(ranges) => ranges
                .iter()
                .find_map(|range| range.on_node(id))
                .unwrap_or(UNMAPPED),
        }
    }
}

impl IdRange {
    fn on_node(&self, id: u32) -> Option<u32> {
        let distance = id.checked_sub(self.inside)?;
        if distance < self.count {
            self.outside.checked_add(distance)
        } else {
            None
        }
    }
}

fn range(line: &str) -> Option<IdRange> {
    let mut numbers = line.split_whitespace().map(str::parse);
    let mut next = || numbers.next()?.ok();
    let range = IdRange {
        inside: next()?,
        outside: next()?,
        count: next()?,
    };
    numbers.next().is_none().then_some(range)
}

ioctl_none!(
    /// `NS_GET_USERNS`
    ns_get_userns,
    0xb7,
    0x1
);

/// The user namespace that owns a network namespace (Linux 4.9).
fn owner(netns: &Netns) -> Result<File> {
    // SAFETY: the request takes no argument, and the descriptor is open.
    let owner = unsafe { ns_get_userns(netns.as_fd().as_raw_fd()) }
        .context("the kernel does not say which user namespace owns it")?;
    // SAFETY: the kernel has made the descriptor for this call.
    Ok(unsafe { OwnedFd::from_raw_fd(owner) }.into())
}

/// Reads the maps of a user namespace: only a process that is in it has them in
/// its /proc, and a process with threads cannot enter. So a child does, and
/// waits there until its maps are read.
fn read(userns: File) -> Result<IdMaps> {
    let (entered, enters) = pipe2(OFlag::O_CLOEXEC).context("cannot make a pipe")?;
    let (may_go, stays) = pipe2(OFlag::O_CLOEXEC).context("cannot make a pipe")?;
    // SAFETY: the child of a process with threads may only call what is safe in
    // a signal handler; visit() makes system calls and allocates nothing.
    let child = match unsafe { fork() }.context("cannot fork")? {
        ForkResult::Child => {
            // Its own copy of this end would keep the pipe open.
            drop(stays);
            visit(&userns, enters, may_go)
        }
        ForkResult::Parent { child } => child,
    };
    drop((enters, may_go));
    let maps = maps_of(child, entered);
    // The child goes when the last writer does.
    drop(stays);
    waitpid(child, None).context("cannot wait for the child")?;
    maps
}

/// What the child does: it enters, says so, and waits for the end of the pipe.
fn visit(userns: &File, enters: OwnedFd, may_go: OwnedFd) -> ! {
    let entered = setns(userns.as_fd(), CloneFlags::CLONE_NEWUSER).is_ok();
    let said = entered && File::from(enters).write_all(&[1]).is_ok();
    if said {
        let _ = File::from(may_go).read(&mut [0]);
    }
    // SAFETY: ends the process at once, without the parent's exit handlers.
    unsafe { libc::_exit(0) }
}

fn maps_of(child: Pid, entered: OwnedFd) -> Result<IdMaps> {
    let said = File::from(entered).read(&mut [0]);
    if said.context("cannot hear from the child")? == 0 {
        bail!("the agent may not enter the user namespace; it takes CAP_SYS_ADMIN on the node");
    }
    let map = |kind| {
        let path = format!("/proc/{child}/{kind}");
        let text = fs::read_to_string(&path).map_err(|error| anyhow!("{path}: {error}"))?;
        IdMap::parse(&text).with_context(|| path)
    };
    Ok(IdMaps {
        uids: map("uid_map")?,
        gids: map("gid_map")?,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn map(text: &str) -> IdMap {
        IdMap::parse(text).expect("a map")
    }

    #[test]
    fn ids_are_moved_by_their_range() {
        let map = map("         0     100000       1000\n      2000          5          1\n");
        assert_eq!(map.on_node(0), 100_000);
        assert_eq!(map.on_node(999), 100_999);
        assert_eq!(map.on_node(2000), 5);
    }

    #[test]
    fn an_id_outside_of_all_ranges_matches_nobody() {
        let map = map("10 100000 5\n");
        for id in [0, 9, 15, 100_000, u32::MAX] {
            assert_eq!(map.on_node(id), UNMAPPED, "{id}");
        }
        assert_eq!(IdMap::Ranges(Vec::new()).on_node(0), UNMAPPED);
        assert_ne!(UNMAPPED, shunt_abi::NO_OWNER);
    }

    #[test]
    fn the_map_of_the_whole_node_changes_nothing() {
        let whole = map("0 0 4294967295\n");
        for id in [0, 1337, u32::MAX - 2] {
            assert_eq!(whole.on_node(id), id);
            assert_eq!(IdMap::Same.on_node(id), id);
        }
    }

    #[test]
    fn what_is_no_map_is_refused_with_its_line() {
        for line in ["0 1", "0 1 2 3", "a 1 2", "0 -1 2", "0 1 4294967296"] {
            let error = IdMap::parse(&format!("0 1 2\n{line}\n")).expect_err(line);
            assert!(error.to_string().contains(line), "{error}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "[0-9 \\n-]{0,60}", id: u32) {
            if let Ok(map) = IdMap::parse(&text) {
                let _ = map.on_node(id);
            }
        }
    }
}
