//! A directory on a bpffs, where maps are pinned so that the programs of all
//! pods share them.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

/// Where maps are pinned unless told otherwise.
pub const DEFAULT_DIR: &str = "/sys/fs/bpf/shunt";

/// The agent's directory. What the agent made it unmakes when it is dropped.
#[derive(Debug)]
pub struct PinDir {
    path: PathBuf,
    names: &'static [&'static str],
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
    /// ended, and its links with it.
    ///
    /// # Errors
    ///
    /// When the directory cannot be made, mounted or emptied.
    pub fn open(path: &Path, names: &'static [&'static str]) -> Result<Self> {
        let is_new = !path.exists();
        let made = fs::create_dir_all(path);
        let mut dir = Self {
            path: path.to_owned(),
            names,
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
        dir.clear()?;
        Ok(dir)
    }

    /// Where a map is pinned.
    pub fn pin(&self, name: &str) -> PathBuf {
        self.path.join(name)
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
        if is_own && self.is_new {
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
    Ok(match try_lock(path)? {
        Some(_given_up_at_once) => Place::Mounted,
        None => Place::Taken,
    })
}

fn lock(path: &Path) -> Result<Flock<File>> {
    try_lock(path)?.with_context(|| {
        format!(
            "another agent keeps its maps at {}; stop it first, or give this one its own \
             --bpffs",
            path.display()
        )
    })
}

/// `None` when another agent has the lock.
fn try_lock(path: &Path) -> Result<Option<Flock<File>>> {
    let dir = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    match Flock::lock(dir, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_dir, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_dir, errno)) => Err(errno).with_context(|| format!("cannot lock {}", path.display())),
    }
}

fn is_bpffs(path: &Path) -> Result<bool> {
    let found = statfs(path).with_context(|| format!("cannot look at {}", path.display()))?;
    Ok(found.filesystem_type() == BPF_FS_MAGIC)
}
