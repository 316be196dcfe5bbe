//! A cgroup whose memory is counted.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    cgroup::{hierarchies, remove_tree},
    command::output_of,
    deadline::wait_until,
    leftovers::unique_name,
    netns::node_command,
};

/// A memory cgroup of its own, as a container has one. Removed on drop, when all in it have
/// ended.
#[derive(Debug)]
pub struct MemoryCgroup {
    path: PathBuf,
}

impl MemoryCgroup {
    /// A new one, in the hierarchy that has the memory controller.
    ///
    /// # Panics
    ///
    /// When none has it, or the kernel refuses; this needs root.
    pub fn new() -> Self {
        crate::require_root();
        let root = hierarchies().into_iter().find(|root| counts_memory(root));
        let root = root.expect("a hierarchy of cgroups has the memory controller");
        let path = root.join(unique_name("memory"));
        fs::create_dir(&path).unwrap_or_else(|e| panic!("cannot make {}: {e}", path.display()));
        Self { path }
    }

    /// The same command, by a shell that does `before` in here first. It ends the command in
    /// `exec "$@"`; `$root` is the root of the hierarchy.
    pub fn command(&self, before: &str, command: &Command) -> Command {
        let mut inside = node_command("sh");
        inside.env("root", self.root());
        inside.args(["-ec", &format!("echo 0 > \"$0\"\n{before}")]);
        inside.arg(self.path.join("cgroup.procs"));
        inside.arg(command.get_program()).args(command.get_args());
        inside
    }

    fn root(&self) -> &Path {
        self.path.parent().expect("it is below the root")
    }

    /// What it is charged for memory of the kernel's, in bytes.
    ///
    /// # Panics
    ///
    /// When the kernel does not say.
    pub fn charged(&self) -> u64 {
        let exact = fs::read_to_string(self.path.join("memory.kmem.usage_in_bytes"));
        let charged = exact.map_or_else(
            |_| {
                count_all();
                self.counted()
            },
            |bytes| bytes.trim().parse().ok(),
        );
        charged.expect("the kernel counts its memory")
    }

    /// The same in a hierarchy of version 2, as far as it is counted already.
    fn counted(&self) -> Option<u64> {
        let stat = fs::read_to_string(self.path.join("memory.stat")).ok()?;
        let kernel = stat.lines().find_map(|line| line.strip_prefix("kernel "))?;
        kernel.parse().ok()
    }
}

/// Has the kernel count what is charged to any cgroup of version 2 so far. Each processor has its
/// own count; they are added up every two seconds, or when they are asked for and much has changed
/// below the cgroup that is asked (`memcg_vmstats_needs_flush`): here below the root, by a process
/// that takes much memory.
fn count_all() {
    let much = MemoryCgroup::new();
    let mut take = Command::new("dd");
    take.args([
        "if=/dev/zero",
        "of=/dev/null",
        "bs=16M",
        "count=1",
        "status=none",
    ]);
    output_of(&mut much.command(r#"exec "$@""#, &take));
    let stat = fs::read_to_string(much.root().join("memory.stat"));
    stat.expect("the root counts what is below it");
}

impl Default for MemoryCgroup {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for MemoryCgroup {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // What is left of it the next run takes away.
            remove_tree(&self.path);
            return;
        }
        // What was killed is on its way out for a moment, and has files open still.
        wait_until("the end of all processes in a cgroup", || {
            fs::remove_dir(&self.path).map_err(|error| error.to_string())
        });
    }
}

/// Whether cgroups below this root have a memory controller. Those of version 2 are given it,
/// and keep it: another test may need it, and most machines have it so.
fn counts_memory(root: &Path) -> bool {
    let controllers = fs::read_to_string(root.join("cgroup.controllers"));
    match controllers {
        Ok(controllers) if controllers.split_whitespace().any(|one| one == "memory") => {
            fs::write(root.join("cgroup.subtree_control"), "+memory").is_ok()
        }
        Ok(_) => false,
        Err(_) => root.join("memory.usage_in_bytes").exists(),
    }
}
