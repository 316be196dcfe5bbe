//! The settings of enrolled namespaces: what every program asks first.

use aya_ebpf::Global;
use shunt_abi::{NetnsCookie, PodSettings};

use crate::maps::PODS;

/// The namespace that this copy of a pod's programs is attached to. No helper
/// tells an `sk_lookup` program where it runs, nor a classifier before Linux
/// 6.11, so each pod gets copies of its own.
#[unsafe(no_mangle)]
static NETNS: Global<NetnsCookie> = Global::new(0);

/// The namespace of a pod's own program.
#[inline(always)]
pub fn here() -> NetnsCookie {
    NETNS.load()
}

/// The settings of a namespace, `None` when it is not enrolled and therefore
/// none of our business.
#[inline(always)]
pub fn settings<'a>(netns: NetnsCookie) -> Option<&'a PodSettings> {
    // SAFETY: the agent replaces settings as a whole, by another element, and
    // an element stays for as long as the program that looked it up runs.
    unsafe { PODS.get(netns) }
}
