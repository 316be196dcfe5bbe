//! A machine of its own for a node: every namespace but the user namespace, and
//! cgroup hierarchies that begin at a cgroup of its own.
//!
//! ```text
//! outside     the test as it was started; waits, and takes cgroups and files away
//!  └ first    process 1 of the new process namespace: mounts, reaps
//!     └ node  everything else: the cluster, the scenarios
//! ```
//!
//! When `first` ends, however it ends, the kernel kills every process of the node,
//! and with them go its mounts, its network namespaces, its BPF file system and all
//! that is pinned there. The standard paths (`/var/lib/kubelet`, `/etc/cni/net.d`,
//! `/opt/cni/bin`, `/run`) are the node's own, so that nothing has to be told where
//! they are.

use std::{
    fs, io,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, ExitStatus},
    thread,
    time::Duration,
};

use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    sys::{
        prctl,
        signal::{Signal, kill},
        wait::{WaitStatus, wait},
    },
    unistd::Pid,
};
use shunt_tests::{
    deadline::wait_until,
    interrupt::Interrupt,
    leftovers::{temp_dir, unique_name},
};

/// The first argument of process 1, before the directory for files.
const FIRST: &str = "--first";
/// The first argument of the process that works on the node.
const NODE: &str = "--node";

/// The name of the node, and of the machine that it believes to be.
pub(crate) const HOSTNAME: &str = "node";

/// Where the cluster keeps what is no Kubernetes component's own.
pub(crate) const FILES: &str = "/run/cluster";

/// Kernel parameters that kubelet sets and that are the whole machine's: the node
/// gets files in their places, which take what is written and change nothing.
const GLOBAL_PARAMETERS: [&str; 6] = [
    "kernel/keys/root_maxbytes",
    "kernel/keys/root_maxkeys",
    "kernel/panic",
    "kernel/panic_on_oops",
    "vm/overcommit_memory",
    "vm/panic_on_oom",
];

/// Directories of the machine that the node may write to without the machine's
/// noticing.
const COPIED_ON_WRITE: [&str; 2] = ["/etc", "/var"];

/// What containers are kept in: an overlay cannot lie on an overlay.
const ON_DISK: [&str; 2] = ["/var/lib/containerd", "/var/lib/kubelet"];

/// Runs `work` on a node of its own, with the arguments of this process, and gives
/// back its exit code. `work` is called in another process than this.
pub(crate) fn on_a_node(work: impl FnOnce(&[String]) -> ExitCode) -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.split_first() {
        Some((role, rest)) if role == FIRST => first(rest),
        Some((role, rest)) if role == NODE => work(rest),
        Some(_) | None => outside(&arguments),
    }
}

fn outside(arguments: &[String]) -> ExitCode {
    shunt_tests::require_root();
    let interrupt = Interrupt::watch();
    let files = temp_dir("cluster");
    let cgroups = Cgroups::new();
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "--pid", "--net", "--cgroup", "--uts", "--ipc"])
        .args(["--fork", "--kill-child"])
        .arg(this_program())
        .arg(FIRST)
        .arg(files.path())
        .args(arguments);
    cgroups.enter_with(&mut command);
    // SAFETY: one system call. It does not listen to SIGTERM.
    unsafe { command.pre_exec(|| Ok(prctl::set_pdeathsig(Signal::SIGKILL)?)) };
    let status = wait_for(command.spawn().expect("util-linux is there"), &interrupt);
    drop(cgroups);
    match status.code() {
        Some(0) => ExitCode::SUCCESS,
        Some(_) | None => ExitCode::FAILURE,
    }
}

/// Waits for the node's end, or ends it when somebody wants that.
fn wait_for(mut node: Child, interrupt: &Interrupt) -> ExitStatus {
    const PAUSE: Duration = Duration::from_millis(50);
    loop {
        if let Some(status) = node.try_wait().expect("a child can be waited for") {
            return status;
        }
        if interrupt.is_wanted() {
            let id = i32::try_from(node.id()).expect("process ids are small");
            // Its child is process 1, and dies with it.
            let _ = kill(Pid::from_raw(id), Signal::SIGKILL);
        }
        thread::sleep(PAUSE);
    }
}

