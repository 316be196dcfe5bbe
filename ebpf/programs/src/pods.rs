//! The settings of enrolled namespaces: what every program asks first.

use shunt_abi::{NetnsCookie, PodSettings};

use crate::maps::PODS;

/// The settings of a namespace, `None` when it is not enrolled and therefore
/// none of our business.
#[inline(always)]
pub fn settings<'a>(netns: NetnsCookie) -> Option<&'a PodSettings> {
    // SAFETY: the agent replaces settings as a whole, by another element, and
    // an element stays for as long as the program that looked it up runs.
    unsafe { PODS.get(netns) }
}
