//! A directory on a bpffs, where maps are pinned so that the programs of all
//! pods share them.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::{
        stat::{major, minor},
        statfs::{BPF_FS_MAGIC, statfs},
    },
};

/// Where maps are pinned unless told otherwise.
pub const DEFAULT_DIR: &str = "/sys/fs/bpf/shunt";

/// The agent's directory. What the agent made it unmakes when it is dropped.
#[derive(Debug)]
pub struct PinDir {
    path: PathBuf,
    names: &'static [&'static str],
    kept: &'static [&'static str],
    /// A bpffs was mounted at `path` itself.
    mounted: bool,
    /// There was nothing at `path` before.
    is_new: bool,
    /// Keeps other agents out: they would take these pins for stale ones. Given
    /// up by the kernel however the agent ends.
    lock: Option<Flock<File>>,
}

impl PinDir {
    /// Makes the directory, on a bpffs: where `path` is on none, one is mounted
    /// there. Pins of these `names` that an agent left behind are removed: it has
    /// ended, and its links with it. Those that are among `kept` are put aside
    /// instead, see [`left`](Self::left).
    ///
    /// # Errors
    ///
    /// When the directory cannot be made, mounted or emptied.
    pub fn open(
        path: &Path,
        names: &'static [&'static str],
        kept: &'static [&'static str],
    ) -> Result<Self> {
        let is_new = !path.exists();
        let made = fs::create_dir_all(path);
        let mut dir = Self {
            path: path.to_owned(),
            names,
            kept,
            mounted: false,
            is_new,
            lock: None,
        };
        if made.is_err() || !is_bpffs(path)? {
            let at = dir.mount_point(made)?;
            mount(
                Some("bpf"),
                &at,
                Some("bpf"),
                MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
                None::<&str>,
            )
            .with_context(|| {
                format!(
                    "cannot mount a bpffs at {}; it takes CAP_SYS_ADMIN, or name a directory \
                     of a mounted one with --bpffs",
                    at.display()
                )
            })?;
            dir.mounted = at == path;
            fs::create_dir_all(path)
                .with_context(|| format!("cannot make {} on the bpffs", path.display()))?;
        }
        dir.lock = Some(lock(path)?);
        dir.leave(dir.kept)?;
        dir.clear()?;
        Ok(dir)
    }

    /// Where a map is pinned.
    pub fn pin(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Puts the pins of these `names` aside, where nobody takes them away but the
    /// one who finds them by [`left`](Self::left).
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn leave(&self, names: &[&str]) -> Result<()> {
        for name in names {
            let pin = self.pin(name);
            if !pin.exists() {
                continue;
            }
            let mut free = (0..u32::MAX).map(|number| self.pin(&left_name(name, number)));
            let aside = free
                .find(|path| !path.exists())
                .context("there is no name left for a pin")?;
            fs::rename(&pin, &aside)
                .with_context(|| format!("cannot put the pin {} aside", pin.display()))?;
        }
        Ok(())
    }

    /// The pins of a name that were put aside, by this agent or a former one.
    pub fn left(&self, name: &str) -> Vec<PathBuf> {
        let start = left_name(name, "");
        let Ok(entries) = fs::read_dir(&self.path) else {
            return Vec::new();
        };
        entries
            .filter_map(Result::ok)
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(&start))
            .map(|entry| entry.path())
            .collect()
    }

    /// Where a bpffs has to be mounted: at the usual place, which takes no
    /// directories before, or at the directory itself.
    fn mount_point(&self, made: io::Result<()>) -> Result<PathBuf> {
        match made {
            Ok(()) if self.path != Path::new(DEFAULT_DIR) => Ok(self.path.clone()),
            _ if self.path == Path::new(DEFAULT_DIR) => Ok(PathBuf::from("/sys/fs/bpf")),
            Ok(()) => Ok(self.path.clone()),
            Err(error) => Err(error)
                .with_context(|| format!("cannot make the directory {}", self.path.display())),
        }
    }

    fn undo(&self) -> Result<()> {
        // Without the lock the pins are somebody else's, and so is the directory.
        let is_own = self.lock.is_some();
        if is_own {
            self.clear()?;
        }
        if self.mounted {
            umount2(&self.path, MntFlags::MNT_DETACH)?;
        }
        let is_empty = self.kept.iter().all(|name| self.left(name).is_empty());
        if is_own && self.is_new && is_empty {
            fs::remove_dir(&self.path)?;
        }
        Ok(())
    }

    fn clear(&self) -> Result<()> {
        for name in self.names {
            let pin = self.pin(name);
            match fs::remove_file(&pin) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(error)
                        .with_context(|| format!("cannot remove the pin {}", pin.display()));
                }
                Ok(()) | Err(_) => {}
            }
        }
        Ok(())
    }
}

