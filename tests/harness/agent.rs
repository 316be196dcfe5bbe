//! The agent: the real binary.

use std::{
    fs::{self, DirEntry},
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::Value;
use shunt::{
    control::{Client, Request},
    node::EnrolRequest,
    settings::{Field, Inputs, Origin, Settings, Written},
};
use tempfile::TempDir;

use crate::{
    Cgroup, Netns, Owner, Process, command::copy_program, deadline::DEADLINE, leftovers::temp_dir,
    netns::node_command, require_root,
};

/// The binary under test: `SHUNT_BIN`, or the one of `cargo xtask build`.
///
/// # Panics
///
/// When there is none.
pub fn binary() -> PathBuf {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release/shunt");
    let path = std::env::var_os("SHUNT_BIN").map_or(built, PathBuf::from);
    assert!(
        path.is_file(),
        "there is no agent at {}: `cargo xtask build` makes it, or SHUNT_BIN says where it is",
        path.display()
    );
    path
}

/// The same with another layout of maps, for upgrades: `SHUNT_OTHER_BIN`, or the one
/// that `cargo xtask test` builds.
///
/// # Panics
///
/// When there is none.
pub fn other_binary() -> PathBuf {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release/shunt-other");
    let path = std::env::var_os("SHUNT_OTHER_BIN").map_or(built, PathBuf::from);
    assert!(
        path.is_file(),
        "there is no agent with another layout at {}: `cargo xtask test` makes it, or \
         SHUNT_OTHER_BIN says where it is",
        path.display()
    );
    path
}

/// A copy of the binary that everybody can start: the one under test may lie where only
/// root can go. Removed on drop.
#[derive(Debug)]
pub struct EverybodysBinary {
    directory: TempDir,
}

impl EverybodysBinary {
    /// A new copy.
    ///
    /// # Panics
    ///
    /// Without root, and when the binary cannot be copied.
    #[expect(clippy::new_without_default, reason = "it copies a file")]
    pub fn new() -> Self {
        require_root();
        let directory = temp_dir("everybodys");
        let copy = directory.path().join("shunt");
        copy_program(&binary(), &copy);
        for path in [directory.path(), &copy] {
            let everybody = fs::Permissions::from_mode(0o755);
            fs::set_permissions(path, everybody).expect("our own directory");
        }
        Self { directory }
    }

    /// The binary, started by `owner`.
    pub fn command(&self, owner: Owner) -> Command {
        let mut command = Command::new(self.directory.path().join("shunt"));
        command.uid(owner.uid).gid(owner.gid).current_dir("/");
        command
    }
}

/// What one call of the command line tool gave.
#[derive(Clone, Debug)]
pub struct Ran {
    /// Its exit status.
    pub status: ExitStatus,
    /// What it wrote to standard output.
    pub stdout: String,
    /// What it wrote to standard error.
    pub stderr: String,
}

/// Runs a command to its end.
///
/// # Panics
///
/// When it cannot be started.
pub fn run(command: &mut Command) -> Ran {
    let output = command
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
    Ran {
        status: output.status,
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Where an agent has its files: a socket and a BPF file system of its own.
/// Outlives the agent, so that another can be started in the same place.
#[derive(Debug)]
pub struct Place {
    directory: TempDir,
    cgroup: PathBuf,
}

impl Place {
    /// A new place, for an agent that sees the sockets of `cgroup`.
    ///
    /// # Panics
    ///
    /// When the BPF file system cannot be mounted.
    pub fn new(cgroup: &Cgroup) -> Self {
        let place = Self {
            directory: temp_dir("agent"),
            cgroup: cgroup.path().to_owned(),
        };
        let bpffs = place.mount_point();
        std::fs::create_dir(&bpffs).expect("a new directory");
        mount(
            Some("bpf"),
            &bpffs,
            Some("bpf"),
            MsFlags::empty(),
            None::<&str>,
        )
        .unwrap_or_else(|error| panic!("cannot mount a BPF file system: {error}"));
        place
    }

    /// The control socket.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("shunt.sock")
    }

    /// Where the agent pins: a directory of a BPF file system, as on a node.
    pub fn bpffs(&self) -> PathBuf {
        self.mount_point().join("shunt")
    }

    /// Where the agent saves enrolments.
    pub fn state_dir(&self) -> PathBuf {
        self.directory.path().join("state")
    }

    /// The directory of everything that is here.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    fn mount_point(&self) -> PathBuf {
        self.directory.path().join("bpffs")
    }

    /// The command that takes away what agents have left here.
    pub fn uninstall_command(&self) -> Command {
        let mut command = Command::new(binary());
        command.arg("--socket").arg(self.socket());
        command.arg("uninstall").arg("--bpffs").arg(self.bpffs());
        command.arg("--state-dir").arg(self.state_dir());
        // Not those of the machine, where a real agent may run.
        command.arg("--cni-bin-dir").arg(self.path().join("no-bin"));
        command
            .arg("--cni-conf-dir")
            .arg(self.path().join("no-net.d"));
        command
    }

    /// The command that starts an agent here.
    pub fn run_command(&self) -> Command {
        self.run_command_of(&binary())
    }

    /// The same command; what the agent has in force stays when it ends.
    pub fn persistent_command(&self) -> Command {
        self.persistent_command_of(&binary())
    }

    fn persistent_command_of(&self, binary: &Path) -> Command {
        let mut command = self.run_command_of(binary);
        command.arg("--persistent");
        command.arg("--state-dir").arg(self.state_dir());
        command
    }

    fn run_command_of(&self, binary: &Path) -> Command {
        let mut command = node_command(binary);
        command
            .arg("run")
            .arg("--socket")
            .arg(self.socket())
            .arg("--cgroup")
            .arg(&self.cgroup)
            .arg("--bpffs")
            .arg(self.bpffs());
        command
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // The directory can only be removed when nothing is mounted in it.
        let _ = umount2(&self.mount_point(), MntFlags::MNT_DETACH);
    }
}

/// How far an agent splices: the modes of `shunt run --splice`, of which each
/// does more than the one before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Splice {
    /// Not at all.
    Off,
    /// Between proxies.
    Between,
    /// Also what applications send to proxies.
    Proxy,
    /// Also what proxies send to applications.
    All,
}

