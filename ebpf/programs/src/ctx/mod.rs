//! The contexts that the kernel hands to a program, read field by field.
//!
//! Every access is volatile and of the field's own width: left to itself the
//! compiler merges neighbouring accesses or computes addresses first, and the
//! verifier then says "invalid bpf_context access" or "pointer arithmetic on
//! sock prohibited". Addresses come out as [`Addr`], ports in host byte order.

use core::ffi::c_void;

use aya_ebpf::helpers::generated::bpf_setsockopt;
use shunt_abi::Addr;

macro_rules! read {
    ($ptr:expr, $($field:tt)+) => {
        // SAFETY: the pointer is a context or a socket that the kernel gave to
        // this run of the program; the verifier checks offset and width.
        unsafe { core::ptr::read_volatile(&raw const (*$ptr).$($field)+) }
    };
}

macro_rules! write {
    ($ptr:expr, $field:ident $([$i:literal])?, $value:expr) => {{
        let value = $value;
        // SAFETY: as for reads; the verifier knows which fields can be written.
        unsafe { core::ptr::write_volatile(&raw mut (*$ptr).$field $([$i])?, value) }
    }};
}

/// Four words, each read on its own.
macro_rules! read_addr6 {
    ($ptr:expr, $($field:tt)+) => {
        shunt_abi::Addr::from_v6([
            read!($ptr, $($field)+[0]),
            read!($ptr, $($field)+[1]),
            read!($ptr, $($field)+[2]),
            read!($ptr, $($field)+[3]),
        ])
    };
}

/// The one of two addresses that the context's family means.
macro_rules! read_addr {
    ($ptr:expr, $v4:ident, $v6:ident) => {
        $crate::ctx::of_family(
            read!($ptr, family),
            read!($ptr, $v4),
            read_addr6!($ptr, $v6),
        )
    };
}

mod address_call;
mod arrival;
mod frame;
mod option_call;
mod outgoing;
mod sockaddr;
mod socket;
mod tcp_event;
mod visits;

pub use address_call::{AddressCall, fail_with};
pub use arrival::Arrival;
pub use frame::{Checksum, Frame};
pub use option_call::OptionCall;
pub use outgoing::Outgoing;
pub use sockaddr::{SockAddr4, SockAddr6};
pub use socket::{FullSocket, Socket};
pub use tcp_event::TcpEvent;
pub use visits::{FileVisit, Member, MemberVisit, TaskFile};

/// `AF_INET`
pub const AF_INET: u32 = 2;
/// `AF_INET6`
pub const AF_INET6: u32 = 10;
/// `SOL_SOCKET`
const SOL_SOCKET: i32 = 1;
/// `SO_REUSEADDR`
const SO_REUSEADDR: i32 = 2;
/// `IPPROTO_TCP`
pub const TCP: u32 = 6;
/// `TCP_WINDOW_CLAMP`
const TCP_WINDOW_CLAMP: i32 = 10;

/// What a `cgroup` program returns to let the call go on.
pub const PROCEED: i32 = 1;

/// No memory.
pub const ENOMEM: i32 = 12;
/// No way from that source.
pub const EINVAL: i32 = 22;
/// Not an address of the namespace.
pub const EADDRNOTAVAIL: i32 = 99;
/// No route.
pub const ENETUNREACH: i32 = 101;

/// The one of two addresses that a family means. Both are read beforehand: of
/// two branches that each end in a read the compiler makes one read at a
/// computed place, which the verifier forbids.
#[inline(always)]
const fn of_family(family: u32, v4: u32, v6: Addr) -> Addr {
    if family == AF_INET {
        Addr::from_v4(v4)
    } else {
        v6
    }
}

/// A port as the contexts have it: network byte order in the low half.
#[inline(always)]
const fn port_from_be(field: u32) -> u16 {
    u16::from_be(field as u16)
}

/// Sets an option of the socket of a context, level and name; where the kernel does not let
/// a program it stays.
///
/// # Safety
///
/// `ctx` is the context of this very run, and the option an `int`.
#[inline(always)]
unsafe fn set_option(ctx: *mut c_void, (level, name): (i32, i32), value: &i32) {
    let from = core::ptr::from_ref(value).cast_mut().cast();
    let size = size_of::<i32>() as i32;
    // SAFETY: the caller's context, and an option of that size, which is only read.
    let _ = unsafe { bpf_setsockopt(ctx, level, name, from, size) };
}

/// A helper of the kernel did not do what it was asked.
#[derive(Clone, Copy, Debug)]
pub struct HelperFailed;
