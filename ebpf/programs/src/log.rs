//! What the agent logs of the programs' decisions, when it is asked for.
//!
//! The agent sets `LOG_DECISIONS` before it loads the programs. It is a constant to
//! the verifier, which takes everything behind it out where nothing is logged.

use aya_ebpf::Global;
use aya_log_ebpf::debug;
use shunt_abi::Decided;

use crate::maps::DECIDED;

/// Not 0 when decisions are logged.
#[unsafe(no_mangle)]
static LOG_DECISIONS: Global<u32> = Global::new(0);

/// Logs a decision.
#[inline(always)]
pub fn decided(decided: impl FnOnce() -> Decided) {
    if LOG_DECISIONS.load() == 0 {
        return;
    }
    if let Some(place) = DECIDED.get_ptr_mut(0) {
        // SAFETY: the slot of this processor. A packet that is decided over before
        // it is sent may take its place; then that one is logged twice.
        unsafe { place.write(decided()) };
        send_decided();
    }
}

/// Sends the decision to the agent. The verifier looks at a function with a symbol of its
/// own once, whoever calls it; at another, for each state in which it is called, again.
/// So it takes nothing, and the decision travels as it lies in the map. What it answers
/// says nothing: such a function has to answer a number.
///
/// A frame of its own, and in it as little as can be: the programs that call it have not
/// much left of the stack.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn send_decided() -> u32 {
    if let Some(decided) = DECIDED.get(0) {
        let bytes: &[u8] = decided.as_bytes();
        debug!((), target: "decided", "{:x}", bytes);
    }
    0
}
