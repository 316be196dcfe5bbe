//! `shunt run`: the agent.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};
use clap::Args;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::{
    io::unix::AsyncFd,
    signal::unix::{SignalKind, signal},
    task::JoinHandle,
};

use super::{kubernetes::KubernetesFlags, uninstall::Uninstall};
use crate::{
    bpffs,
    cni::{install::CniFlags, server::CniServer},
    control::Server,
    datapath::{Afterwards, Datapath, Events, MapLimit, SpliceStatus},
    network::{Changes, Watch},
    node::{DEFAULT_STATE_DIR, NodeHandle, Store},
    observe::{LogFormat, Metrics, ObserveFlags, Readiness, health, logs},
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

SHUNT_LOG says how much is logged: info (the default), debug, shunt=trace. With debug,\nor shunt::bpf=debug for that alone, every decision of the programs is logged.")]
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
        // Until it has been through more kernels and longer loads: see docs/splicing.md.
        default_value = "off"
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

/// What becomes of redirection when the agent ends.
#[derive(Args, Clone, Debug)]
pub struct PersistFlags {
    /// Leaves redirection in force when the agent ends, however it ends; the next one
    /// takes it over, and `shunt uninstall` ends it [always with --kubernetes]
    #[arg(
        long,
        env = "SHUNT_PERSISTENT",
        value_parser = clap::builder::BoolishValueParser::new()
    )]
    persistent: bool,
    /// Where enrolments are saved for the next agent, with --persistent
    #[arg(
        long,
        env = "SHUNT_STATE_DIR",
        value_name = "PATH",
        default_value = DEFAULT_STATE_DIR
    )]
    state_dir: PathBuf,
    /// Takes everything away from the node, as `shunt uninstall` does, when the agent is
    /// stopped by SIGTERM or SIGINT
    #[arg(
        long,
        env = "SHUNT_UNINSTALL_ON_STOP",
        value_parser = clap::builder::BoolishValueParser::new()
    )]
    uninstall_on_stop: bool,
}

/// Why the agent ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// Somebody has asked it to.
    Asked,
    /// A part of it has ended; supervisors start it anew.
    Broken,
}

impl PersistFlags {
    /// What becomes of everything, and where enrolments are saved.
    fn store(&self, kubernetes: bool) -> Result<(Afterwards, Option<Store>)> {
        if self.persistent || kubernetes {
            Ok((Afterwards::Stays, Some(Store::open(&self.state_dir)?)))
        } else {
            Ok((Afterwards::Nothing, None))
        }
    }
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
        if self.persist.uninstall_on_stop && end == End::Asked {
            let persist = &self.persist;
            Uninstall::new(&self.bpffs, &persist.state_dir, &self.cni.dirs).run(socket)?;
        }
        Ok(())
    }

    async fn serve(&self, socket: &Path) -> Result<End> {
        let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
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
        )?;
        log_splicing(datapath.splice_status());
        let events = datapath.events()?;
        let requests = Requests::of(events)?;
        let splice_requests = Requests::of(datapath.splice_requests()?)?;
        let log_watch = programs_log(&mut datapath)?;
        let networks = Watch::open()?;
        let (node, thread) = NodeHandle::start(datapath, store).await?;
        let listener_watch = tokio::spawn(requests.answer(node.clone()));
        let splice_watch = tokio::spawn(splice_requests.splice(node.clone()));
        let network_watch = tokio::spawn(follow_networks(networks, node.clone()));
        let pods = kubernetes.map(|connection| connection.start(node.clone()));
        let cni = pods.as_ref().map(|pods| {
            let wanted = Arc::new(pods.handle().clone());
            CniServer::new(node.clone(), wanted, Arc::clone(&metrics))
        });
        let plugin = plugin.map(|plugin| tokio::spawn(plugin.keep(Arc::clone(&readiness))));
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
            () = watched.has_ended() => {
                tracing::error!("the node's thread has ended");
                End::Broken
            }
            _ = terminate.recv() => {
                tracing::info!("SIGTERM: {}", afterwards.said());
                End::Asked
            }
            _ = interrupt.recv() => {
                tracing::info!("SIGINT: {}", afterwards.said());
                End::Asked
            }
        };
        // The last handles go, and with them the thread and the programs.
        drop(watched);
        drop(observer);
        if let Some(pods) = pods {
            pods.stop().await;
        }
        let watches = [listener_watch, splice_watch, network_watch];
        for watch in watches.into_iter().chain(log_watch).chain(plugin) {
            watch.abort();
            let _ = watch.await;
        }
        drop(server);
        tokio::task::spawn_blocking(move || thread.join())
            .await
            .context("cannot wait for the node's thread")?
            .map_err(|_panic| anyhow!("the node's thread panicked; its log says where"))?;
        Ok(end)
    }
}

