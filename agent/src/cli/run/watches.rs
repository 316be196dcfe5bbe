//! What the agent listens to while it runs: the programs' requests and their log, and
//! changes of the pods' networks.

use std::{
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};
use tokio::{io::unix::AsyncFd, task::JoinHandle};

use crate::{
    datapath::{Datapath, Events},
    network::{Changes, Watch},
    node::NodeHandle,
    observe::logs,
};

/// Everything that there is to listen to, before there is a node to tell.
pub(super) struct Sources {
    listeners: Requests,
    splices: Requests,
    log: Option<JoinHandle<()>>,
    networks: Watch,
}

impl Sources {
    /// Takes the programs' side from the datapath.
    ///
    /// # Errors
    ///
    /// When something of it was taken already, or the kernel refuses.
    pub(super) fn of(datapath: &mut Datapath) -> Result<Self> {
        Ok(Self {
            listeners: Requests::of(datapath.events()?)?,
            splices: Requests::of(datapath.splice_requests()?)?,
            log: programs_log(datapath)?,
            networks: Watch::open()?,
        })
    }

    /// From now on the node is told.
    pub(super) fn tell(self, node: &NodeHandle) -> Watches {
        let tasks = [
            tokio::spawn(self.listeners.answer(node.clone())),
            tokio::spawn(self.splices.splice(node.clone())),
            tokio::spawn(follow_networks(self.networks, node.clone())),
        ];
        Watches(tasks.into_iter().chain(self.log).collect())
    }
}

/// The tasks that listen; each holds on to the node.
pub(super) struct Watches(Vec<JoinHandle<()>>);

impl Watches {
    /// One more task that is to end with them.
    pub(super) fn with(mut self, task: Option<JoinHandle<()>>) -> Self {
        self.0.extend(task);
        self
    }

    /// Ends them all.
    pub(super) async fn stop(self) {
        for task in self.0 {
            task.abort();
            let _ = task.await;
        }
    }
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
                let took = node.find_listeners(pods).await.unwrap_or_default();
                // Each connection that misses a listener asks again.
                tokio::time::sleep(SCAN_PAUSE.max(took * REST)).await;
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
            tokio::time::sleep(SPLICE_PAUSE.max(took * REST)).await;
        }
    }
}

/// How long after connections were spliced the next are, at the earliest.
const SPLICE_PAUSE: Duration = Duration::from_millis(10);

/// By how much the pause after a look at the open files is longer than the look took, at
/// least: where very many are open on the node, finding sockets among them must not keep
/// the agent busy.
const REST: u32 = 30;

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
