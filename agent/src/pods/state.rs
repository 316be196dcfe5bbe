//! What can be said of the pods' watch, for health and metrics.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// How the watch is doing, and what has gone wrong.
#[derive(Debug, Default)]
pub struct PodsState {
    /// What has gone wrong, by reason.
    pub errors: PodErrors,
    synced: AtomicBool,
    failing_since: Mutex<Option<Instant>>,
}

/// How often something has gone wrong since the agent started.
#[derive(Debug, Default)]
pub struct PodErrors {
    /// The watch broke off, or could not be begun.
    pub watch: Count,
    /// A single pod could not be asked for.
    pub fetch: Count,
    /// A pod asks for something that cannot be understood.
    pub settings: Count,
    /// The processes of the node could not be looked at.
    pub scan: Count,
    /// A pod could not be enrolled.
    pub enrol: Count,
    /// A Kubernetes event could not be written.
    pub event: Count,
}

/// A count that only grows.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// One more.
    pub(crate) fn inc(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// How many.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl PodErrors {
    /// All of them, each with the reason as a metric's label says it.
    pub fn all(&self) -> [(&'static str, u64); 6] {
        [
            ("watch", self.watch.get()),
            ("fetch", self.fetch.get()),
            ("settings", self.settings.get()),
            ("scan", self.scan.get()),
            ("enrol", self.enrol.get()),
            ("event", self.event.get()),
        ]
    }
}

impl PodsState {
    /// Whether all pods of the node are known, and those that were found running
    /// are enrolled or have failed. Once it is so it stays so.
    pub fn is_synced(&self) -> bool {
        self.synced.load(Ordering::Acquire)
    }

    /// For how long the API has not answered, so that what is known of the pods may
    /// be as old as this; zero while it answers.
    pub fn watch_lag(&self) -> Duration {
        self.failing_since()
            .map_or(Duration::ZERO, |since| since.elapsed())
    }

    pub(crate) fn set_synced(&self) {
        self.synced.store(true, Ordering::Release);
    }

    /// Whether the API did not answer the last time.
    pub(super) fn is_failing(&self) -> bool {
        self.failing_since().is_some()
    }

    pub(super) fn watch_failed(&self) {
        self.errors.watch.inc();
        self.lock().get_or_insert_with(Instant::now);
    }

    /// The API has answered; gives for how long it had not, if it had not.
    pub(super) fn watch_works(&self) -> Option<Duration> {
        self.lock().take().map(|since| since.elapsed())
    }

    fn failing_since(&self) -> Option<Instant> {
        *self.lock()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Instant>> {
        self.failing_since
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lag_counts_from_the_first_failure_until_an_answer() {
        let state = PodsState::default();
        assert_eq!(state.watch_lag(), Duration::ZERO);
        state.watch_failed();
        let first = state.failing_since();
        state.watch_failed();
        assert_eq!(state.failing_since(), first);
        assert!(state.watch_works().is_some());
        assert_eq!(state.watch_works(), None);
        assert_eq!(state.watch_lag(), Duration::ZERO);
        assert_eq!(state.errors.all()[0], ("watch", 2));
    }
}
