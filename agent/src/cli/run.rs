//! `shunt run`: the agent.

mod persist;
mod watches;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, Result, anyhow};
use clap::Args;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{Signal, SignalKind, signal};

use self::{persist::PersistFlags, watches::Sources};
use super::{kubernetes::KubernetesFlags, uninstall::Uninstall};
use crate::{
    bpffs,
    cni::{install::CniFlags, server::CniServer},
    control::Server,
    datapath::{Datapath, MapLimit, SpliceStatus},
    node::NodeHandle,
    observe::{LogFormat, Metrics, ObserveFlags, Readiness, health},
    preflight,
    settings::Splice,
};

/// Loads the programs, attaches them, and serves until SIGTERM or SIGINT.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  On a node:
    shunt run
  Beside another one, for the processes of one cgroup only:
    shunt --socket /run/shunt/b.sock run --cgroup /sys/fs/cgroup/b --bpffs /sys/fs/bpf/b

SHUNT_LOG says how much is logged: info (the default), debug, shunt=trace. With debug,
or shunt::bpf=debug for that alone, every decision of the programs is logged.")]
pub struct Run {
    /// The cgroup v2 directory whose sockets are redirected [default: the root
    /// of the hierarchy, found in /proc/self/mounts]
    #[arg(long, env = "SHUNT_CGROUP", value_name = "PATH")]
    cgroup: Option<PathBuf>,
    /// Where maps are pinned; a bpffs is mounted there when there is none
    #[arg(long, env = "SHUNT_BPFFS", value_name = "PATH", default_value = bpffs::DEFAULT_DIR)]
    bpffs: PathBuf,
    /// How far connections between sockets of this node bypass the loopback stack:
    /// into the sockets of the proxy only, or into those of applications as well;
    /// auto is the most that is found to be safe on this kernel
    #[arg(
        long,
        env = "SHUNT_SPLICE",
        value_enum,
        value_name = "MODE",
        default_value = "auto"
    )]
    splice: Splice,
    #[command(flatten)]
    persist: PersistFlags,
    /// Gives a map another size, for tests
    #[arg(long, hide = true, value_name = "NAME=ENTRIES")]
    map_limit: Vec<MapLimit>,
    #[command(flatten)]
    observe: ObserveFlags,
    #[command(flatten)]
    kubernetes: KubernetesFlags,
    #[command(flatten)]
    cni: CniFlags,
}

/// Why the agent ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// Somebody has asked it to, with this signal.
    Asked(&'static str),
    /// A part of it has ended; supervisors start it anew.
    Broken,
}

impl Run {
    /// How its log is written.
    pub fn log_format(&self) -> LogFormat {
        self.observe.log_format
    }

    /// Runs the agent to its end.
    ///
    /// # Errors
    ///
    /// When it cannot start; then it leaves nothing behind but what was in force
    /// before.
    pub fn run(&self, socket: &Path) -> Result<()> {
        let end = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .context("cannot start the runtime")?
            .block_on(self.serve(socket))?;
        // Now, as a hook of Kubernetes could not: it would run beside the agent.
        if self.persist.uninstall_on_stop && matches!(end, End::Asked(_)) {
            let persist = &self.persist;
            Uninstall::new(&self.bpffs, &persist.state_dir, &self.cni.dirs).run(socket)?;
        }
        Ok(())
    }

    async fn serve(&self, socket: &Path) -> Result<End> {
        let mut signals = Signals::new()?;
        preflight::required()?;
        raise_descriptor_limit()?;
        let metrics = Metrics::new();
        let readiness = Arc::new(Readiness::default());
        readiness.not_yet(health::ATTACHED, "the programs are being loaded");
        let observer = self.observe.serve(&metrics, &readiness).await?;
        let kubernetes = self.kubernetes.connection().await?;
        let plugin = match kubernetes {
            Some(_) => self.cni.installation(socket)?,
            None => None,
        };
        if plugin.is_some() {
            readiness.not_yet(health::CNI_INSTALLED, "it is being installed");
        }
        let server = Server::bind(socket)?;
        let cgroup = preflight::cgroup(self.cgroup.as_deref())?;
        let (afterwards, store) = self.persist.store(kubernetes.is_some())?;
        let mut datapath = Datapath::load(
            &cgroup,
            &self.bpffs,
            &self.map_limit,
            self.splice,
            afterwards,
            Some(Path::new("/proc/self/exe")),
        )?;
        log_splicing(datapath.splice_status());
        let sources = Sources::of(&mut datapath)?;
        let (node, thread) = NodeHandle::start(datapath, store).await?;
        let plugin = plugin.map(|plugin| tokio::spawn(plugin.keep(Arc::clone(&readiness))));
        let watches = sources.tell(&node).with(plugin);
        let pods = kubernetes.map(|connection| connection.start(node.clone()));
        let cni = pods.as_ref().map(|pods| {
            let wanted = Arc::new(pods.handle().clone());
            CniServer::new(node.clone(), wanted, Arc::clone(&metrics))
        });
        if let Some(observer) = &observer {
            observer.watch(node.downgrade());
            if let Some(pods) = &pods {
                observer.follow_pods(Arc::clone(pods.handle().state()));
            }
        }
        readiness.met(health::ATTACHED);
        announce(socket, &cgroup);
        let watched = node.clone();
        let end = tokio::select! {
            () = server.serve(node, cni) => End::Broken,
            () = watched.has_ended() => End::Broken,
            signal = signals.recv() => End::Asked(signal),
        };
        match end {
            End::Broken => tracing::error!("the node's thread has ended"),
            End::Asked(signal) => tracing::info!("{signal}: {}", afterwards.said()),
        }
        // The last handles go, and with them the thread and the programs.
        drop(watched);
        drop(observer);
        if let Some(pods) = pods {
            pods.stop().await;
        }
        watches.stop().await;
        drop(server);
        tokio::task::spawn_blocking(move || thread.join())
            .await
            .context("cannot wait for the node's thread")?
            .map_err(|_panic| anyhow!("the node's thread panicked; its log says where"))?;
        Ok(end)
    }
}

/// The signals that end the agent.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?,
        })
    }

    /// Waits for one of them, and names it.
    async fn recv(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// Every enrolled pod takes a descriptor, and the usual limit is 1024.
fn raise_descriptor_limit() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("cannot ask for RLIMIT_NOFILE")?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("cannot raise RLIMIT_NOFILE")
}

/// Says how splicing is set, and what of this kernel speaks against more.
fn log_splicing(splice: &SpliceStatus) {
    for trial in &splice.trials {
        if let Some(why) = &trial.failed {
            tracing::info!(
                needed_for = trial.needed_for.name(),
                trial = trial.name,
                why,
                "a trial of splicing failed"
            );
        }
    }
    tracing::info!(
        asked = splice.asked.name(),
        mode = splice.mode.name(),
        reason = splice.reason,
        took_ms = splice.took_ms,
        "splicing"
    );
}

/// The line that says that the agent is up: whoever started it may wait for it.
#[expect(clippy::print_stdout, reason = "this is what a starter reads")]
fn announce(socket: &Path, cgroup: &Path) {
    println!(
        "shunt {} ready: serving {}, attached to {}",
        env!("CARGO_PKG_VERSION"),
        socket.display(),
        cgroup.display()
    );
}
