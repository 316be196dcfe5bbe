//! `shunt uninstall`: takes away what agents have left on the node.

use std::{
    fs,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use clap::Args;

use super::say;
use crate::{
    bpffs::{self, Place},
    cni::install::{self, CniDirs},
    datapath,
    netns::Netns,
    node::{DEFAULT_STATE_DIR, remove_saved, saved_namespaces},
};

/// Ends redirection that was left in force, and takes everything of shunt away from the
/// node: programs, maps, saved enrolments, the CNI plugin, the control socket. No agent
/// may run.
#[derive(Args, Clone, Debug)]
pub struct Uninstall {
    /// Where maps and links are pinned
    #[arg(long, env = "SHUNT_BPFFS", value_name = "PATH", default_value = bpffs::DEFAULT_DIR)]
    bpffs: PathBuf,
    /// Where enrolments are saved
    #[arg(
        long,
        env = "SHUNT_STATE_DIR",
        value_name = "PATH",
        default_value = DEFAULT_STATE_DIR
    )]
    state_dir: PathBuf,
    /// Where the runtime's plugins are
    #[command(flatten)]
    cni: CniDirs,
}

impl Uninstall {
    /// What an agent with these directories leaves.
    pub(super) fn new(bpffs: &Path, state_dir: &Path, cni: &CniDirs) -> Self {
        Self {
            bpffs: bpffs.to_owned(),
            state_dir: state_dir.to_owned(),
            cni: cni.clone(),
        }
    }

    /// Takes everything away.
    ///
    /// # Errors
    ///
    /// When an agent runs, or something cannot be removed; what was removed before
    /// stays so, and it can be called again.
    pub fn run(&self, socket: &Path) -> Result<()> {
        self.refuse_beside_an_agent(socket)?;
        // First: with the plugin there and nobody to answer it, mesh pods cannot start.
        install::remove(&self.cni).context("cannot remove the CNI plugin")?;
        for path in saved_namespaces(&self.state_dir) {
            // Gone, with all that was in it.
            if let Ok(netns) = Netns::open(&path) {
                datapath::remove_filters(&netns);
            }
        }
        datapath::uninstall(&self.bpffs)?;
        remove_saved(&self.state_dir)?;
        bpffs::remove_file(socket).context("cannot remove the control socket")?;
        for dir in [self.state_dir.parent(), socket.parent()] {
            // Somebody else's files may be there.
            let _ = dir.map(fs::remove_dir);
        }
        say(&"nothing of shunt is left")
    }

    fn refuse_beside_an_agent(&self, socket: &Path) -> Result<()> {
        let runs = UnixStream::connect(socket).is_ok()
            || matches!(bpffs::look(&self.bpffs), Ok(Place::Taken));
        if runs {
            bail!(
                "an agent runs (it serves {}, or keeps its maps at {}); end it first, and see \
                 that nothing starts it again: with SIGTERM, or by deleting its DaemonSet",
                socket.display(),
                self.bpffs.display()
            );
        }
        Ok(())
    }
}