/// Every enrolled pod takes a descriptor, and the usual limit is 1024.
fn raise_descriptor_limit() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("cannot ask for RLIMIT_NOFILE")?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("cannot raise RLIMIT_NOFILE")
}

/// How long after a scan the next one begins, at the earliest: somebody outside
/// who calls a pod without a proxy must not keep the agent busy.
const SCAN_PAUSE: Duration = Duration::from_millis(100);

/// A ring buffer's descriptor, to be waited for.
struct Descriptor(AsyncFd<OwnedFd>);

impl Descriptor {
    fn of(ring: &impl AsFd) -> Result<Self> {
        let descriptor = ring
            .as_fd()
            .try_clone_to_owned()
            .context("cannot duplicate the ring buffer's descriptor")?;
        // SAFETY: an OwnedFd gives the same descriptor until it is dropped.
        let descriptor = unsafe { AsyncFd::register(descriptor) }
            .map_err(|error| anyhow!("cannot wait for the programs' messages: {error}"))?;
        Ok(Self(descriptor))
    }

    /// Waits until there is something; `false` when the runtime ends.
    async fn readable(&self) -> bool {
        match self.0.readable().await {
            Ok(mut ready) => {
                ready.clear_ready();
                true
            }
            Err(_ending) => false,
        }
    }
}

/// What the programs ask of the agent.
struct Requests {
    events: Events,
    descriptor: Descriptor,
}

impl Requests {
    fn of(events: Events) -> Result<Self> {
        let descriptor = Descriptor::of(&events)?;
        Ok(Self { events, descriptor })
    }

    /// Has listeners looked for whenever a program missed them.
    async fn answer(mut self, node: NodeHandle) {
        while self.descriptor.readable().await {
            let pods = self.events.drain();
            if !pods.is_empty() {
                node.find_listeners(pods).await;
                // Each connection that misses a listener asks again.
                tokio::time::sleep(SCAN_PAUSE).await;
            }
        }
    }

    /// Has connections spliced whenever a program asks for some.
    async fn splice(mut self, node: NodeHandle) {
        while self.descriptor.readable().await {
            if self.events.drain().is_empty() {
                continue;
            }
            let took = node.splice().await.unwrap_or_else(|error| {
                tracing::warn!(error = format!("{error:#}"), "cannot splice connections");
                Duration::ZERO
            });
            tokio::time::sleep(SPLICE_PAUSE.max(took * SPLICE_REST)).await;
        }
    }
}

/// How long after connections were spliced the next are, at the earliest.
const SPLICE_PAUSE: Duration = Duration::from_millis(10);

/// By how much the pause is longer than what comes before it took, at least: where
/// very many files are open on the node, finding sockets among them must not keep
/// the agent busy.
const SPLICE_REST: u32 = 30;

/// Writes the programs' decisions into the log from now on, where they are logged at
/// all.
fn programs_log(datapath: &mut Datapath) -> Result<Option<JoinHandle<()>>> {
    if !logs::decisions_are_logged() {
        return Ok(None);
    }
    let mut log = datapath.log()?;
    let descriptor = Descriptor::of(&log)?;
    Ok(Some(tokio::spawn(async move {
        while descriptor.readable().await {
            log.flush();
        }
    })))
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
        "splicing"
    );
}

/// How long the agent waits before it listens anew to what it cannot hear.
const REOPEN_PAUSE: Duration = Duration::from_secs(1);

/// Has the pods' networks looked at whenever they change.
async fn follow_networks(mut networks: Watch, node: NodeHandle) {
    loop {
        match networks.changes().await {
            Ok(changes) => node.follow_networks(changes).await,
            Err(error) => {
                tracing::error!(
                    error = format!("{error:#}"),
                    "changes of the pods' networks were missed"
                );
                networks = reopened().await;
                node.follow_networks(Changes::missed()).await;
            }
        }
    }
}

/// A new watch, as soon as there can be one.
async fn reopened() -> Watch {
    loop {
        tokio::time::sleep(REOPEN_PAUSE).await;
        match Watch::open() {
            Ok(watch) => return watch,
            Err(error) => tracing::error!(
                error = format!("{error:#}"),
                "cannot listen to changes of the pods' networks"
            ),
        }
    }
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
