//! The BPF programs, as a library shared by the three objects that are loaded.
//!
//! The way of a connection: [`connect`] asks [`facts`] for a decision and rewrites
//! the destination ([`datagram`] does for DNS without a connection),
//! [`handshake`] carries the asked-for destination over to the accepted socket by [`flows`],
//! [`bind`] keeps the application's ports free of what the proxy accepted there,
//! [`names`] answers who the peer and the original destination are; what comes
//! from outside the pod is steered by [`lookup`] to a listener that
//! [`listeners`] knows. What a virtual machine behind the pod sends is brought to
//! the proxy by [`forward`], which reads and rewrites it by [`packet`].
//! Two sockets of one node that talk to each other are spliced: [`splice_ends`]
//! finds them, [`splice`] passes their messages on.
//! [`maps`] says who writes and who reads which map;
//! [`ctx`], [`kernel`], [`flows`], [`atomic`] and [`storage`] are the only ones that touch raw
//! pointers of the kernel.
#![no_std]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]
#![allow(
    clippy::needless_borrows_for_generic_args,
    reason = "a key or a value that is handed over is copied, and the stack has no room for both"
)]

pub mod atomic;
pub mod bind;
pub mod connect;
pub mod counters;
pub mod ctx;
pub mod datagram;
pub mod facts;
pub mod flows;
pub mod forward;
pub mod handshake;
pub mod kernel;
pub mod listeners;
pub mod lists;
pub mod log;
pub mod lookup;
pub mod maps;
pub mod names;
pub mod packet;
pub mod pods;
pub mod splice;
pub mod splice_ends;
pub mod storage;

/// What every object has once: its licence, and what becomes of a panic, which the
/// verifier does not let happen.
#[macro_export]
macro_rules! object {
    () => {
        #[cfg(target_arch = "bpf")]
        #[panic_handler]
        fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
            loop {}
        }

        /// Dual licensed: some helpers are for GPL-compatible programs only.
        #[unsafe(link_section = "license")]
        #[unsafe(no_mangle)]
        static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
    };
}
