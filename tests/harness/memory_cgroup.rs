//! A cgroup whose memory is counted.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    cgroup::{hierarchies, remove_tree},
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
        let root = self.path.parent().expect("it is below the root");
        let mut inside = node_command("sh");
        inside.env("root", root);
        inside.args(["-ec", &format!("echo 0 > \"$0\"\n{before}")]);
        inside.arg(self.path.join("cgroup.procs"));
        inside.arg(command.get_program()).args(command.get_args());
        inside
    }

    /// What it is charged, in bytes: memory of the kernel's, or, where the hierarchy is of
    /// version 2, all. (What that says of the kernel's alone is up to two seconds old.)
    ///
    /// # Panics
    ///
    /// When the kernel does not say.
    pub fn charged(&self) -> u64 {
        let files = ["memory.kmem.usage_in_bytes", "memory.current"];
        let read = |file| {
            fs::read_to_string(self.path.join(file))
                .ok()?
                .trim()
                .parse()
                .ok()
        };
        let found = files.into_iter().find_map(read);
        found.expect("the kernel counts its memory")
    }
}

impl Default for MemoryCgroup {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for MemoryCgroup {
    fn drop(&mut self) {
        // A process that was killed is on its way out.
        wait_until("the end of all processes in it", || {
            let members = fs::read_to_string(self.path.join("cgroup.procs"));
            match members.map_err(|error| error.to_string())? {
                none if none.is_empty() => Ok(()),
                some => Err(some),
            }
        });
        remove_tree(&self.path);
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
