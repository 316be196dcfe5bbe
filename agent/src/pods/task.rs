//! The task that owns the index.

use std::{sync::Arc, time::Duration};

use anyhow::{Result, anyhow};
use tokio::{
    sync::{Notify, mpsc, oneshot},
    task::JoinSet,
};

use super::{Action, Decision, Event, Index, Known, Pod, PodRef, PodsState};
use crate::observe::events::{PodEvents, Reason};

/// How many events may wait for the index; the watch waits then.
const INBOX: usize = 256;

enum Message {
    Event(Event),
    Fetched(Box<Pod>, oneshot::Sender<Known>),
    Known(PodRef, oneshot::Sender<Option<Known>>),
    View(oneshot::Sender<View>),
}

/// All that is known at one moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct View {
    /// The pods.
    pub(crate) pods: Vec<Known>,
    /// Those of which the API has to be asked.
    pub(crate) doubtful: Vec<PodRef>,
    /// All pods of the node have been known once.
    pub(crate) synced: bool,
}

/// The way to the index.
#[derive(Clone)]
pub(crate) struct IndexHandle {
    inbox: mpsc::Sender<Message>,
    changed: Arc<Notify>,
}

/// Starts the task.
pub(super) fn start(
    mut index: Index,
    state: Arc<PodsState>,
    events: PodEvents,
    tasks: &mut JoinSet<()>,
) -> IndexHandle {
    let (inbox, mut messages) = mpsc::channel(INBOX);
    let changed = Arc::new(Notify::new());
    let handle = IndexHandle {
        inbox,
        changed: Arc::clone(&changed),
    };
    tasks.spawn(async move {
        while let Some(message) = messages.recv().await {
            // An answer that nobody waits for any more is nobody's loss.
            match message {
                Message::Event(event) => {
                    let actions = index.apply(event);
                    tell(&actions, &state, &events, &changed);
                }
                Message::Fetched(pod, answer) => {
                    let known = Known {
                        pod: pod.id.clone(),
                        decision: index.decide(&pod),
                        dns: pod.dns.clone(),
                    };
                    let actions = index.apply(Event::Fetched(*pod));
                    tell(&actions, &state, &events, &changed);
                    let _ = answer.send(index.get(&known.pod.uid).cloned().unwrap_or(known));
                }
                Message::Known(pod, answer) => {
                    let _ = answer.send(index.get(&pod.uid).cloned());
                }
                Message::View(answer) => {
                    let _ = answer.send(View {
                        pods: index.all().cloned().collect(),
                        doubtful: index.doubtful().cloned().collect(),
                        synced: index.is_synced(),
                    });
                }
            }
        }
    });
    handle
}

/// Tells people, and the reconciler, what has changed.
fn tell(actions: &[Action], state: &PodsState, events: &PodEvents, changed: &Notify) {
    for action in actions {
        match action {
            Action::Decided(pod, Decision::Redirect(_)) => {
                tracing::debug!(pod = %pod, uid = pod.uid, "is to be redirected");
            }
            Action::Decided(pod, Decision::Leave(why)) => {
                tracing::debug!(pod = %pod, uid = pod.uid, "not redirected: {why}");
            }
            Action::Decided(pod, Decision::Refuse(error)) => {
                state.errors.settings.inc();
                tracing::warn!(pod = %pod, uid = pod.uid, "cannot be redirected: {error}");
                events.say(pod, Reason::BadSettings, error.to_string());
            }
            Action::Gone(pod) => {
                tracing::debug!(pod = %pod, uid = pod.uid, "is gone");
                events.forget(pod);
            }
            Action::Doubt(pod) => {
                tracing::debug!(pod = %pod, uid = pod.uid, "may be gone");
            }
            Action::Synced => tracing::info!("all pods of the node are known"),
        }
    }
    if !actions.is_empty() {
        changed.notify_one();
    }
}

impl IndexHandle {
    /// Tells the index something. When it is gone, nobody needs it.
    pub(crate) async fn tell(&self, event: Event) {
        let _ = self.inbox.send(Message::Event(event)).await;
    }

    /// What is known of a pod, of this incarnation.
    pub(super) async fn known(&self, pod: &PodRef) -> Result<Option<Known>> {
        self.ask(|answer| Message::Known(pod.clone(), answer)).await
    }

    /// Tells of a pod that was asked for; says what is known of it then.
    pub(super) async fn fetched(&self, pod: Pod) -> Result<Known> {
        self.ask(|answer| Message::Fetched(Box::new(pod), answer))
            .await
    }

    /// All that is known now.
    pub(crate) async fn view(&self) -> Result<View> {
        self.ask(Message::View).await
    }

    /// Waits until something has changed, or for `longest`.
    pub(crate) async fn changed(&self, longest: Duration) {
        let _ = tokio::time::timeout(longest, self.changed.notified()).await;
    }

    async fn ask<T>(&self, message: impl FnOnce(oneshot::Sender<T>) -> Message) -> Result<T> {
        let ended = || anyhow!("the agent is shutting down");
        let (answer, wait) = oneshot::channel();
        self.inbox
            .send(message(answer))
            .await
            .map_err(|_ended| ended())?;
        wait.await.map_err(|_ended| ended())
    }
}
