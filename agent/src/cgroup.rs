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
/// charges nobody. On a node that is a container itself it cannot, as a rule: its root is none.
///
/// # Errors
///
/// When the node's hierarchy cannot be seen, or the kernel refuses.
pub fn leave_memory() -> Result<()> {
    see_the_nodes()?;
    let (version, _) = own_memory()?;
    // What a container has of the node's hierarchies is mounted read-only, as a rule.
    if let Err(here) = join_root(version, "/proc/self/mountinfo", "")
        && let Err(there) = join_root(version, "/proc/1/mountinfo", "/proc/1/root")
    {
        bail!("{here:#}; {there:#}");
    }
    let (_, path) = own_memory()?;
    if path != "/" {
        bail!("the memory cgroup is {path} still");
    }
    Ok(())
}

/// Enters the cgroup namespace of the node's first process, if this is a container: in its own
/// one its cgroup is the root, which the kernel lets nobody leave (`nsdelegate`).
fn see_the_nodes() -> Result<()> {
    const OWN: &str = "/proc/self/ns/cgroup";
    const NODES: &str = "/proc/1/ns/cgroup";
    /// The inode of the machine's first one (`PROC_CGROUP_INIT_INO`).
    const FIRST: u64 = 0xefff_fffb;
    let inode = |path| fs::metadata(path).map(|found| found.ino());
    let own = inode(OWN).with_context(|| format!("cannot look at {OWN}"))?;
    if own == FIRST {
        return Ok(());
    }
    let nodes =
        inode(NODES).with_context(|| format!("cannot look at {NODES}; it takes CAP_SYS_PTRACE"))?;
    if own == nodes {
        bail!(
            "the first process that is seen here has the same cgroup namespace, which is not \
             the machine's: this container does not see the node's processes (hostPID), or the \
             node is a container itself"
        );
    }
    let namespace = File::open(NODES).with_context(|| format!("cannot open {NODES}"))?;
    setns(namespace, CloneFlags::CLONE_NEWCGROUP)
        .context("cannot enter the node's cgroup namespace; it takes CAP_SYS_ADMIN")
}

/// The two kinds of hierarchies of cgroups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// The kind of hierarchy that counts memory, and the path of this process in it.
fn own_memory() -> Result<(Version, String)> {
    const OWN: &str = "/proc/self/cgroup";
    let cgroups = fs::read_to_string(OWN).with_context(|| format!("cannot read {OWN}"))?;
    memory_in(&cgroups).with_context(|| format!("no memory cgroup is in {OWN}"))
}

/// The same by the text of /proc/PID/cgroup: one of version 1 that names memory, or else that
/// of version 2, which names nothing.
fn memory_in(cgroups: &str) -> Option<(Version, String)> {
    let named = |name: &str| {
        cgroups.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (names, path) = (fields.next()?, fields.next()?);
            let is_named = names.split(',').any(|one| one == name);
            is_named.then(|| path.to_owned())
        })
    };
    let one = named("memory").map(|path| (Version::One, path));
    one.or_else(|| named("").map(|path| (Version::Two, path)))
}

/// Moves this process to the root of the hierarchy that counts memory, which is mounted where
/// `mounts` says, by the view of a process whose root is at `above`.
fn join_root(version: Version, mounts: &str, above: &str) -> Result<()> {
    let text = fs::read_to_string(mounts).with_context(|| format!("cannot read {mounts}"))?;
    let root = memory_root_in(version, &text)
        .with_context(|| format!("the root of memory cgroups is not in {mounts}"))?;
    let members = format!("{above}{}/cgroup.procs", root.display());
    // 0 is whoever writes.
    fs::write(&members, "0").with_context(|| format!("cannot move to {members}"))
}

/// Where the root of the hierarchy that counts memory is mounted, by the text of
/// /proc/PID/mountinfo.
fn memory_root_in(version: Version, mounts: &str) -> Option<PathBuf> {
    let (wanted_kind, option) = match version {
        Version::One => ("cgroup", Some("memory")),
        Version::Two => ("cgroup2", None),
    };
    mounts.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let mut fields = before.split(' ').skip(3);
        let (root, path) = (fields.next()?, fields.next()?);
        let mut fields = after.split(' ');
        let (kind, mut options) = (fields.next()?, fields.nth(1)?.split(','));
        let has_option = option.is_none_or(|option| options.any(|one| one == option));
        let is_it = kind == wanted_kind && root == "/" && has_option;
        is_it.then(|| PathBuf::from(unescape(path)))
    })
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
    fn memory_is_counted_in_the_hierarchy_that_names_it() {
        let found = |cgroups| memory_in(cgroups).expect("there is one");
        let v2 = found("0::/kubepods.slice/a:b\n");
        assert_eq!(v2, (Version::Two, "/kubepods.slice/a:b".to_owned()));
        let hybrid = "9:name=systemd:/x\n4:hugetlb,memory:/pod\n0::/unified\n";
        assert_eq!(found(hybrid), (Version::One, "/pod".to_owned()));
        assert_eq!(memory_in("9:name=systemd:/x\n"), None);
    }

    #[test]
    fn the_root_of_a_part_is_not_the_root() {
        let root = |version, mounts| memory_root_in(version, mounts);
        let v2 = "36 25 0:31 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(root(Version::Two, v2), Some("/sys/fs/cgroup".into()));
        let part = "42 31 0:29 /pod /run/pod rw - cgroup cgroup rw,memory\n\
                    40 31 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
                    41 31 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n";
        assert_eq!(root(Version::One, part), None);
        let whole = "43 31 0:29 / /sys/fs/cgroup/memory rw shared:3 - cgroup cgroup rw,memory\n";
        let whole = format!("{part}{whole}");
        let found = root(Version::One, &whole);
        assert_eq!(found, Some("/sys/fs/cgroup/memory".into()));
    }

    #[test]
    fn without_one_there_is_none() {
        assert_eq!(root_in("proc /proc proc rw 0 0\n"), None);
    }
}
