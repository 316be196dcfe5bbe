//! Ctrl-C, for programs that have something to clean up.

use std::sync::{Arc, atomic::AtomicBool, atomic::Ordering};

use signal_hook::{consts::TERM_SIGNALS, flag};

/// Remembers that somebody wants this process to end.
#[derive(Clone, Debug)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// From now on SIGINT, SIGTERM and SIGQUIT are remembered; a second one ends
    /// the process at once.
    ///
    /// # Panics
    ///
    /// When the kernel refuses.
    pub fn watch() -> Self {
        let wanted = Arc::new(AtomicBool::new(false));
        for &signal in TERM_SIGNALS {
            // In this order: the first signal finds the flag unset.
            flag::register_conditional_shutdown(signal, 1, Arc::clone(&wanted))
                .and_then(|_| flag::register(signal, Arc::clone(&wanted)))
                .unwrap_or_else(|error| panic!("cannot watch signal {signal}: {error}"));
        }
        Self(wanted)
    }

    /// Whether there was a signal.
    pub fn is_wanted(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
