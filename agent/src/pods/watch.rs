//! The watch on the node's pods.

use std::{pin::pin, sync::Arc, time::Duration};

use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1 as api;
use kube::{
    Api,
    api::ListParams,
    runtime::{
        WatchStreamExt as _,
        watcher::{self, Config, InitialListStrategy, watcher},
    },
};

use super::{Event, Pod, PodsState, pod::reference, task::IndexHandle};

/// How long the API server keeps a watch open, in seconds. A watch that hears
/// nothing for longer is dead, and is begun anew: a server that has lost its power
/// says no good-bye.
const WATCH_SECONDS: u32 = 120;

/// How often a silent API is tried while the watch waits to begin anew: kube does
/// not say when it has.
const PROBE_PAUSE: Duration = Duration::from_secs(3);

/// How long before a watch is begun with a new list, after an answer that the old
/// place is too old.
const RELIST_PAUSE: Duration = Duration::from_secs(1);

/// Follows the pods of a node for ever. While the API is away it tries again, first
/// after 0.8 seconds and later every 30 or so.
pub(super) async fn follow(
    pods: Api<api::Pod>,
    node: String,
    index: IndexHandle,
    state: Arc<PodsState>,
) {
    loop {
        until_too_old(&pods, &node, &index, &state).await;
        tokio::time::sleep(RELIST_PAUSE).await;
    }
}

/// Follows the pods until the API server says that it no longer knows what came after
/// the last event. In the stream kube sees to that; as an answer to the request it
/// would ask for the same place again and again.
async fn until_too_old(pods: &Api<api::Pod>, node: &str, index: &IndexHandle, state: &PodsState) {
    let config = Config {
        // A streaming list is refused by servers that do not know it.
        initial_list_strategy: InitialListStrategy::ListWatch,
        ..Config::default()
            .fields(&of_node(node))
            .timeout(WATCH_SECONDS)
    };
    let mut events = pin!(watcher(pods.clone(), config).default_backoff());
    loop {
        let event = tokio::select! {
            event = events.next() => event,
            () = answers(pods, node), if state.is_failing() => {
                works(state);
                continue;
            }
        };
        match event {
            // The stream has no end.
            None => return,
            Some(Ok(event)) => hear(event, index, state).await,
            Some(Err(error)) => {
                complain(&error, state);
                if matches!(error, watcher::Error::WatchStartFailed(_)) && is_too_old(&error) {
                    return;
                }
            }
        }
    }
}

fn of_node(node: &str) -> String {
    format!("spec.nodeName={node}")
}

/// Waits until the API answers.
async fn answers(pods: &Api<api::Pod>, node: &str) {
    let one = ListParams::default().fields(&of_node(node)).limit(1);
    loop {
        tokio::time::sleep(PROBE_PAUSE).await;
        let answer = tokio::time::timeout(super::API_DEADLINE, pods.list_metadata(&one)).await;
        if matches!(answer, Ok(Ok(_))) {
            return;
        }
    }
}

async fn hear(event: watcher::Event<api::Pod>, index: &IndexHandle, state: &PodsState) {
    use watcher::Event as Heard;
    // Said before the API is asked.
    if !matches!(event, Heard::Init) {
        works(state);
    }
    let event = match event {
        Heard::Init => Some(Event::Listing),
        Heard::InitApply(pod) => Pod::trimmed(pod).map(Event::Listed),
        Heard::InitDone => Some(Event::ListDone),
        Heard::Apply(pod) => Pod::trimmed(pod).map(Event::Applied),
        Heard::Delete(pod) => reference(&pod.metadata).map(Event::Deleted),
    };
    if let Some(event) = event {
        index.tell(event).await;
    }
}

fn works(state: &PodsState) {
    if let Some(lag) = state.watch_works() {
        tracing::info!("the Kubernetes API answers again, after {lag:.1?}");
    }
}

/// Says it once; what comes after is what was said already, or is on the way to
/// being right again.
fn complain(error: &watcher::Error, state: &PodsState) {
    if is_too_old(error) {
        // It happens after a silence, and says nothing about the API.
        tracing::info!("the watch on pods has lost its place, all are listed anew: {error}");
        return;
    }
    if state.is_failing() {
        tracing::debug!("the watch on pods: {error}");
    } else {
        tracing::warn!(
            "the watch on pods: {error}; is the API there, and may this agent list and watch \
             pods? What is enrolled stays as it is"
        );
    }
    state.watch_failed();
}

fn is_too_old(error: &watcher::Error) -> bool {
    const GONE: u16 = 410;
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchError(status) => status.code == GONE,
        watcher::Error::InitialListFailed(_)
        | watcher::Error::WatchStartFailed(_)
        | watcher::Error::WatchFailed(_)
        | watcher::Error::NoResourceVersion => false,
    }
}
