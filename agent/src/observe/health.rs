//! Whether the agent is ready, and why not.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// The programs are loaded and attached, and the node's thread serves.
pub const ATTACHED: &str = "attached";
/// The CNI plugin and its entry are installed.
pub const CNI_INSTALLED: &str = "CNI plugin";

/// What has to hold before the agent is ready: conditions by name. Whoever is
/// responsible for one declares it before the agent says that it is up, and sets it.
#[derive(Debug, Default)]
pub struct Readiness {
    /// Why a condition does not hold; `None` of one that does.
    conditions: Mutex<BTreeMap<&'static str, Option<String>>>,
}

impl Readiness {
    /// The condition does not hold (any more), and why, in words.
    pub fn not_yet(&self, condition: &'static str, why: impl Into<String>) {
        self.set(condition, Some(why.into()));
    }

    /// The condition holds.
    pub fn met(&self, condition: &'static str) {
        self.set(condition, None);
    }

    fn set(&self, condition: &'static str, why_not: Option<String>) {
        let before = self.lock().insert(condition, why_not.clone());
        // That it does not hold at the start is no news.
        if before.is_none() || before.as_ref() == Some(&why_not) {
            return;
        }
        match why_not {
            None => tracing::info!(condition, "a condition of being ready holds"),
            Some(why) => tracing::info!(condition, why, "not ready"),
        }
    }

    /// Why the agent is not ready: a line for each condition that does not hold.
    /// Empty when it is ready.
    pub fn missing(&self) -> Vec<String> {
        let line = |(name, why): (&&'static str, &Option<String>)| {
            let why = why.as_deref()?;
            Some(format!("{name}: {why}"))
        };
        self.lock().iter().filter_map(line).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<&'static str, Option<String>>> {
        self.conditions
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_ready_when_every_condition_holds() {
        let readiness = Readiness::default();
        readiness.not_yet(ATTACHED, "the programs are being loaded");
        readiness.not_yet(CNI_INSTALLED, "no list of plugins is there");
        assert_eq!(
            readiness.missing(),
            [
                "CNI plugin: no list of plugins is there",
                "attached: the programs are being loaded"
            ]
        );
        readiness.met(ATTACHED);
        readiness.met(CNI_INSTALLED);
        assert!(readiness.missing().is_empty());
        readiness.not_yet(CNI_INSTALLED, "it failed");
        assert_eq!(readiness.missing(), ["CNI plugin: it failed"]);
    }
}
