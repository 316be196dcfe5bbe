//! The file systems that the agent needs.

use std::path::{Path, PathBuf};

use super::Finding;
use crate::{bpffs, cgroup};

/// The cgroup v2 directory that the programs would hang on.
pub(super) fn cgroup(named: Option<&Path>) -> Result<PathBuf, Finding> {
    let root = match named {
        Some(path) => Ok(path.to_owned()),
        None => cgroup::find_root(),
    };
    match root {
        Ok(path) if cgroup::is_v2(&path) => Ok(path),
        Ok(path) => Err(Finding::failure(
            "cgroup v2",
            format!("{} is no directory of cgroup v2", path.display()),
            "name one with --cgroup, such as /sys/fs/cgroup",
        )),
        Err(error) => Err(Finding::failure(
            "cgroup v2",
            format!("{error:#}"),
            "mount one: mount -t cgroup2 none /sys/fs/cgroup/unified",
        )),
    }
}

/// Where maps would be pinned.
pub(super) fn bpffs(path: &Path) -> Finding {
    let subject = "bpffs";
    let shown = path.display();
    match bpffs::look(path) {
        Ok(bpffs::Place::Mounted) => Finding::ok(subject, format!("{shown} is on one")),
        Ok(bpffs::Place::Missing) => Finding::ok(
            subject,
            format!("none at {shown} yet; the agent mounts one"),
        ),
        Ok(bpffs::Place::Taken) => Finding::warning(
            subject,
            format!("an agent keeps its maps at {shown}"),
            "nothing, if it is the one that is meant; a second needs a --bpffs and a --socket of its own",
        ),
        Err(error) => Finding::failure(
            subject,
            format!("{error:#}"),
            "name a directory on a bpffs with --bpffs",
        ),
    }
}
