//! What the agent reports about its pods.

use shunt_abi::{ErrorCode, Fallback, NetnsCookie};
use shunt_decide::Rule;

use crate::maps::COUNTERS;

/// Counts a decision.
#[inline(always)]
pub fn decided(pod: NetnsCookie, rule: Rule) {
    if let Some(counters) = COUNTERS.get_ptr_mut(pod) {
        // SAFETY: the slot of this processor, and programs do not interrupt
        // each other here: at worst a count is lost, never misplaced.
        unsafe { (*counters).by_rule[rule as usize] += 1 };
    }
}

/// Counts an error.
#[inline(always)]
pub fn failed(pod: NetnsCookie, error: ErrorCode) {
    if let Some(counters) = COUNTERS.get_ptr_mut(pod) {
        // SAFETY: as above.
        unsafe { (*counters).by_error[error as usize] += 1 };
    }
}

/// Counts what was spliced.
#[inline(always)]
pub fn spliced(pod: NetnsCookie, bytes: u32) {
    if let Some(counters) = COUNTERS.get_ptr_mut(pod) {
        // SAFETY: as above.
        unsafe {
            (*counters).splice.bytes += u64::from(bytes);
            (*counters).splice.messages += 1;
        }
    }
}

/// Counts what could have been spliced and went by TCP.
#[inline(always)]
pub fn by_tcp(pod: NetnsCookie, why: Fallback) {
    if let Some(counters) = COUNTERS.get_ptr_mut(pod) {
        // SAFETY: as above.
        unsafe { (*counters).splice.fallbacks[why as usize] += 1 };
    }
}