/// A cgroup for the node in every hierarchy of this machine.
struct Cgroups(Vec<PathBuf>);

impl Cgroups {
    fn new() -> Self {
        let name = unique_name("cluster");
        let cgroups = Self(
            hierarchies()
                .into_iter()
                .map(|hierarchy| hierarchy.mount_point.join(&name))
                .collect(),
        );
        for cgroup in &cgroups.0 {
            match fs::create_dir(cgroup) {
                // One hierarchy can be mounted in two places.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                made => made.unwrap_or_else(|e| panic!("cannot make {}: {e}", cgroup.display())),
            }
            inherit_cpuset(cgroup);
        }
        cgroups
    }

    /// The command will run in them.
    fn enter_with(&self, command: &mut Command) {
        let processes: Vec<_> = self
            .0
            .iter()
            .map(|cgroup| {
                fs::OpenOptions::new()
                    .write(true)
                    .open(cgroup.join("cgroup.procs"))
                    .expect("a cgroup has a file of its processes")
            })
            .collect();
        let enter = move || {
            for file in &processes {
                nix::unistd::write(file, b"0")?;
            }
            Ok(())
        };
        // SAFETY: between fork and exec it makes system calls only: it takes no
        // lock and allocates nothing.
        unsafe { command.pre_exec(enter) };
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        if thread::panicking() {
            return;
        }
        for cgroup in &self.0 {
            // Processes that were killed may still be on their way out.
            wait_until("the node's cgroups to be empty", || {
                shunt_tests::cgroup::remove_tree(cgroup);
                if cgroup.exists() {
                    Err(format!("{} is still there", cgroup.display()))
                } else {
                    Ok(())
                }
            });
        }
    }
}

/// A cgroup of the controller `cpuset` takes no process before it is told where
/// that may run.
fn inherit_cpuset(cgroup: &Path) {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let own = cgroup.join(file);
        let parent = cgroup.parent().map(|parent| parent.join(file));
        if let Some(parent) = parent.filter(|file| file.exists())
            && own.exists()
        {
            fs::copy(&parent, &own)
                .map(drop)
                .or_else(|_mode| fs::write(&own, fs::read(&parent)?))
                .unwrap_or_else(|error| panic!("cannot set {}: {error}", own.display()));
        }
    }
}

/// A mounted hierarchy of cgroups.
struct Hierarchy {
    mount_point: PathBuf,
    /// `cgroup` or `cgroup2`.
    kind: String,
    /// Its controllers, in the words of mount(8).
    controllers: String,
}

fn hierarchies() -> Vec<Hierarchy> {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("/proc is mounted");
    mounts.lines().filter_map(hierarchy).collect()
}

fn hierarchy(line: &str) -> Option<Hierarchy> {
    /// Options of every mount, which are no controllers.
    const OTHERS: [&str; 10] = [
        "rw",
        "ro",
        "relatime",
        "nosuid",
        "nodev",
        "noexec",
        "nsdelegate",
        "memory_recursiveprot",
        "clone_children",
        "xattr",
    ];
    let fields: Vec<_> = line.split(' ').collect();
    let &[_, mount_point, kind, options, ..] = fields.as_slice() else {
        return None;
    };
    if !kind.starts_with("cgroup") {
        return None;
    }
    let controllers = options
        .split(',')
        .filter(|option| !OTHERS.contains(option) && !option.starts_with("release_agent"));
    Some(Hierarchy {
        mount_point: mount_point.into(),
        kind: kind.to_owned(),
        controllers: controllers.collect::<Vec<_>>().join(","),
    })
}