impl Drop for PinDir {
    fn drop(&mut self) {
        if let Err(error) = self.undo() {
            tracing::warn!(path = %self.path.display(), "cannot clean the bpffs up: {error:#}");
        }
    }
}

/// The name under which a pin is put aside.
fn left_name(name: &str, number: impl std::fmt::Display) -> String {
    format!("LEFT_{name}_{number}")
}

/// What is at a place where maps would be pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A directory on a bpffs, or the bpffs it can be made on, and no agent.
    Mounted,
    /// No bpffs yet.
    Missing,
    /// The directory of a running agent.
    Taken,
}

/// Looks at a place where maps would be pinned, and changes nothing.
///
/// # Errors
///
/// When something else than a directory is there, or it cannot be looked at.
pub fn look(path: &Path) -> Result<Place> {
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let parent_is_one = path
                .parent()
                .is_some_and(|dir| is_bpffs(dir).unwrap_or(false));
            return Ok(if parent_is_one {
                Place::Mounted
            } else {
                Place::Missing
            });
        }
        found => {
            let found = found.with_context(|| format!("cannot look at {}", path.display()))?;
            if !found.is_dir() {
                bail!("{} is no directory", path.display());
            }
        }
    }
    if !is_bpffs(path)? {
        return Ok(Place::Missing);
    }
    Ok(if is_locked(path)? {
        Place::Taken
    } else {
        Place::Mounted
    })
}

/// Whether somebody holds the lock. Asks without taking it, even for a moment: an
/// agent that starts just then would take that for another agent. Nobody in a PID
/// namespace above this one is seen.
fn is_locked(path: &Path) -> Result<bool> {
    let found = fs::metadata(path).with_context(|| format!("cannot look at {}", path.display()))?;
    let locks = fs::read_to_string("/proc/locks")
        .context("cannot read /proc/locks to tell whether an agent runs; is /proc mounted?")?;
    Ok(holds_lock(&locks, found.dev(), found.ino()))
}

/// Whether the text of /proc/locks has a lock of flock() on a file. Those that wait
/// for one have an arrow in the second column.
fn holds_lock(locks: &str, device: u64, inode: u64) -> bool {
    let file = format!("{:02x}:{:02x}:{inode}", major(device), minor(device));
    locks.lines().any(|line| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        columns.get(1) == Some(&"FLOCK") && columns.get(5) == Some(&file.as_str())
    })
}

fn lock(path: &Path) -> Result<Flock<File>> {
    let shown = path.display();
    let dir = File::open(path).with_context(|| format!("cannot open {shown}"))?;
    match Flock::lock(dir, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((_dir, Errno::EWOULDBLOCK)) => bail!(
            "another agent keeps its maps at {shown}; stop it first, or give this one its own \
             --bpffs"
        ),
        Err((_dir, errno)) => Err(errno).with_context(|| format!("cannot lock {shown}")),
    }
}

fn is_bpffs(path: &Path) -> Result<bool> {
    let found = statfs(path).with_context(|| format!("cannot look at {}", path.display()))?;
    Ok(found.filesystem_type() == BPF_FS_MAGIC)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_found_by_its_file() {
        let locks = "1: POSIX  ADVISORY  WRITE 7 00:1b:42 0 EOF\n\
                     2: FLOCK  ADVISORY  WRITE 8 00:1b:43 0 EOF\n\
                     2: -> FLOCK  ADVISORY  WRITE 9 00:1b:44 0 EOF\n";
        let device = nix::sys::stat::makedev(0, 0x1b);
        let found = [42, 43, 44].map(|inode| holds_lock(locks, device, inode));
        assert_eq!(found, [false, true, false]);
        assert!(!holds_lock(locks, nix::sys::stat::makedev(0, 0x1c), 43));
    }

    #[test]
    fn looking_sees_a_lock_and_takes_none() {
        let dir = tempfile::tempdir().expect("a directory");
        assert!(!is_locked(dir.path()).expect("it can be asked"));
        let held = lock(dir.path()).expect("nobody else has it");
        assert!(is_locked(dir.path()).expect("it can be asked"));
        drop(held);
        assert!(!is_locked(dir.path()).expect("it can be asked"));
    }
}
