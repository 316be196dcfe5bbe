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

/// The directory of the links that stay in force without an agent.
pub const LINKS: &str = "links";

/// How the directories of links begin that a later agent has put aside.
pub const FORMER: &str = "former_";

/// The directory of maps that are not in use yet.
const NEW: &str = "new";

/// What the mounts are called that shunt made, in /proc/mounts.
const MOUNT_NAME: &str = "shunt";

/// The agent's directory. What the agent made it unmakes when it is dropped, unless
/// it is to [stay](Self::stay).
#[derive(Debug)]
pub struct PinDir {
    path: PathBuf,
    names: &'static [&'static str],
    kept: &'static [&'static str],
    /// A bpffs was mounted at `path` itself.
    mounted: bool,
    /// There was nothing at `path` before.
    is_new: bool,
    /// Everything in it outlives the agent.
    stays: bool,
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
    /// Where an agent left its links in force, one that is to do so, too, takes them
    /// over with everything else that is there, which then stays, whatever happens.
    ///
    /// # Errors
    ///
    /// When the directory cannot be made, mounted or emptied; when links are in force
    /// and are not to be taken over.
    pub fn open(
        path: &Path,
        names: &'static [&'static str],
        kept: &'static [&'static str],
        takes_over: bool,
    ) -> Result<Self> {
        let is_new = !path.exists();
        let made = fs::create_dir_all(path);
        let mut dir = Self {
            path: path.to_owned(),
            names,
            kept,
            mounted: false,
            is_new,
            stays: false,
            lock: None,
        };
        if made.is_err() || !is_bpffs(path)? {
            let at = dir.mount_point(made)?;
            mount(
                Some(MOUNT_NAME),
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
            if takes_over && !is_the_nodes(&at) {
                tracing::warn!(
                    path = %at.display(),
                    "the bpffs was mounted in this container alone: what is pinned there ends with \
                     it, and so does redirection; mount one on the node (mount -t bpf bpf \
                     /sys/fs/bpf), or install the chart with privileged=true"
                );
            }
            fs::create_dir_all(path)
                .with_context(|| format!("cannot make {} on the bpffs", path.display()))?;
        }
        let held = lock(path)?;
        dir.stays = !link_dirs(path).is_empty();
        if dir.stays && !takes_over {
            bail!(
                "an agent that ran with --persistent has left redirection in force at {}; \
                 start with --persistent to take it over, or end it first with `shunt uninstall`",
                path.display()
            );
        }
        dir.lock = Some(held);
        dir.leave(dir.kept)?;
        if !dir.stays {
            dir.clear()?;
        }
        Ok(dir)
    }

    /// Takes a directory that agents have left, to [remove](Self::uninstall) it;
    /// `None` when there is none.
    ///
    /// # Errors
    ///
    /// When an agent still runs there, or it cannot be looked at.
    pub fn take(
        path: &Path,
        names: &'static [&'static str],
        kept: &'static [&'static str],
    ) -> Result<Option<Self>> {
        if !path.is_dir() || !is_bpffs(path)? {
            return Ok(None);
        }
        Ok(Some(Self {
            path: path.to_owned(),
            names,
            kept,
            mounted: false,
            is_new: false,
            // Until it is taken away on purpose.
            stays: true,
            lock: Some(lock(path)?),
        }))
    }

    /// Removes every pin and the directory, and a mount that shunt made for it.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn uninstall(mut self) -> Result<()> {
        self.clear()?;
        for name in self.kept {
            for pin in self.left(name) {
                remove_file(&pin)?;
            }
        }
        let path = self.path.clone();
        // An open directory keeps its file system busy.
        self.lock = None;
        if is_own_mount(&path)? {
            unmount(&path)?;
        }
        fs::remove_dir(&path)
            .with_context(|| format!("cannot remove the directory {}", path.display()))?;
        let Some(above) = path.parent() else {
            return Ok(());
        };
        // The kernel's own files there have a dot in their names, and nobody else's.
        let is_kernels = |entry: io::Result<fs::DirEntry>| {
            entry.is_ok_and(|entry| entry.file_name().to_string_lossy().contains('.'))
        };
        let is_empty = fs::read_dir(above).is_ok_and(|mut entries| entries.all(is_kernels));
        if is_empty && is_own_mount(above)? {
            unmount(above)?;
        }
        Ok(())
    }

    /// From now on everything in it outlives the agent, however that ends.
    pub fn stay(&mut self) {
        self.stays = true;
    }

    /// Whether something is in force in it that was left by a former agent.
    pub fn is_in_force(&self) -> bool {
        !link_dirs(&self.path).is_empty()
    }

    /// An empty directory for maps that are not in use yet.
    ///
    /// # Errors
    ///
    /// When it cannot be made.
    pub fn aside(&self) -> Result<PathBuf> {
        let dir = self.path.join(NEW);
        remove_dir(&dir)?;
        fs::create_dir(&dir)
            .with_context(|| format!("cannot make the directory {}", dir.display()))?;
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
            Err(error) => Err(error).with_context(|| {
                format!(
                    "cannot make the directory {}; name one with --bpffs that can be made, \
                         such as {DEFAULT_DIR}",
                    self.path.display()
                )
            }),
        }
    }

    fn undo(&self) -> Result<()> {
        if self.stays {
            return remove_dir(&self.path.join(NEW));
        }
        // Without the lock the pins are somebody else's, and so is the directory.
        let is_own = self.lock.is_some();
        if is_own {
            self.clear()?;
        }
        if self.mounted {
            unmount(&self.path)?;
        }
        let is_empty = self.kept.iter().all(|name| self.left(name).is_empty());
        if is_own && self.is_new && is_empty {
            fs::remove_dir(&self.path)?;
        }
        Ok(())
    }

    fn clear(&self) -> Result<()> {
        for name in self.names {
            remove_file(&self.pin(name))?;
        }
        for dir in link_dirs(&self.path) {
            remove_dir(&dir)?;
        }
        remove_dir(&self.path.join(NEW))
    }
}

