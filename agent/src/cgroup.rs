//! Where the node's cgroup v2 hierarchy is mounted.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

/// Finds the root of the cgroup v2 hierarchy: `/sys/fs/cgroup` on most nodes,
/// `/sys/fs/cgroup/unified` on hybrid ones.
///
/// # Errors
///
/// When none is mounted, or /proc cannot be read.
pub fn find_root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts")
        .context("cannot read /proc/self/mounts to find the cgroup v2 mount; is /proc mounted?")?;
    root_in(&mounts).context(
        "no cgroup v2 is mounted, and the programs hang on its root; \
         mount it (mount -t cgroup2 none /sys/fs/cgroup/unified) or name it with --cgroup",
    )
}

/// Whether a directory belongs to a cgroup v2 hierarchy.
pub fn is_v2(path: &Path) -> bool {
    statfs(path).is_ok_and(|found| found.filesystem_type() == CGROUP2_SUPER_MAGIC)
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
    fn without_one_there_is_none() {
        assert_eq!(root_in("proc /proc proc rw 0 0\n"), None);
    }
}
