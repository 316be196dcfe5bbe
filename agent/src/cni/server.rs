//! The agent's answers to the CNI plugin.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};
use futures_util::future::BoxFuture;
use shunt_abi::NetnsCookie;

use super::protocol::{Attachment, CniRequest, PodNetwork};
use crate::{
    control::Reply,
    netns::Netns,
    node::{EnrolRequest, NodeHandle},
    observe::{CniAdd, Metrics},
    pods::{PodRef, PodsHandle, Wanted},
};

/// How long it may take to tell whether a pod is to be redirected. The plugin waits longer
/// than that, and the runtime longer than the plugin (kubelet 4 minutes).
const LONGEST_LOOK: Duration = Duration::from_secs(20);

/// Who knows the pods of the node.
pub trait WantedPods: Send + Sync {
    /// How a pod is to be redirected; `None` when it is not to be.
    ///
    /// # Errors
    ///
    /// When that cannot be told now.
    fn wanted<'a>(&'a self, pod: &'a PodRef) -> BoxFuture<'a, Result<Option<Wanted>>>;
}

impl WantedPods for PodsHandle {
    fn wanted<'a>(&'a self, pod: &'a PodRef) -> BoxFuture<'a, Result<Option<Wanted>>> {
        Box::pin(self.wanted(pod))
    }
}

/// Why a pod is not enrolled.
enum NotAdded {
    /// Whether it is to be cannot be told now.
    Undecided(String),
    /// It is to be, and that failed.
    Failed(anyhow::Error),
}

impl From<anyhow::Error> for NotAdded {
    fn from(why: anyhow::Error) -> Self {
        Self::Failed(why)
    }
}

/// Answers the CNI plugin.
#[derive(Clone)]
pub struct CniServer {
    node: NodeHandle,
    pods: Arc<dyn WantedPods>,
    metrics: Arc<Metrics>,
    added: Arc<Mutex<Added>>,
}

/// What has been enrolled for whom. It is not kept across a restart of the agent; of what
/// was enrolled before that, the end is noticed when the namespace goes.
type Added = BTreeMap<Attachment, Place>;

/// Where a namespace was when it was enrolled, and which it is.
#[derive(Clone, Debug)]
struct Place {
    netns: PathBuf,
    cookie: NetnsCookie,
}

impl CniServer {
    /// A server that asks `pods` what to do, and has `node` do it.
    pub fn new(node: NodeHandle, pods: Arc<dyn WantedPods>, metrics: Arc<Metrics>) -> Self {
        Self {
            node,
            pods,
            metrics,
            added: Arc::default(),
        }
    }

    /// Answers one call of the plugin.
    ///
    /// # Errors
    ///
    /// When a pod is to be redirected and is not.
    pub(crate) async fn answer(&self, request: CniRequest) -> Result<Reply> {
        match request {
            CniRequest::Add(network) => self.add(network).await,
            CniRequest::Check(network) => self.check(&network).await,
            CniRequest::Del { attachment, netns } => {
                self.delete(&attachment, netns).await;
                Ok(Reply::Done)
            }
            CniRequest::Gc { network, valid } => {
                self.collect(&network, &valid).await;
                Ok(Reply::Done)
            }
            CniRequest::Status => Ok(Reply::Done),
        }
    }

    async fn add(&self, network: PodNetwork) -> Result<Reply> {
        let start = Instant::now();
        let (outcome, reply) = match self.enrol(network).await {
            Ok(None) => (CniAdd::NotWanted, Ok(Reply::Done)),
            Ok(Some(pod)) => {
                let took_ms = start.elapsed().as_millis();
                tracing::info!(%pod, took_ms, "redirected before it starts");
                (CniAdd::Enrolled, Ok(Reply::Done))
            }
            Err(NotAdded::Undecided(why)) => (CniAdd::Failed, Ok(Reply::Undecided(why))),
            Err(NotAdded::Failed(why)) => (CniAdd::Failed, Err(why)),
        };
        self.metrics.cni_add(start.elapsed(), outcome);
        reply
    }

    /// Enrols the pod, if it is one to be redirected.
    async fn enrol(&self, network: PodNetwork) -> Result<Option<PodRef>, NotAdded> {
        let pod = &network.pod;
        let wanted = match self.wanted(pod).await {
            Ok(Some(wanted)) => wanted,
            Ok(None) => return Ok(None),
            Err(why) => return Err(NotAdded::Undecided(format!("{why:#}"))),
        };
        let place = place_of(&network.netns)?;
        let request = EnrolRequest {
            netns: place.netns.clone(),
            resolvers: wanted.resolvers,
            settings: wanted.settings,
            pod: Some(wanted.pod),
        };
        self.node.enrol(request).await?;
        self.added().insert(network.attachment, place);
        Ok(Some(network.pod))
    }