/// The directories of links in the agents' directory.
fn link_dirs(path: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(path) else {
        return Vec::new();
    };
    let has_links = |entry: &fs::DirEntry| {
        let name = entry.file_name();
        name == LINKS || name.to_string_lossy().starts_with(FORMER)
    };
    let found = entries.filter_map(Result::ok).filter(has_links);
    found.map(|entry| entry.path()).collect()
}

/// Removes a file, if it is there.
///
/// # Errors
///
/// When it cannot be removed.
pub(crate) fn remove_file(path: &Path) -> Result<()> {
    gone(fs::remove_file(path)).with_context(|| format!("cannot remove {}", path.display()))
}

/// Removes a directory with all that is in it, if it is there.
///
/// # Errors
///
/// When it cannot be removed.
pub(crate) fn remove_dir(path: &Path) -> Result<()> {
    gone(fs::remove_dir_all(path)).with_context(|| format!("cannot remove {}", path.display()))
}

/// What is not there needs no removal.
fn gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Whether the mount at `path` is one of the first process' too, which outlives this one.
/// Where that cannot be told nothing is said: without the node's processes it is not the
/// node's agent.
fn is_the_nodes(path: &Path) -> bool {
    fs::read_to_string("/proc/1/mounts").map_or(true, |mounts| is_mounted(&mounts, path))
}

/// Whether a text like /proc/mounts has a mount of shunt's at `path`.
fn is_mounted(mounts: &str, path: &Path) -> bool {
    mounts.lines().any(|line| {
        let mut fields = line.split(' ');
        (fields.next(), fields.next(), fields.next())
            == (Some(MOUNT_NAME), path.to_str(), Some("bpf"))
    })
}

/// Whether shunt mounted a bpffs at `path`.
fn is_own_mount(path: &Path) -> Result<bool> {
    let mounts = fs::read_to_string("/proc/self/mounts")
        .context("cannot read /proc/self/mounts; is /proc mounted?")?;
    Ok(is_mounted(&mounts, path))
}

fn unmount(path: &Path) -> Result<()> {
    umount2(path, MntFlags::MNT_DETACH)
        .with_context(|| format!("cannot unmount the bpffs at {}", path.display()))
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
    fn a_mount_of_shunts_is_known_by_its_name() {
        let mounts = "bpf /sys/fs/bpf bpf rw 0 0\nshunt /run/own bpf rw,nosuid 0 0\n";
        let found = ["/sys/fs/bpf", "/run/own", "/run"].map(|at| is_mounted(mounts, Path::new(at)));
        assert_eq!(found, [false, true, false]);
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
