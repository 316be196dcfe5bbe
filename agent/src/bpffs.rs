//! A directory on a bpffs, where maps are pinned so that the programs of all
//! pods share them.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, anyhow};
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
        // Somebody else's pins, when the lock was not to be had.
        if self.lock.is_none() {
            return;
        }
        let cleared = self.clear().and_then(|()| {
            if self.mounted {
                umount2(&self.path, MntFlags::MNT_DETACH)?;
            }
            if self.is_new && !self.kept.iter().any(|name| !self.left(name).is_empty()) {
                fs::remove_dir(&self.path)?;
            }
            Ok(())
        });
        if let Err(error) = cleared {
            tracing::warn!(path = %self.path.display(), "cannot clean the bpffs up: {error:#}");
        }
    }
}

/// The name under which a pin is put aside.
fn left_name(name: &str, number: impl std::fmt::Display) -> String {
    format!("LEFT_{name}_{number}")
}

fn lock(path: &Path) -> Result<Flock<File>> {
    let dir = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    Flock::lock(dir, FlockArg::LockExclusiveNonblock).map_err(|(_dir, errno)| {
        if errno == Errno::EWOULDBLOCK {
            anyhow!(
                "another agent keeps its maps at {}; stop it first, or give this one its own \
                 --bpffs",
                path.display()
            )
        } else {
            anyhow!(errno).context(format!("cannot lock {}", path.display()))
        }
    })
}

fn is_bpffs(path: &Path) -> Result<bool> {
    let found = statfs(path).with_context(|| format!("cannot look at {}", path.display()))?;
    Ok(found.filesystem_type() == BPF_FS_MAGIC)
}
