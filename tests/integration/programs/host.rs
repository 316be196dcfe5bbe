//! A pod in which programs run.

use std::{
    fs,
    io::ErrorKind,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    process::Command,
};

use shunt_tests::{
    Agent, Envoy, Node, Owner, Pod, Process,
    agent::{Ran, run},
    command::copy_program,
    deadline::wait_until,
    envoy,
    leftovers::temp_dir,
    mesh::ISTIO_DEFAULTS,
};
use tempfile::TempDir;

/// Debian's, not one that is meant for another user.
pub(super) const PYTHON: &str = "/usr/bin/python3";

/// How long a client may take, in seconds: one that hangs has failed.
const PATIENCE: &str = "100";

/// A pod with a sidecar, and a directory for its application.
pub(super) struct Host {
    envoy: Envoy,
    directory: TempDir,
    pod: Pod,
}

impl Host {
    /// Its sidecar has so many workers.
    pub(super) fn start(node: &Node, name: &str, workers: usize) -> Self {
        let pod = node.pod(name);
        let directory = temp_dir(name);
        own(directory.path(), 0o755);
        Self {
            envoy: Envoy::start_with_workers(&pod, &envoy::config(&pod), workers),
            directory,
            pod,
        }
    }

    pub(super) fn enroll(&self, agent: &Agent) {
        agent.enroll(self.pod.netns(), &ISTIO_DEFAULTS);
    }

    pub(super) fn envoy(&self) -> &Envoy {
        &self.envoy
    }

    pub(super) fn pod(&self) -> &Pod {
        &self.pod
    }

    /// A file of the application.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Gives the application a file.
    pub(super) fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::write(&path, content).expect("our own directory");
        own(&path, 0o644);
    }

    /// Gives the application a copy of a program.
    pub(super) fn copy_program(&self, from: &Path, name: &str) {
        let path = self.path(name);
        copy_program(from, &path);
        own(&path, 0o755);
    }

    pub(super) fn read(&self, name: &str) -> Vec<u8> {
        let path = self.path(name);
        fs::read(&path).unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()))
    }

    /// A program of the application: in its directory, and with nothing in its
    /// environment that could send it elsewhere.
    fn command(&self, line: &[&str]) -> Command {
        let (program, arguments) = line.split_first().expect("a program");
        let mut command = self.pod.netns().command(program, Owner::APP);
        command
            .args(arguments)
            .current_dir(self.directory.path())
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LC_ALL", "C")
            .env("HOME", self.directory.path());
        command
    }

    /// Runs a program to its end.
    pub(super) fn run(&self, line: &[&str]) -> Ran {
        run(&mut self.command(&[&["timeout", PATIENCE], line].concat()))
    }

    /// The same for one that has to succeed: what it wrote.
    #[track_caller]
    pub(super) fn output(&self, line: &[&str]) -> String {
        let ran = self.run(line);
        assert!(ran.status.success(), "{line:?} failed: {ran:?}");
        ran.stdout
    }

    /// Starts a program, which need not be ready when this returns.
    pub(super) fn start_program(&self, line: &[&str]) -> Process {
        Process::spawn(line[0], &mut self.command(line))
    }

    /// Starts a server; it listens on `port` when this returns.
    #[track_caller]
    pub(super) fn serve(&self, port: u16, line: &[&str]) -> Process {
        let process = self.start_program(line);
        wait_until(&format!("{line:?} to listen on port {port}"), || {
            let listens = self.listens(port);
            assert!(
                listens || !process.has_exited(),
                "{line:?} has ended: {}",
                process.output()
            );
            listens.then_some(()).ok_or_else(|| process.output())
        });
        process
    }

    /// Whether anybody listens there, found out without a connection: some
    /// servers serve a single one.
    fn listens(&self, port: u16) -> bool {
        let address = format!(":{port:04X}");
        self.pod.netns().run(|| {
            ["tcp", "tcp6"].iter().any(|table| {
                let table = match fs::read_to_string(format!("/proc/thread-self/net/{table}")) {
                    Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
                    table => table.expect("/proc is mounted"),
                };
                table.lines().any(|line| {
                    let fields: Vec<_> = line.split_whitespace().take(4).collect();
                    matches!(fields[..], [_, local, _, "0A"] if local.ends_with(&address))
                })
            })
        })
    }
}

/// Waits until a program has ended by itself, which must have been well.
#[track_caller]
pub(super) fn ended_well(program: Process) {
    wait_until("a program to end", || {
        let ended = program.has_exited();
        ended.then_some(()).ok_or_else(|| program.output())
    });
    let output = program.output();
    let status = program.stop();
    assert!(status.success(), "{status}: {output}");
}

fn own(path: &Path, mode: u32) {
    let Owner { uid, gid } = Owner::APP;
    chown(path, Some(uid), Some(gid))
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(mode)))
        .unwrap_or_else(|error| panic!("cannot give away {}: {error}", path.display()));
}
