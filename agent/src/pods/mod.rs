//! The pods of this node that a mesh has given a sidecar.
//!
//! ```text
//! API ─ watch ─┐                       ┌─ wanted() ← CNI plugin
//!              ├─ Index: select, desired ┤
//! GET of a pod ┘   (one task owns it)  └─ reconcile ─ NodeHandle
//!                                           ↑
//!                                  containers: /proc
//! ```
//!
//! The agent keeps redirecting while the API is away, when it starts and later: what
//! is enrolled stays as it is, and only what is new has to wait.

mod desired;
mod dns;
mod index;
mod pod;
mod select;
mod state;
mod task;
mod watch;

use std::{collections::BTreeSet, net::IpAddr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail};
use k8s_openapi::api::core::v1 as api;
use kube::Api;
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

pub use self::{
    desired::desired,
    index::{Action, Decision, Event, Index, Known},
    pod::{Container, Dns, DnsPolicy, Pod},
    select::{NotRedirected, Sidecar, select},
    state::{PodErrors, PodsState},
};
pub(crate) use self::{dns::Resolvers, task::View};
use crate::{node::NodeHandle, observe::events::PodEvents, reconcile, settings::Settings};

/// Which pod it is: its place in the API and its incarnation.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PodRef {
    /// Its Kubernetes namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid: a pod that is rebuilt under the same name has another.
    pub uid: String,
}

impl std::fmt::Display for PodRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A pod that is to be redirected, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Which pod.
    pub pod: PodRef,
    /// Its settings.
    pub settings: Settings,
    /// The nameservers that its resolv.conf will have, as far as can be told before
    /// kubelet writes it.
    pub resolvers: Vec<IpAddr>,
}

/// What it takes to follow the pods of a node.
#[derive(Clone, Debug)]
pub struct Config {
    /// The node's name in the API.
    pub node_name: String,
    /// The namespaces whose pods are left alone.
    pub excluded_namespaces: BTreeSet<String>,
    /// Where the processes of the node are seen, such as `/proc`.
    pub proc: PathBuf,
}

/// How long whoever waits for an answer from the API waits, at most: kubelet is
/// waiting behind it.
const API_DEADLINE: Duration = Duration::from_secs(5);

/// The pods of the node, followed for as long as this is kept.
pub struct Pods {
    handle: PodsHandle,
    tasks: JoinSet<()>,
}

/// Where the API is, and whose pods are asked for.
pub struct Connection {
    config: Config,
    client: kube::Client,
}

impl Connection {
    /// Finds out where the API is: by the service account of this pod, or else by the
    /// kubeconfig. It need not be there yet.
    ///
    /// # Errors
    ///
    /// When there is neither.
    pub async fn infer(config: Config) -> Result<Self> {
        let client = client().await?;
        Ok(Self { config, client })
    }

    /// Begins to follow the pods, and to redirect those that are to be.
    pub fn start(self, node: NodeHandle) -> Pods {
        let Self { config, client } = self;
        let state = Arc::new(PodsState::default());
        let resolvers = Resolvers::new(&config.proc);
        let mut tasks = JoinSet::new();
        let events = PodEvents::start(
            client.clone(),
            config.node_name.clone(),
            Arc::clone(&state),
            &mut tasks,
        );
        let index = task::start(
            Index::new(config.excluded_namespaces),
            Arc::clone(&state),
            events.clone(),
            &mut tasks,
        );
        let all = Api::all(client.clone());
        tasks.spawn(watch::follow(
            all,
            config.node_name,
            index.clone(),
            Arc::clone(&state),
        ));
        let handle = PodsHandle {
            client,
            index,
            resolvers,
            state,
        };
        tasks.spawn(reconcile::run(handle.clone(), node, config.proc, events));
        Pods { handle, tasks }
    }
}

impl Pods {
    /// The way to what is known of them.
    pub fn handle(&self) -> &PodsHandle {
        &self.handle
    }

    /// Stops to follow them; what is enrolled stays so.
    pub async fn stop(mut self) {
        self.tasks.shutdown().await;
    }
}

