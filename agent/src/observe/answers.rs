//! What the node's thread last said of itself, and whether it still answers.

use std::{
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use tokio::{
    sync::{Mutex, oneshot},
    time::timeout,
};

use crate::node::{Totals, WeakNode};

/// How long a question may be under way before nobody waits for its answer any longer:
/// less than the second that kubelet gives a probe. Enrolling a pod takes milliseconds;
/// where it takes longer, what was said last is good enough.
const PATIENCE: Duration = Duration::from_millis(500);

/// How old an answer may be to be given again: asking costs the thread a look at
/// every pod, and anybody may ask.
const FRESH: Duration = Duration::from_millis(500);

/// How long the thread may be busy with one thing before it counts as stuck.
const STUCK: Duration = Duration::from_secs(60);

/// What is known of the node's thread.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Life {
    /// It is not there yet.
    Starting,
    /// It has answered, or is busy, which it may be for a while.
    Alive,
    /// It has been busy for too long.
    Stuck(Duration),
    /// It has ended.
    Ended,
}

/// The last answer.
#[derive(Clone, Debug)]
pub(super) struct Said {
    pub(super) totals: Totals,
    pub(super) at: Instant,
}

/// Asks the node's thread, one question at a time.
#[derive(Default)]
pub(super) struct Answers {
    node: OnceLock<WeakNode>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    said: Option<Said>,
    asked: Option<Question>,
}

/// A question under way. It is not withdrawn when nobody waits any longer: a thread
/// that is busy must not find a queue of them.
struct Question {
    since: Instant,
    answer: oneshot::Receiver<Option<Totals>>,
}

impl Question {
    fn to(node: &WeakNode) -> Self {
        let (send, answer) = oneshot::channel();
        let node = node.clone();
        tokio::spawn(async move {
            let totals = match node.upgrade() {
                Some(node) => node.totals().await.ok(),
                None => None,
            };
            // Nobody waits when the agent ends.
            let _ = send.send(totals);
        });
        Self {
            since: Instant::now(),
            answer,
        }
    }
}

impl Answers {
    /// From now on this node is asked; later calls change nothing.
    pub(super) fn of(&self, node: WeakNode) {
        let _ = self.node.set(node);
    }

    /// What the thread says, or said last, and whether it is alive. Returns within a
    /// moment.
    pub(super) async fn ask(self: &Arc<Self>) -> (Life, Option<Said>) {
        let Some(node) = self.node.get() else {
            return (Life::Starting, None);
        };
        let mut state = self.state.lock().await;
        let life = state.ask(node, PATIENCE).await;
        (life, state.said.clone())
    }
}

impl State {
    async fn ask(&mut self, node: &WeakNode, patience: Duration) -> Life {
        let fresh = |said: &Said| said.at.elapsed() < FRESH;
        if self.said.as_ref().is_some_and(fresh) && !node.has_ended() {
            return Life::Alive;
        }
        let question = self.asked.get_or_insert_with(|| Question::to(node));
        // Callers come one after the other: whoever comes later does not wait anew.
        let left = patience.saturating_sub(question.since.elapsed());
        match timeout(left, &mut question.answer).await {
            Ok(Ok(Some(totals))) => {
                self.asked = None;
                self.said = Some(Said {
                    totals,
                    at: Instant::now(),
                });
                Life::Alive
            }
            Ok(_) => {
                self.asked = None;
                Life::Ended
            }
            Err(_late) => match question.since.elapsed() {
                busy if busy > STUCK => Life::Stuck(busy),
                _ => Life::Alive,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::handle_for_tests;

    fn totals(pods: usize) -> Totals {
        Totals {
            pods,
            counted: shunt_abi::Counters::ZERO,
            enrolled: 0,
            failed: 0,
            maps: Vec::new(),
        }
    }

    #[tokio::test]
    async fn a_busy_thread_is_not_waited_for_and_asked_once() {
        let (node, mut inbox) = handle_for_tests();
        let weak = node.downgrade();
        let mut state = State::default();
        for _ in 0..3 {
            assert_eq!(state.ask(&weak, Duration::ZERO).await, Life::Alive);
            assert!(state.said.is_none());
            // The question gets its turn to be asked.
            tokio::task::yield_now().await;
        }
        inbox.answer_totals(totals(3));
        assert!(inbox.is_empty(), "it was asked more than once");
        assert_eq!(state.ask(&weak, PATIENCE).await, Life::Alive);
        assert_eq!(state.said.map(|said| said.totals.pods), Some(3));
    }

    #[tokio::test]
    async fn a_thread_that_has_ended_is_told() {
        let (node, inbox) = handle_for_tests();
        drop(inbox);
        let answers = Arc::new(Answers::default());
        assert_eq!(answers.ask().await.0, Life::Starting);
        answers.of(node.downgrade());
        assert_eq!(answers.ask().await.0, Life::Ended);
        drop(node);
        assert_eq!(answers.ask().await.0, Life::Ended);
    }
}
