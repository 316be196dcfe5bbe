//! The program of one pod: attached to its network namespace.
#![no_std]
#![no_main]
#![expect(unused_crate_dependencies, reason = "the library uses them")]

use aya_ebpf::{
    bindings::sk_action::{SK_DROP, SK_PASS},
    macros::sk_lookup,
    programs::SkLookupContext,
};
use shunt_programs::{
    ctx::Arrival,
    lookup::{self, Outcome},
};

/// A packet looks for a listener (Linux 5.9).
#[sk_lookup]
fn shunt_lookup(ctx: SkLookupContext) -> u32 {
    match lookup::lookup(Arrival::new(ctx.lookup)) {
        Outcome::Untouched | Outcome::Assigned => SK_PASS,
        Outcome::Refused => SK_DROP,
    }
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// Dual licensed: some helpers are for GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