impl Splice {
    const ALL: [Self; 4] = [Self::Off, Self::Between, Self::Proxy, Self::All];

    /// What it is called.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Between => "between",
            Self::Proxy => "proxy",
            Self::All => "all",
        }
    }

    /// The mode of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.name() == name)
    }

    /// The mode that `SHUNT_TEST_SPLICE` names; `None`, without it, for the one
    /// that the agent picks.
    ///
    /// # Panics
    ///
    /// When there is no mode of that name.
    pub fn tried() -> Option<Self> {
        let name = std::env::var("SHUNT_TEST_SPLICE").ok()?;
        let mode = Self::named(&name);
        Some(mode.unwrap_or_else(|| panic!("SHUNT_TEST_SPLICE={name} is no mode of splicing")))
    }
}

/// A running agent. On drop it is told to end, and waited for.
#[derive(Debug)]
pub struct Agent {
    process: Process,
    place: Place,
}

impl Agent {
    /// Starts one for the sockets of `cgroup`; it is ready when this returns.
    ///
    /// # Panics
    ///
    /// When it does not become ready.
    pub fn start(cgroup: &Cgroup) -> Self {
        Self::start_in(Place::new(cgroup))
    }

    /// The same in a place where there may have been another.
    ///
    /// # Panics
    ///
    /// As [`start`](Self::start).
    pub fn start_in(place: Place) -> Self {
        Self::start_with(place, &[])
    }

    /// The same for the sockets of `cgroup`, and it splices: so far, or as far as
    /// it finds this kernel safe.
    ///
    /// # Panics
    ///
    /// As [`start`](Self::start).
    pub fn start_splicing(cgroup: &Cgroup, mode: Option<Splice>) -> Self {
        let mode = mode.map_or("auto", Splice::name);
        Self::start_with(Place::new(cgroup), &["--splice", mode])
    }

    /// The same with these arguments of `shunt run`, such as `--splice proxy`.
    ///
    /// # Panics
    ///
    /// As [`start`](Self::start).
    pub fn start_with(place: Place, arguments: &[&str]) -> Self {
        let mut command = place.run_command();
        command.args(arguments);
        Self::start_by(place, &mut command)
    }

    /// The same of another binary; what it has in force stays when it ends.
    ///
    /// # Panics
    ///
    /// As [`start`](Self::start).
    pub fn start_persistent(place: Place, binary: &Path, arguments: &[&str]) -> Self {
        let mut command = place.persistent_command_of(binary);
        command.args(arguments);
        Self::start_by(place, &mut command)
    }

    /// The same as [`start_with`](Self::start_with), with so much in its log (`SHUNT_LOG`).
    ///
    /// # Panics
    ///
    /// As [`start`](Self::start).
    pub fn start_logging(place: Place, log: &str, arguments: &[&str]) -> Self {
        let mut command = place.run_command();
        command.args(arguments).env("SHUNT_LOG", log);
        Self::start_by(place, &mut command)
    }

    /// The same by a command of one's own, which [`Place::run_command`] is a part of.
    ///
    /// # Panics
    ///
    /// As [`start`](Self::start).
    pub fn start_by(place: Place, command: &mut Command) -> Self {
        let process = Process::spawn("shunt run", command);
        process.wait_for_line(" ready: serving", DEADLINE);
        Self { process, place }
    }

    /// Ends it with SIGTERM, and gives its place back.
    ///
    /// # Panics
    ///
    /// When it does not end, or not well.
    pub fn stop(self) -> Place {
        let output = self.process.output();
        let status = self.process.stop();
        assert!(status.success(), "the agent ended with {status}:\n{output}");
        self.place
    }

    /// Kills it without a warning, and gives its place back.
    pub fn kill(self) -> Place {
        self.process.kill();
        self.place
    }

