//! The node's hierarchies of cgroups: where they are mounted, and how to leave that of memory.

use std::{
    fs::{self, File},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sched::{CloneFlags, setns},
    sys::statfs::{CGROUP2_SUPER_MAGIC, statfs},
};

/// Finds the root of the cgroup v2 hierarchy: `/sys/fs/cgroup` on most nodes,
/// `/sys/fs/cgroup/unified` on hybrid ones.
///
/// # Errors
///
/// When none is mounted, or /proc cannot be read.
pub fn find_root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts")
        .context("cannot read /proc/self/mounts to find the cgroup v2 mount; is /proc mounted?")?;
    root_in(&mounts).context("no cgroup v2 is mounted, and the programs hang on its root")
}

/// Whether there is a directory of a cgroup v2 hierarchy at `path`.
pub fn is_v2(path: &Path) -> bool {
    path.is_dir() && statfs(path).is_ok_and(|found| found.filesystem_type() == CGROUP2_SUPER_MAGIC)
}

/// Moves this process to the root of the node's hierarchy of memory cgroups, where the kernel
/// charges nobody.
///
/// # Errors
///
/// When the node's hierarchy cannot be seen, or the kernel refuses.
pub fn leave_memory() -> Result<()> {
    see_the_nodes()?;
    // What a container has of the node's hierarchy is mounted read-only, as a rule.
    join_root("/proc/self/mountinfo", "")
        .or_else(|_| join_root("/proc/1/mountinfo", "/proc/1/root"))
}

/// Enters the cgroup namespace of the node's first process, if this is a container: in its own
/// one its cgroup is the root, which the kernel lets nobody leave (`nsdelegate`).
fn see_the_nodes() -> Result<()> {
    const NODES: &str = "/proc/1/ns/cgroup";
    /// The inode of the first namespace (`PROC_CGROUP_INIT_INO`).
    const FIRST: u64 = 0xefff_fffb;
    let inode = |path| {
        let found = fs::metadata(path).with_context(|| {
            format!("cannot look at {path}; another process' takes CAP_SYS_PTRACE")
        });
        found.map(|found| found.ino())
    };
    let own = inode("/proc/self/ns/cgroup")?;
    if own == FIRST {
        return Ok(());
    }
    if own == inode(NODES)? {
        bail!("the node's processes cannot be seen in this container (hostPID)");
    }
    let namespace = File::open(NODES).with_context(|| format!("cannot open {NODES}"))?;
    setns(namespace, CloneFlags::CLONE_NEWCGROUP)
        .context("cannot enter the node's cgroup namespace; it takes CAP_SYS_ADMIN")
}

/// Moves this process to the root of the hierarchy that is mounted where `mounts` says, by the
/// view of a process whose root is at `above`.
fn join_root(mounts: &str, above: &str) -> Result<()> {
    let text = fs::read_to_string(mounts).with_context(|| format!("cannot read {mounts}"))?;
    let root = memory_root_in(&text)
        .with_context(|| format!("no root of memory cgroups is in {mounts}"))?;
    let members = format!("{above}{}/cgroup.procs", root.display());
    // 0 is whoever writes.
    fs::write(&members, "0").with_context(|| format!("cannot move to {members}"))
}

/// Where the root of the hierarchy with the memory controller is mounted, by the text of
/// /proc/PID/mountinfo: one of version 1 that names it, or that of version 2.
fn memory_root_in(mounts: &str) -> Option<PathBuf> {
    let mounted = |kind: &str, option: Option<&str>| {
        mounts.lines().find_map(|line| {
            let (before, after) = line.split_once(" - ")?;
            let mut fields = before.split(' ').skip(3);
            let (root, path) = (fields.next()?, fields.next()?);
            let mut fields = after.split(' ');
            let is_it = fields.next() == Some(kind) && root == "/";
            let mut options = fields.nth(1)?.split(',');
            let has_option = option.is_none_or(|option| options.any(|found| found == option));
            (is_it && has_option).then(|| PathBuf::from(unescape(path)))
        })
    };
    mounted("cgroup", Some("memory")).or_else(|| mounted("cgroup2", None))
}

/// The first cgroup2 mount point in the text of /proc/self/mounts, the usual
/// places preferred.
fn root_in(mounts: &str) -> Option<PathBuf> {
    let mut found: Vec<&str> = mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let (path, kind) = (fields.next()?, fields.next()?);
            (kind == "cgroup2").then_some(path)
        })
        .collect();
    found.sort_by_key(|path| !path.starts_with("/sys/fs/cgroup"));
    found.first().map(|path| PathBuf::from(unescape(path)))
}

/// Undoes the octal escapes of /proc/self/mounts.
fn unescape(path: &str) -> String {
    path.replace("\\040", " ")
        .replace("\\011", "\t")
        .replace("\\134", "\\")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hybrid_host_has_it_below() {
        let mounts = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
                      cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(root_in(mounts), Some("/sys/fs/cgroup/unified".into()));
    }

    #[test]
    fn the_usual_place_is_preferred() {
        let mounts = "none /run/cg\\040two cgroup2 rw 0 0\n\
                      cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n";
        assert_eq!(root_in(mounts), Some("/sys/fs/cgroup".into()));
        let only = "none /run/cg\\040two cgroup2 rw 0 0\n";
        assert_eq!(root_in(only), Some("/run/cg two".into()));
    }

    #[test]
    fn memory_is_in_the_hierarchy_that_names_it() {
        let v2 = "36 25 0:31 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(memory_root_in(v2), Some("/sys/fs/cgroup".into()));
        let hybrid = "40 31 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
                      41 31 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      42 31 0:29 /pod /run/pod rw - cgroup cgroup rw,memory\n\
                      43 31 0:29 / /sys/fs/cgroup/memory rw shared:3 - cgroup cgroup rw,memory\n";
        let root = memory_root_in(hybrid);
        assert_eq!(root, Some("/sys/fs/cgroup/memory".into()));
        assert_eq!(memory_root_in("22 1 0:5 / /proc rw - proc proc rw\n"), None);
    }

    #[test]
    fn without_one_there_is_none() {
        assert_eq!(root_in("proc /proc proc rw 0 0\n"), None);
    }
}
