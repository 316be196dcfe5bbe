//! A cgroup for each test, so that the programs of its agent see the sockets of
//! that test alone.
//!
//! BPF on cgroups looks at the cgroup of the *task* that opened the socket, and
//! the tests of one process are threads of it. Threads of one process can be in
//! different cgroups when those are `threaded`, and all of them lie below one
//! ordinary cgroup that holds the process: that one is made here as well, for
//! as long as there are tests.

use std::{
    fs,
    io::{self, Read, Seek, SeekFrom},
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock, PoisonError, Weak},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::leftovers::unique_name;

/// The root of the cgroup v2 hierarchy, wherever it is mounted.
///
/// # Panics
///
/// When none is mounted.
pub fn root() -> PathBuf {
    let mounts = fs::read_to_string("/proc/mounts").expect("/proc is mounted");
    mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let target = fields.next()?;
            (fields.next()? == "cgroup2").then(|| PathBuf::from(target))
        })
        .next()
        .expect("no cgroup v2 hierarchy: mount one with `mount -t cgroup2 none /sys/fs/cgroup`")
}

/// Where hierarchies of cgroups are mounted, of version 1 and 2.
pub(crate) fn hierarchies() -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").expect("/proc is mounted");
    let fields = mounts.lines().map(|line| line.split(' ').skip(1));
    fields
        .filter_map(|mut fields| {
            let target = fields.next()?;
            fields.next()?.starts_with("cgroup").then(|| target.into())
        })
        .collect()
}

/// Removes a cgroup and those below it. Nobody may be in them.
pub fn remove_tree(path: &Path) {
    let Ok(entries) = fs::read_dir(path) else {
        return;
    };
    for child in entries.flatten().map(|entry| entry.path()) {
        if child.is_dir() {
            remove_tree(&child);
        }
    }
    // Another process may have been quicker.
    let _ = fs::remove_dir(path);
}

/// The cgroup of this process; its threads can go into cgroups below it.
#[derive(Debug)]
struct ProcessCgroup {
    path: PathBuf,
}

/// The one of this process; made by the first test that asks, gone with the
/// last that drops it. The lock is held while the process moves.
static CURRENT: Mutex<Weak<ProcessCgroup>> = Mutex::new(Weak::new());

impl ProcessCgroup {
    fn shared() -> Arc<Self> {
        let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
        current.upgrade().unwrap_or_else(|| {
            let made = Arc::new(Self::make());
            *current = Arc::downgrade(&made);
            made
        })
    }

    fn make() -> Self {
        // Asked for while the process is still there.
        home();
        let path = root().join(unique_name("process"));
        fs::create_dir(&path).unwrap_or_else(|e| panic!("cannot make {}: {e}", path.display()));
        write(&path.join("cgroup.procs"), &std::process::id().to_string());
        Self { path }
    }
}

impl Drop for ProcessCgroup {
    fn drop(&mut self) {
        let current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
        // Another test may have made the next one since the last reference to
        // this one went: the process is in that one then, and stays there.
        if current.strong_count() == 0 {
            write(
                &home().join("cgroup.procs"),
                &std::process::id().to_string(),
            );
        }
        remove_tree(&self.path);
    }
}

/// The directory of the cgroup in which this process was started.
fn home() -> &'static Path {
    static HOME: OnceLock<PathBuf> = OnceLock::new();
    HOME.get_or_init(|| {
        let cgroups = fs::read_to_string("/proc/self/cgroup").expect("/proc is mounted");
        let path = cgroups
            .lines()
            .find_map(|line| line.strip_prefix("0::/"))
            .expect("every process has a cgroup v2 where one is mounted");
        root().join(path)
    })
}

/// A cgroup for the sockets of one test. It can be entered by threads of this
/// process and by its children; removed on drop, when all of them have ended.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    /// Held open so that a child can enter between fork and exec.
    procs: OwnedFd,
    _process: Arc<ProcessCgroup>,
}

impl Cgroup {
    /// A new cgroup.
    ///
    /// # Panics
    ///
    /// When the kernel refuses; this needs root.
    pub fn new() -> Self {
        crate::require_root();
        let process = ProcessCgroup::shared();
        let path = process.path.join(unique_name("test"));
        fs::create_dir(&path).unwrap_or_else(|e| panic!("cannot make {}: {e}", path.display()));
        write(&path.join("cgroup.type"), "threaded");
        let procs = fs::OpenOptions::new()
            .write(true)
            .open(path.join("cgroup.procs"))
            .expect("a cgroup has a file of its processes");
        Self {
            path,
            procs: procs.into(),
            _process: process,
        }
    }

    /// Its directory: what `shunt run --cgroup` wants.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Moves the calling process, which must have one thread only, into this
    /// cgroup. Safe between fork and exec: one system call.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub(crate) fn enter_after_fork(&self) -> io::Result<()> {
        nix::unistd::write(&self.procs, b"0")?;
        Ok(())
    }
}

impl Default for Cgroup {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let result = self
            .wait_until_empty()
            .and_then(|()| fs::remove_dir(&self.path));
        if let Err(error) = result
            && !std::thread::panicking()
        {
            panic!("cannot remove {}: {error}", self.path.display());
        }
    }
}

impl Cgroup {
    /// A thread that was joined may still be on its way out of the kernel.
    fn wait_until_empty(&self) -> io::Result<()> {
        let mut events = fs::File::open(self.path.join("cgroup.events"))?;
        loop {
            let mut text = String::new();
            events.seek(SeekFrom::Start(0))?;
            events.read_to_string(&mut text)?;
            if text.contains("populated 0") {
                return Ok(());
            }
            let mut changed = [PollFd::new(events.as_fd(), PollFlags::POLLPRI)];
            if poll(&mut changed, PollTimeout::from(EXIT_DEADLINE_MS))? == 0 {
                return Err(io::Error::other(format!(
                    "somebody is still in it after {EXIT_DEADLINE_MS} ms: {:?}",
                    fs::read_to_string(self.path.join("cgroup.threads"))
                )));
            }
        }
    }
}

/// Moves the calling thread into the cgroup at `path`.
pub(crate) fn enter(path: &Path) {
    write(&path.join("cgroup.threads"), "0");
}

/// How long a thread that has ended may take to leave its cgroup.
const EXIT_DEADLINE_MS: u16 = 60_000;

fn write(path: &Path, text: &str) {
    fs::write(path, text)
        .unwrap_or_else(|error| panic!("cannot write {text:?} to {}: {error}", path.display()));
}
