//! The programs of one pod: attached to its network namespace, and to its virtual
//! interfaces.
#![no_std]
#![no_main]
#![expect(unused_crate_dependencies, reason = "the library uses them")]

use aya_ebpf::{
    bindings::sk_action::{SK_DROP, SK_PASS},
    macros::{classifier, sk_lookup},
    programs::{SkLookupContext, TcContext},
};
use shunt_programs::{
    ctx::{Arrival, Frame},
    forward::{self, Fate},
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

/// `TC_ACT_UNSPEC`, `TCX_NEXT`: the next program has its say, or else it goes on.
const GO_ON: i32 = -1;
/// `TC_ACT_SHOT`, `TCX_DROP`
const DROP: i32 = 2;

/// A packet comes in through a virtual interface (Linux 6.6, as a link).
#[classifier]
fn shunt_arrives(ctx: TcContext) -> i32 {
    match forward::arrives(Frame::new(ctx.skb.skb)) {
        Fate::Untouched | Fate::Redirected => GO_ON,
        Fate::Dropped => DROP,
    }
}

/// A packet goes out through a virtual interface (Linux 6.6, as a link).
#[classifier]
fn shunt_leaves(ctx: TcContext) -> i32 {
    match forward::leaves(Frame::new(ctx.skb.skb)) {
        Fate::Untouched | Fate::Redirected => GO_ON,
        Fate::Dropped => DROP,
    }
}

shunt_programs::object!();
