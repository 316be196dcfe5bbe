//! The programs that splice: loaded and attached only where splicing is on.
#![no_std]
#![no_main]
#![expect(unused_crate_dependencies, reason = "the library uses them")]

use aya_ebpf::{bindings::sk_action::SK_PASS, macros::sk_msg, programs::SkMsgContext};
use shunt_programs::{
    ctx::{FileVisit, Member, MemberVisit, Outgoing, TaskFile},
    splice, splice_ends,
};

/// A member of the map sends a message (Linux 4.18).
#[sk_msg]
fn shunt_message(ctx: SkMsgContext) -> u32 {
    splice::message(Outgoing::new(ctx.msg));
    SK_PASS
}

/// Visits every open file (Linux 5.8).
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_file")]
extern "C" fn shunt_files(ctx: *mut TaskFile) -> i32 {
    splice_ends::visited(FileVisit::new(ctx));
    0
}

/// Visits every member of the map (Linux 5.10), and says what those have left to do that have
/// not finished.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/sockmap")]
extern "C" fn shunt_members(ctx: *mut Member) -> i32 {
    let visit = MemberVisit::new(ctx);
    if let Some(what) = visit.socket().and_then(splice::unfinished) {
        visit.say(&what);
    }
    0
}

shunt_programs::object!();