    async fn check(&self, network: &PodNetwork) -> Result<Reply> {
        let wanted = match self.wanted(&network.pod).await {
            Ok(Some(wanted)) => wanted,
            Ok(None) => return Ok(Reply::Done),
            Err(why) => return Ok(Reply::Undecided(format!("{why:#}"))),
        };
        let place = place_of(&network.netns)?;
        let status = self.node.status().await?;
        let enrolled = status.pods.iter().find(|pod| pod.cookie == place.cookie);
        let shown = network.netns.display();
        let Some(enrolled) = enrolled else {
            bail!("{shown} is not redirected, and its pod is of a mesh; delete the pod");
        };
        if enrolled.settings != wanted.settings {
            bail!("{shown} is redirected by other settings than those of its pod");
        }
        Ok(Reply::Done)
    }

    /// Ends the redirection of a container, as far as there is any.
    async fn delete(&self, attachment: &Attachment, netns: Option<PathBuf>) {
        let added = self.added().remove(attachment);
        match (added, netns) {
            (Some(place), _) => self.end(&place).await,
            // Enrolled by another way, or before the agent was started anew.
            (None, Some(netns)) => match place_of(&netns) {
                Ok(place) => self.unenrol(place.netns).await,
                Err(_gone) => {}
            },
            (None, None) => {}
        }
    }

    /// Ends the redirection of what a network has no more.
    async fn collect(&self, network: &str, valid: &[Attachment]) {
        let is_left_over =
            |attachment: &Attachment| attachment.network == network && !valid.contains(attachment);
        let left_over: Vec<Attachment> = {
            let added = self.added();
            let found = added.keys().filter(|attachment| is_left_over(attachment));
            found.cloned().collect()
        };
        for attachment in left_over {
            self.delete(&attachment, None).await;
        }
    }

    /// Unenrols a namespace, unless another is in its place by now: then it is gone.
    async fn end(&self, place: &Place) {
        let now = Netns::open(&place.netns).map(|netns| netns.cookie());
        if now.is_err() || now.is_ok_and(|cookie| cookie == place.cookie) {
            self.unenrol(place.netns.clone()).await;
        }
    }

    async fn unenrol(&self, netns: PathBuf) {
        if let Err(error) = self.node.unenrol(netns).await {
            // Most pods are of no mesh.
            tracing::debug!("nothing to end: {error:#}");
        }
    }

    async fn wanted(&self, pod: &PodRef) -> Result<Option<Wanted>> {
        tokio::time::timeout(LONGEST_LOOK, self.pods.wanted(pod))
            .await
            .map_err(|_elapsed| anyhow!("the API server has not answered in {LONGEST_LOOK:?}"))?
    }

    fn added(&self) -> MutexGuard<'_, Added> {
        self.added.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Finds the namespace which the node's own processes find at `path`.
fn place_of(path: &Path) -> Result<Place> {
    let mut failed = None;
    for candidate in candidates(path) {
        match Netns::open(&candidate) {
            Ok(netns) => {
                return Ok(Place {
                    netns: candidate,
                    cookie: netns.cookie(),
                });
            }
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    let error = failed.unwrap_or_else(|| anyhow!("there is no way to {}", path.display()));
    Err(error).context(
        "the pod's network namespace cannot be opened; in a container, the agent needs the \
         node's /run/netns, mounted with mountPropagation HostToContainer, or hostPID",
    )
}

/// Where a path of the node may lead to the same in the agent's container: at the same
/// place, or through the node's first process. `/var/run` is a link to `/run` on nodes, and
/// below /proc/1/root an absolute link leads out again.
fn candidates(path: &Path) -> Vec<PathBuf> {
    let mut here = vec![path.to_owned()];
    if let Ok(rest) = path.strip_prefix("/var/run") {
        here.push(Path::new("/run").join(rest));
    }
    let beyond = here.iter().filter_map(|path| {
        let rest = path.strip_prefix("/").ok()?;
        Some(Path::new("/proc/1/root").join(rest))
    });
    let beyond: Vec<PathBuf> = beyond.collect();
    here.extend(beyond);
    here
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_looked_for_where_the_node_has_it() {
        let text = |path: &str| {
            let found = candidates(Path::new(path));
            let shown = found.iter().map(|path| path.display().to_string());
            shown.collect::<Vec<_>>()
        };
        assert_eq!(
            text("/var/run/netns/cni-1"),
            [
                "/var/run/netns/cni-1",
                "/run/netns/cni-1",
                "/proc/1/root/var/run/netns/cni-1",
                "/proc/1/root/run/netns/cni-1"
            ]
        );
        assert_eq!(
            text("/proc/7/ns/net"),
            ["/proc/7/ns/net", "/proc/1/root/proc/7/ns/net"]
        );
    }

    #[test]
    fn a_namespace_that_is_nowhere_is_reported_with_a_remedy() {
        let error = place_of(Path::new("/run/netns/shunt-none")).expect_err("there is none");
        let said = format!("{error:#}");
        assert!(
            said.contains("HostToContainer") && said.contains("/run/netns/shunt-none"),
            "{said}"
        );
    }
}
