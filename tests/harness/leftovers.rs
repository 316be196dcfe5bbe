//! What a killed test process could not take away itself.
//!
//! Every name that outlives a process starts with `shunt-test-`, its process id
//! and a dash. Once in each process, before anything is made, the names of
//! processes that no longer run are looked for and their things removed.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use crate::{cgroup, netns};

const PREFIX: &str = "shunt-test-";

/// A name that nobody else on this machine uses: `shunt-test-PID-NUMBER`,
/// followed by what it is for.
pub fn unique_name(purpose: &str) -> String {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    format!("{PREFIX}{}-{number}-{purpose}", std::process::id())
}

/// An empty directory for one purpose, removed on drop.
pub fn temp_dir(purpose: &str) -> tempfile::TempDir {
    tempfile::Builder::new()
        .prefix(&unique_name(purpose))
        .tempdir()
        .expect("a temporary directory can be made")
}

/// Removes what killed processes left behind.
pub(crate) fn sweep() {
    // Programs are detached with the agent (it dies with the test that started
    // it), or with the file system that they are pinned in, so only names remain.
    for path in orphans(&std::env::temp_dir()) {
        // Not a mount point in most cases.
        let _ = nix::mount::umount(&path.join("bpffs"));
        let _ = fs::remove_dir_all(&path);
    }
    for path in orphans(Path::new(netns::DIRECTORY)) {
        netns::delete(&path);
    }
    for hierarchy in cgroup::hierarchies() {
        for path in orphans(&hierarchy) {
            cgroup::remove_tree(&path);
        }
    }
}

/// The entries of `directory` that were named by processes that are gone.
fn orphans(directory: &Path) -> Vec<PathBuf> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => panic!("cannot list {}: {error}", directory.display()),
    };
    entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| creator(path).is_some_and(|pid| !is_running(pid)))
        .collect()
}

/// The process that named `path`, if the name is one of ours.
fn creator(path: &Path) -> Option<u32> {
    let rest = path.file_name()?.to_str()?.strip_prefix(PREFIX)?;
    rest.split('-').next()?.parse().ok()
}

fn is_running(pid: u32) -> bool {
    Path::new("/proc").join(pid.to_string()).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_tells_who_made_it() {
        let name = unique_name("pod");
        assert_eq!(creator(Path::new(&name)), Some(std::process::id()));
        assert_eq!(creator(Path::new("/run/netns/cni-1234")), None);
        assert_eq!(creator(Path::new("/tmp/shunt-test-x-1-pod")), None);
    }

    #[test]
    fn only_names_of_processes_that_are_gone_are_orphans() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        // The kernel's largest process id is 2^22.
        let gone = directory.path().join(format!("{PREFIX}4194305-0-pod"));
        for path in [
            &gone,
            &directory.path().join(unique_name("pod")),
            &directory.path().join("foreign"),
        ] {
            fs::create_dir(path).expect("a new directory");
        }
        assert_eq!(orphans(directory.path()), [gone]);
    }
}
