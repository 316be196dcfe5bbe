//! Kubernetes events: what `kubectl describe pod` shows where a human must act.
//!
//! They are created and nothing else: kube's own recorder counts repetitions by
//! changing an event, and the agent may not change anything. What has been said of a
//! pod is not said again for an hour, after which the API forgets it.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use k8s_openapi::{
    api::core::v1::{Event, EventSource, ObjectReference},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
    jiff::Timestamp,
};
use kube::{Api, api::PostParams};
use tokio::{sync::mpsc, task::JoinSet};

use crate::pods::{PodRef, PodsState};

/// What is wrong, in one word, as `kubectl` shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Reason {
    /// The pod's annotations or its sidecar say something that cannot be understood.
    BadSettings,
    /// The pod could not be enrolled.
    NotEnrolled,
}

impl Reason {
    const fn name(self) -> &'static str {
        match self {
            Self::BadSettings => "ShuntBadSettings",
            Self::NotEnrolled => "ShuntNotEnrolled",
        }
    }
}

/// How many events may wait for the API. What is more is in the log alone.
const INBOX: usize = 64;

/// How long the API keeps events, unless it is told otherwise.
const KEPT: Duration = Duration::from_hours(1);

/// The longest message that the API takes, in bytes.
const LONGEST: usize = 1024;

/// How long the API may take for one event.
const DEADLINE: Duration = Duration::from_secs(5);

enum Message {
    Say(PodRef, Reason, String),
    Forget(PodRef),
}

/// The way to the task that writes events.
#[derive(Clone)]
pub(crate) struct PodEvents {
    inbox: mpsc::Sender<Message>,
}

impl PodEvents {
    /// Starts the task. The events say that they come from this node.
    pub(crate) fn start(
        client: kube::Client,
        node: String,
        state: Arc<PodsState>,
        tasks: &mut JoinSet<()>,
    ) -> Self {
        let (inbox, mut messages) = mpsc::channel(INBOX);
        tasks.spawn(async move {
            let mut said = Said::default();
            while let Some(message) = messages.recv().await {
                let (pod, reason, text) = match message {
                    Message::Say(pod, reason, text) => (pod, reason, text),
                    Message::Forget(pod) => {
                        said.forget(&pod);
                        continue;
                    }
                };
                if !said.is_news(&pod, reason, &text, Instant::now()) {
                    continue;
                }
                match create(&client, event(&pod, reason, &text, &node)).await {
                    Ok(()) => said.remember(&pod, reason, text, Instant::now()),
                    Err(error) => {
                        state.errors.event.inc();
                        tracing::debug!(pod = %pod, "cannot write an event: {error}");
                    }
                }
            }
        });
        Self { inbox }
    }

    /// Says something of a pod.
    pub(crate) fn say(&self, pod: &PodRef, reason: Reason, text: String) {
        self.send(Message::Say(pod.clone(), reason, text));
    }

    /// Nothing more will be said of this pod.
    pub(crate) fn forget(&self, pod: &PodRef) {
        self.send(Message::Forget(pod.clone()));
    }

    /// Nobody waits for an event.
    fn send(&self, message: Message) {
        if self.inbox.try_send(message).is_err() {
            tracing::debug!("too many events wait for the API");
        }
    }
}

/// What has been said of which pod, and when.
#[derive(Default)]
struct Said(BTreeMap<String, BTreeMap<Reason, (String, Instant)>>);

impl Said {
    fn is_news(&self, pod: &PodRef, reason: Reason, text: &str, now: Instant) -> bool {
        let before = self.0.get(&pod.uid).and_then(|said| said.get(&reason));
        before.is_none_or(|(before, at)| before != text || now.duration_since(*at) >= KEPT)
    }

    fn remember(&mut self, pod: &PodRef, reason: Reason, text: String, now: Instant) {
        let of_pod = self.0.entry(pod.uid.clone()).or_default();
        of_pod.insert(reason, (text, now));
    }

    fn forget(&mut self, pod: &PodRef) {
        self.0.remove(&pod.uid);
    }
}

async fn create(client: &kube::Client, event: Event) -> anyhow::Result<()> {
    let namespace = event.metadata.namespace.as_deref().unwrap_or_default();
    let events: Api<Event> = Api::namespaced(client.clone(), namespace);
    tokio::time::timeout(DEADLINE, events.create(&PostParams::default(), &event)).await??;
    Ok(())
}

fn event(pod: &PodRef, reason: Reason, text: &str, node: &str) -> Event {
    let now = Timestamp::now();
    // A name may have 253 characters, all of which the pod's may have taken.
    let start: String = pod.name.chars().take(230).collect();
    let start = start.trim_end_matches(['.', '-']);
    Event {
        metadata: ObjectMeta {
            namespace: Some(pod.namespace.clone()),
            name: Some(format!("{start}.{:x}", now.as_nanosecond())),
            ..ObjectMeta::default()
        },
        involved_object: ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            namespace: Some(pod.namespace.clone()),
            name: Some(pod.name.clone()),
            uid: Some(pod.uid.clone()),
            ..ObjectReference::default()
        },
        type_: Some("Warning".to_owned()),
        reason: Some(reason.name().to_owned()),
        message: Some(cut(text).to_owned()),
        count: Some(1),
        first_timestamp: Some(Time(now)),
        last_timestamp: Some(Time(now)),
        source: Some(EventSource {
            component: Some("shunt".to_owned()),
            host: Some(node.to_owned()),
        }),
        reporting_component: Some("shunt".to_owned()),
        reporting_instance: Some(node.to_owned()),
        ..Event::default()
    }
}

/// As much of the text as the API takes.
fn cut(text: &str) -> &str {
    let mut end = text.len().min(LONGEST);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> PodRef {
        PodRef {
            namespace: "shop".to_owned(),
            name: "a".repeat(253),
            uid: "1".to_owned(),
        }
    }

    #[test]
    fn a_thing_is_said_once_an_hour() {
        let (pod, start) = (pod(), Instant::now());
        let mut said = Said::default();
        assert!(said.is_news(&pod, Reason::BadSettings, "a", start));
        // It is not said until the API has taken it.
        assert!(said.is_news(&pod, Reason::BadSettings, "a", start));
        said.remember(&pod, Reason::BadSettings, "a".to_owned(), start);
        assert!(!said.is_news(&pod, Reason::BadSettings, "a", start));
        assert!(said.is_news(&pod, Reason::BadSettings, "b", start));
        assert!(said.is_news(&pod, Reason::NotEnrolled, "a", start));
        assert!(said.is_news(&pod, Reason::BadSettings, "a", start + KEPT));
        said.forget(&pod);
        assert!(said.0.is_empty());
    }

    #[test]
    fn an_event_is_one_that_the_api_takes() {
        let long = "é".repeat(LONGEST);
        let event = event(&pod(), Reason::BadSettings, &long, "worker-1");
        let name = event.metadata.name.expect("it has a name");
        assert!(name.len() <= 253, "{name}");
        assert_eq!(event.message.expect("it has a text").len(), LONGEST);
        assert_eq!(event.metadata.namespace, event.involved_object.namespace);
    }
}