/// Process 1 of the node.
fn first(arguments: &[String]) -> ExitCode {
    let (files, arguments) = arguments.split_first().expect("`outside` names it");
    furnish(Path::new(files));
    #[expect(
        clippy::zombie_processes,
        reason = "the loop below waits for every child"
    )]
    let node = Command::new(this_program())
        .arg(NODE)
        .args(arguments)
        .spawn()
        .expect("this program could be started before");
    let node = Pid::from_raw(i32::try_from(node.id()).expect("process ids are small"));
    loop {
        // Also those who lost their parents.
        match wait() {
            Ok(WaitStatus::Exited(pid, 0)) if pid == node => return ExitCode::SUCCESS,
            Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, ..)) if pid == node => {
                return ExitCode::FAILURE;
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => panic!("process 1 has no child: {error}"),
        }
    }
}

/// Mounts what a node has, with its state below `files`.
fn furnish(files: &Path) {
    let memory = make(&files.join("memory"));
    let disk = make(&files.join("disk"));
    mounts("proc", "proc", Path::new("/proc"), "");
    // Read before they are hidden.
    let hierarchies = hierarchies();
    mounts("tmpfs", "tmpfs", &memory, "mode=755");
    for (number, directory) in COPIED_ON_WRITE.iter().enumerate() {
        let [upper, work] =
            ["upper", "work"].map(|part| make(&memory.join(format!("{part}{number}"))));
        let options = format!(
            "lowerdir={directory},upperdir={},workdir={}",
            upper.display(),
            work.display()
        );
        mounts("overlay", "overlay", Path::new(directory), &options);
    }
    for directory in ["/opt", "/run"] {
        mounts("tmpfs", "tmpfs", Path::new(directory), "mode=755");
    }
    for directory in ON_DISK {
        let name = directory.rsplit('/').next().expect("it has a name");
        bind(&make(&disk.join(name)), &make(Path::new(directory)));
    }
    make(Path::new(FILES));
    mount_cgroups(&hierarchies);
    mounts("bpf", "bpf", Path::new("/sys/fs/bpf"), "");
    for parameter in GLOBAL_PARAMETERS {
        stand_in(parameter, &memory);
    }
    // Bidirectional mounts of pods need it, and it is for mounts made from now on.
    share_mounts();
    fs::write("/proc/sys/kernel/hostname", HOSTNAME).expect("the host name is the node's own");
}

/// The hierarchies once more, of which the node sees its own part, in an own
/// `/sys`, which shows the interfaces of the node.
fn mount_cgroups(hierarchies: &[Hierarchy]) {
    mounts("sysfs", "sysfs", Path::new("/sys"), "");
    let root = Path::new("/sys/fs/cgroup");
    if !hierarchies.iter().any(|h| h.mount_point == root) {
        mounts("tmpfs", "tmpfs", root, "mode=755");
    }
    for hierarchy in hierarchies {
        make(&hierarchy.mount_point);
        mounts(
            &hierarchy.kind,
            &hierarchy.kind,
            &hierarchy.mount_point,
            &hierarchy.controllers,
        );
    }
}

/// Puts a file with the same content over a kernel parameter.
fn stand_in(parameter: &str, memory: &Path) {
    let real = Path::new("/proc/sys").join(parameter);
    let file = memory.join(parameter.replace('/', "-"));
    let value = fs::read(&real).unwrap_or_else(|e| panic!("cannot read {}: {e}", real.display()));
    fs::write(&file, value).expect("a new file");
    bind(&file, &real);
}

fn share_mounts() {
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_SHARED,
        None::<&str>,
    )
    .expect("a mount namespace of our own");
}

fn mounts(source: &str, kind: &str, target: &Path, options: &str) {
    mount(
        Some(source),
        target,
        Some(kind),
        MsFlags::empty(),
        Some(options),
    )
    .unwrap_or_else(|error| {
        panic!(
            "cannot mount {kind} ({options}) at {}: {error}",
            target.display()
        )
    });
}

fn bind(source: &Path, target: &Path) {
    mount(
        Some(source),
        target,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .unwrap_or_else(|error| panic!("cannot mount over {}: {error}", target.display()));
}

fn make(directory: &Path) -> PathBuf {
    fs::create_dir_all(directory)
        .unwrap_or_else(|error| panic!("cannot make {}: {error}", directory.display()));
    directory.to_owned()
}

fn this_program() -> PathBuf {
    std::env::current_exe().expect("/proc is mounted")
}
