//! Network namespaces with names.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    thread,
};

use nix::{
    sched::{CloneFlags, setns},
    sys::{prctl, signal::Signal},
    unistd::{Gid, Uid, setgid, setgroups, setuid},
};

use crate::{
    Cgroup, Owner, cgroup,
    command::{output_of, output_with_input},
    leftovers::unique_name,
};

/// Where named namespaces live.
pub const DIRECTORY: &str = "/run/netns";

/// A network namespace, deleted on drop.
///
/// Nothing here goes through `ip netns exec`: that would mount another `/sys`
/// over the one with cgroups and bpffs.
#[derive(Debug)]
pub struct Netns {
    purpose: String,
    name: String,
    file: File,
    /// The cgroup of everything that runs here.
    cgroup: Arc<Cgroup>,
}

impl Netns {
    /// A new namespace whose loopback interface is up. What runs in it runs in
    /// `cgroup`.
    ///
    /// # Panics
    ///
    /// When it cannot be made.
    pub fn new(purpose: &str, cgroup: Arc<Cgroup>) -> Self {
        let name = unique_name(purpose);
        output_of(Command::new("ip").args(["netns", "add", &name]));
        let path = Path::new(DIRECTORY).join(&name);
        let file = File::open(&path)
            .unwrap_or_else(|error| panic!("cannot open {}: {error}", path.display()));
        let netns = Self {
            purpose: purpose.to_owned(),
            name,
            file,
            cgroup,
        };
        // An address of IPv6 counts at once, not when nobody has contradicted.
        netns.sysctl("net.ipv6.conf.all.accept_dad", "0");
        netns.sysctl("net.ipv6.conf.default.accept_dad", "0");
        netns.ip("link set lo up");
        netns
    }

    /// What it stands for: `node`, or the name of a pod.
    pub fn purpose(&self) -> &str {
        &self.purpose
    }

    /// Its name, as `ip netns` shows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its file: what `shunt enroll --netns` wants.
    pub fn path(&self) -> PathBuf {
        Path::new(DIRECTORY).join(&self.name)
    }

    /// Runs `ip` commands in it, one each line.
    ///
    /// # Panics
    ///
    /// When one of them fails.
    pub fn ip(&self, batch: &str) {
        let mut command = Command::new("ip");
        command.args(["-n", &self.name, "-batch", "-"]);
        output_with_input(&mut command, batch);
    }

    /// Sets a kernel parameter of it, such as `net.ipv4.ip_forward`.
    ///
    /// # Panics
    ///
    /// When the kernel refuses.
    pub fn sysctl(&self, name: &str, value: &str) {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        // Which namespace's parameters /proc/sys shows is decided by the
        // thread that opens the file.
        self.run(|| {
            std::fs::write(&path, value)
                .unwrap_or_else(|error| panic!("cannot set {path} to {value:?}: {error}"));
        });
    }

    /// What its TCP has counted, by the names that `nstat` gives it without `Tcp` or `TcpExt`.
    ///
    /// # Panics
    ///
    /// When the kernel does not say.
    pub fn tcp_counters(&self) -> BTreeMap<String, u64> {
        let files = [("snmp", "Tcp:"), ("netstat", "TcpExt:")];
        let counters = files.into_iter().flat_map(|(file, start)| {
            let path = Path::new("/proc/thread-self/net").join(file);
            let text = self.run(|| fs::read_to_string(path).expect("the kernel has counters"));
            let mut lines = text.lines().filter(|line| line.starts_with(start));
            let (names, values) = (lines.next().expect("names"), lines.next().expect("values"));
            let pairs = names.split(' ').zip(values.split(' '));
            pairs
                .filter_map(|(name, value)| Some((name.to_owned(), value.parse().ok()?)))
                .collect::<Vec<_>>()
        });
        counters.collect()
    }

    /// Runs `work` in this namespace, on a thread of its own, and waits for it.
    ///
    /// # Panics
    ///
    /// When `work` does.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let worker = scope.spawn(|| {
                self.enter();
                work()
            });
            worker
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Moves the calling thread, and no other, into this namespace and its
    /// cgroup, for good.
    fn enter(&self) {
        self.entrance().enter();
    }

    /// A way in for a thread that may not keep this namespace and its cgroup:
    /// the last to hold them takes them away, and cannot be in them.
    pub(crate) fn entrance(&self) -> Entrance {
        Entrance {
            netns: self
                .file
                .try_clone()
                .expect("an open file can be duplicated"),
            cgroup: self.cgroup.path().to_owned(),
        }
    }

    /// A command that will run in this namespace, with all its ids those of
    /// `owner`. It ends with the *thread* that starts it, so that nothing
    /// outlives a test that is killed.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>, owner: Owner) -> Command {
        let file = self
            .file
            .try_clone()
            .expect("an open file can be duplicated");
        let cgroup = Arc::clone(&self.cgroup);
        let prepare = move || {
            cgroup.enter_after_fork()?;
            setns(&file, CloneFlags::CLONE_NEWNET)?;
            become_owner(owner)?;
            // After the change of user, which resets it.
            die_with_parent()
        };
        let mut command = Command::new(program);
        // SAFETY: between fork and exec `prepare` makes system calls only: it
        // takes no lock and allocates nothing.
        unsafe { command.pre_exec(prepare) };
        command
    }
}

/// See [`Netns::entrance`].
pub(crate) struct Entrance {
    netns: File,
    cgroup: PathBuf,
}

impl Entrance {
    /// Moves the calling thread in, for good.
    pub(crate) fn enter(self) {
        setns(&self.netns, CloneFlags::CLONE_NEWNET)
            .unwrap_or_else(|error| panic!("cannot enter a network namespace: {error}"));
        cgroup::enter(&self.cgroup);
    }
}

/// A command of the node, outside of every pod, that ends with the thread that
/// starts it.
pub fn node_command(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    // SAFETY: one system call.
    unsafe { command.pre_exec(die_with_parent) };
    command
}

fn die_with_parent() -> io::Result<()> {
    Ok(prctl::set_pdeathsig(Signal::SIGTERM)?)
}

/// Gives the calling process every id of `owner`, and no supplementary group.
fn become_owner(owner: Owner) -> io::Result<()> {
    setgroups(&[])?;
    setgid(Gid::from_raw(owner.gid))?;
    setuid(Uid::from_raw(owner.uid))?;
    Ok(())
}

impl Drop for Netns {
    fn drop(&mut self) {
        delete(&self.path());
    }
}

/// Deletes the named namespace at `path`. What runs in it keeps it alive.
pub(crate) fn delete(path: &Path) {
    // Not through `ip`, which would panic here when it is missing. A name that
    // was never mounted is an ordinary file.
    let _ = nix::mount::umount2(path, nix::mount::MntFlags::MNT_DETACH);
    let _ = std::fs::remove_file(path);
}