    /// Where it has its files.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// How often its thread of this name has waited for something so far; `None` when it has no
    /// such thread.
    ///
    /// # Panics
    ///
    /// When it has ended.
    pub fn waits_of(&self, thread: &str) -> Option<u64> {
        let threads = format!("/proc/{}/task", self.process.pid());
        let threads = fs::read_dir(threads).expect("the agent runs").flatten();
        let read = |entry: &DirEntry, file| fs::read_to_string(entry.path().join(file)).ok();
        let mut named =
            threads.filter(|entry| read(entry, "comm").is_some_and(|name| name.trim() == thread));
        let status = read(&named.next()?, "status")?;
        let mut lines = status.lines();
        let waits = lines.find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?;
        waits.trim().parse().ok()
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        self.process.output()
    }

    /// Its command line tool, to be given a subcommand.
    pub fn cli(&self) -> Command {
        let mut command = Command::new(binary());
        command.arg("--socket").arg(self.place.socket());
        command
    }

    /// The command that enrols `netns` with the flags of `istio-iptables`.
    pub fn enroll_command(&self, netns: &Path, flags: &[&str]) -> Command {
        let mut command = self.cli();
        command.arg("enroll").arg("--netns").arg(netns).args(flags);
        command
    }

    /// Enrols `netns`, or replaces its settings; in force when this returns.
    ///
    /// # Panics
    ///
    /// When the agent refuses.
    #[track_caller]
    pub fn enroll(&self, netns: &Netns, flags: &[&str]) {
        self.must(&mut self.enroll_command(&netns.path(), flags));
    }

    /// The same with settings that are too long for a command line: the kernel
    /// takes no argument above 128 KiB.
    ///
    /// # Panics
    ///
    /// When a setting means nothing, or the agent refuses.
    pub fn enroll_written<const N: usize>(&self, netns: &Netns, written: [(Field, String); N]) {
        let inputs = Inputs::from_iter(written.map(|(field, text)| Written {
            field,
            origin: Origin::Flag,
            text,
        }));
        let request = Request::Enrol(Box::new(EnrolRequest {
            netns: netns.path(),
            resolvers: Vec::new(),
            settings: Settings::parse(&inputs).expect("settings that mean something"),
            pod: None,
        }));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .expect("a runtime");
        let reply = runtime.block_on(async {
            let mut client = Client::connect(&self.place.socket()).await?;
            client.ask(&request).await
        });
        reply.unwrap_or_else(|error| panic!("the agent refused: {error:#}\n{}", self.log()));
    }

    /// Ends the enrolment of `netns`.
    ///
    /// # Panics
    ///
    /// When the agent refuses.
    #[track_caller]
    pub fn unenroll(&self, netns: &Netns) {
        self.must(self.cli().arg("unenroll").arg("--netns").arg(netns.path()));
    }

    /// How many connections of all pods have met an error, by its name in
    /// `shunt status`.
    ///
    /// # Panics
    ///
    /// As [`status`](Self::status).
    #[track_caller]
    pub fn errors(&self, name: &str) -> u64 {
        let status = self.status();
        let pods = status["pods"].as_array().expect("status lists pods");
        let counts = pods.iter().map(|pod| &pod["counters"]["errors"][name]);
        counts.filter_map(Value::as_u64).sum()
    }

    /// How far it splices: what it was told, or what it has settled for.
    ///
    /// # Panics
    ///
    /// As [`status`](Self::status), or when it names a mode that is none.
    #[track_caller]
    pub fn splices(&self) -> Splice {
        let status = self.status();
        let mode = status["splice"]["mode"].as_str().unwrap_or("off");
        Splice::named(mode).unwrap_or_else(|| panic!("{mode:?} is no mode of splicing"))
    }

    /// How many bytes the sockets of a pod have given to their peers directly.
    ///
    /// # Panics
    ///
    /// As [`status`](Self::status), or when the pod is not enrolled.
    #[track_caller]
    pub fn spliced_bytes(&self, netns: &Netns) -> u64 {
        let status = self.status();
        let path = netns.path();
        let pods = status["pods"].as_array().expect("status lists pods");
        let pod = pods
            .iter()
            .find(|pod| pod["netns"].as_str() == path.to_str())
            .unwrap_or_else(|| panic!("{} is not enrolled: {status}", path.display()));
        let bytes = &pod["counters"]["splice"]["bytes"];
        bytes.as_u64().unwrap_or(0)
    }

    /// What `shunt status --output json` says.
    ///
    /// # Panics
    ///
    /// When it fails or says something else than JSON.
    #[track_caller]
    pub fn status(&self) -> Value {
        let json = self.must(self.cli().args(["status", "--output", "json"]));
        serde_json::from_str(&json).unwrap_or_else(|e| panic!("status is no JSON: {e}\n{json}"))
    }

    #[track_caller]
    fn must(&self, command: &mut Command) -> String {
        let ran = run(command);
        assert!(
            ran.status.success(),
            "{command:?} failed ({}): {}\n--- the agent\n{}",
            ran.status,
            ran.stderr,
            self.log()
        );
        ran.stdout
    }
}
