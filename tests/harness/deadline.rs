//! Waiting for what nobody announces.

use std::{
    thread,
    time::{Duration, Instant},
};

/// How long anything may take. Nothing here takes more than seconds on a quiet
/// machine; on a busy one the verifier alone can take longer than that.
pub const DEADLINE: Duration = Duration::from_secs(120);

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(5);

/// Looks again and again until `look` finds something.
///
/// # Panics
///
/// When it has found nothing within the [`DEADLINE`]; the message has the error
/// of the last look.
#[track_caller]
pub fn wait_until<T>(what: &str, mut look: impl FnMut() -> Result<T, String>) -> T {
    let end = Instant::now() + DEADLINE;
    loop {
        match look() {
            Ok(found) => return found,
            Err(why) if Instant::now() > end => {
                panic!("waited {DEADLINE:?} for {what}: {why}")
            }
            Err(_) => thread::sleep(PAUSE),
        }
    }
}