async fn client() -> Result<kube::Client> {
    let mut config = kube::Config::infer().await.context(
        "cannot tell where the Kubernetes API is; run shunt in a pod with a service account, \
         or name a kubeconfig in KUBECONFIG",
    )?;
    // By default half a minute, for which a server that starts may leave it waiting.
    config.connect_timeout = Some(API_DEADLINE);
    kube::Client::try_from(config).context(
        "cannot use what is said of the Kubernetes API; look at the service account's files \
         or at the kubeconfig",
    )
}

/// The way to what is known of the node's pods.
#[derive(Clone)]
pub struct PodsHandle {
    client: kube::Client,
    index: task::IndexHandle,
    resolvers: Resolvers,
    state: Arc<PodsState>,
}

impl PodsHandle {
    /// How the pod is to be redirected; `None` when it is not to be. A pod that the
    /// watch has not told of yet is asked for.
    ///
    /// # Errors
    ///
    /// When it cannot be told now, because the API does not answer or does not have
    /// the pod; or when the pod asks for something that cannot be understood.
    pub async fn wanted(&self, pod: &PodRef) -> Result<Option<Wanted>> {
        let known = match self.index.known(pod).await? {
            Some(known) => known,
            None => self.fetched(pod).await?,
        };
        match known.decision {
            Decision::Leave(why) => {
                tracing::debug!(pod = %pod, "not redirected: {why}");
                Ok(None)
            }
            Decision::Refuse(error) => Err(anyhow::Error::new(*error))
                .with_context(|| format!("pod {pod} cannot be redirected")),
            Decision::Redirect(settings) => Ok(Some(Wanted {
                pod: known.pod,
                settings: Arc::unwrap_or_clone(settings),
                resolvers: self.resolvers.of(&known.dns),
            })),
        }
    }

    /// What can be said of the watch, for health and metrics.
    pub fn state(&self) -> &Arc<PodsState> {
        &self.state
    }

    pub(crate) fn index(&self) -> &task::IndexHandle {
        &self.index
    }

    pub(crate) fn resolvers(&self) -> &Resolvers {
        &self.resolvers
    }

    /// Asks the API for a pod, and tells the index of it.
    async fn fetched(&self, pod: &PodRef) -> Result<Known> {
        let found = self.get(pod).await.inspect_err(|_| {
            self.state.errors.fetch.inc();
        })?;
        let Some(found) = found else {
            bail!("the API has no pod {pod} of uid {} (any more)", pod.uid);
        };
        self.index.fetched(found).await
    }

    /// The pod, as the API has it now; `None` when it has none of this uid.
    ///
    /// # Errors
    ///
    /// When the API does not answer.
    pub(crate) async fn get(&self, pod: &PodRef) -> Result<Option<Pod>> {
        let pods: Api<api::Pod> = Api::namespaced(self.client.clone(), &pod.namespace);
        let answer = tokio::time::timeout(API_DEADLINE, pods.get_opt(&pod.name))
            .await
            .map_err(anyhow::Error::from)
            .and_then(|answer| Ok(answer?))
            .with_context(|| {
                format!("cannot ask the Kubernetes API for pod {pod}; is it there, and may this agent get pods?")
            })?;
        let found = answer.and_then(Pod::trimmed);
        // Runtimes of old do not tell their CNI plugins the uid.
        Ok(found.filter(|found| pod.uid.is_empty() || found.id.uid == pod.uid))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::{Value, json};

    use super::Pod;

    /// A pod of a mesh, as its injector leaves it, shortened: an application, and
    /// the sidecar behind it.
    pub(crate) fn manifest(mesh: &str) -> Value {
        let text = match mesh {
            "istio" => include_str!("fixtures/istio.json"),
            "linkerd" => include_str!("fixtures/linkerd.json"),
            "kuma" => include_str!("fixtures/kuma.json"),
            other => panic!("no pod of {other}"),
        };
        let mut pod: Value = serde_json::from_str(text).expect("JSON");
        // As places to change something at.
        for map in ["labels", "annotations"] {
            if pod["metadata"][map].is_null() {
                pod["metadata"][map] = json!({});
            }
        }
        pod
    }

    /// The pod of a manifest, trimmed.
    pub(crate) fn pod(manifest: &Value) -> Pod {
        let full = serde_json::from_value(manifest.clone()).expect("a pod");
        Pod::trimmed(full).expect("it has a name")
    }
}
