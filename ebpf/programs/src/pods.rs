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
    // SAFETY: the element is memory of the map, and any bits are settings. The
    // agent replaces settings as a whole, by another element, and writes no other
    // before every program has ended that may have looked the old one up.
    unsafe { PODS.get(netns) }
}
