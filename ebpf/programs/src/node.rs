//! The programs of the node: entries only, each with one visible step from
//! what was found out to what the kernel is told.
#![no_std]
#![no_main]
#![expect(unused_crate_dependencies, reason = "the library uses them")]

use aya_ebpf::{
    macros::{cgroup_sock_addr, cgroup_sockopt, sock_ops},
    programs::{SockAddrContext, SockOpsContext, SockoptContext},
};
use shunt_programs::{
    bind,
    connect::{self, Outcome},
    ctx::{AddressCall, FileVisit, OptionCall, PROCEED, TaskFile, TcpEvent, fail_with},
    datagram, handshake, listeners, names,
};

/// bind() of an `AF_INET` socket (Linux 4.17).
#[cgroup_sock_addr(bind4)]
fn shunt_bind4(ctx: SockAddrContext) -> i32 {
    let call = AddressCall::new(ctx.sock_addr);
    bind::bind(call, &call.address4());
    PROCEED
}

/// bind() of an `AF_INET6` socket (Linux 4.17).
#[cgroup_sock_addr(bind6)]
fn shunt_bind6(ctx: SockAddrContext) -> i32 {
    let call = AddressCall::new(ctx.sock_addr);
    bind::bind(call, &call.address6());
    PROCEED
}

/// connect() to an IPv4 address (Linux 4.17).
#[cgroup_sock_addr(connect4)]
fn shunt_connect4(ctx: SockAddrContext) -> i32 {
    let call = AddressCall::new(ctx.sock_addr);
    match connect::connect(call, AddressCall::address4) {
        Outcome::Untouched => PROCEED,
        Outcome::Redirected(to) => call.set_address4(&to),
        Outcome::Refused(errno) => fail_with(errno),
    }
}

/// connect() of an `AF_INET6` socket, to an IPv4-mapped address too (Linux 4.17).
#[cgroup_sock_addr(connect6)]
fn shunt_connect6(ctx: SockAddrContext) -> i32 {
    let call = AddressCall::new(ctx.sock_addr);
    match connect::connect(call, AddressCall::address6) {
        Outcome::Untouched => PROCEED,
        Outcome::Redirected(to) => call.set_address6(&to),
        Outcome::Refused(errno) => fail_with(errno),
    }
}

/// sendto() or sendmsg() of a UDP socket to an IPv4 address (Linux 4.18).
#[cgroup_sock_addr(sendmsg4)]
fn shunt_sendmsg4(ctx: SockAddrContext) -> i32 {
    let call = AddressCall::new(ctx.sock_addr);
    match datagram::send(call, AddressCall::address4) {
        Outcome::Untouched => PROCEED,
        Outcome::Redirected(to) => call.set_address4(&to),
        Outcome::Refused(errno) => fail_with(errno),
    }
}

/// sendto() or sendmsg() of a UDP socket to an IPv6 address (Linux 4.18).
#[cgroup_sock_addr(sendmsg6)]
fn shunt_sendmsg6(ctx: SockAddrContext) -> i32 {
    let call = AddressCall::new(ctx.sock_addr);
    match datagram::send(call, AddressCall::address6) {
        Outcome::Untouched => PROCEED,
        Outcome::Redirected(to) => call.set_address6(&to),
        Outcome::Refused(errno) => fail_with(errno),
    }
}

/// recvfrom() or recvmsg() of an `AF_INET` UDP socket (Linux 5.2).
#[cgroup_sock_addr(recvmsg4)]
fn shunt_recvmsg4(ctx: SockAddrContext) -> i32 {
    let call = AddressCall::new(ctx.sock_addr);
    match datagram::receive(call, call.address4()) {
        Some(server) => call.set_address4(&server),
        None => PROCEED,
    }
}

/// recvfrom() or recvmsg() of an `AF_INET6` UDP socket (Linux 5.2).
#[cgroup_sock_addr(recvmsg6)]
fn shunt_recvmsg6(ctx: SockAddrContext) -> i32 {
    let call = AddressCall::new(ctx.sock_addr);
    match datagram::receive(call, call.address6()) {
        Some(server) => call.set_address6(&server),
        None => PROCEED,
    }
}

/// getpeername() of an `AF_INET` socket (Linux 5.8).
#[cgroup_sock_addr(getpeername4)]
fn shunt_peername4(ctx: SockAddrContext) -> i32 {
    let call = AddressCall::new(ctx.sock_addr);
    match names::peer(call) {
        Some(peer) => call.set_address4(&peer),
        None => PROCEED,
    }
}

/// getpeername() of an `AF_INET6` socket (Linux 5.8).
#[cgroup_sock_addr(getpeername6)]
fn shunt_peername6(ctx: SockAddrContext) -> i32 {
    let call = AddressCall::new(ctx.sock_addr);
    match names::peer(call) {
        Some(peer) => call.set_address6(&peer),
        None => PROCEED,
    }
}

/// getsockopt() after the kernel's answer (Linux 5.3).
#[cgroup_sockopt(getsockopt)]
fn shunt_getsockopt(ctx: SockoptContext) -> i32 {
    names::original_destination(OptionCall::new(ctx.sockopt));
    PROCEED
}

/// The life of a TCP socket (Linux 4.13).
#[sock_ops]
fn shunt_sock_ops(ctx: SockOpsContext) -> u32 {
    handshake::event(TcpEvent::new(ctx.ops));
    PROCEED as u32
}

/// Visits every open file (Linux 5.8).
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_file")]
extern "C" fn shunt_listeners(ctx: *mut TaskFile) -> i32 {
    listeners::visited(FileVisit::new(ctx));
    0
}

shunt_programs::object!();
