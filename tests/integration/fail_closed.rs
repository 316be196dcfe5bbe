//! What has to be redirected and cannot be fails: nothing goes out directly.
//!
//! Each error that the programs count (`shunt_abi::ErrorCode`), which way its
//! connection goes, and how it is provoked:
//!
//! | error | the connection | provoked by |
//! |---|---|---|
//! | `remember_failed` | its connect() fails with ENOMEM | no memory for socket storage |
//! | `bind_failed` | its connect() fails | an IPv6-only socket, an IPv4 destination |
//! | `owner_unknown` | is an application's, as iptables has it | an MPTCP subflow, which the kernel opens |
//! | `publish_failed` | reaches the proxy without original destination | its slot taken, `FLOWS` full |
//! | `keep_failed` | reaches the proxy without original destination | no memory for socket storage |
//! | `listener_failed` | inbound it is refused | no memory, and `LISTENERS` full |
//! | `proxy_away` | inbound it is refused | no listener |
//! | `proxy_away_outbound` | outbound it is refused | no listener |
//! | `assign_failed` | inbound it is refused | a listener that takes IPv6 only |
//! | `no_route` | its connect() fails as without redirection | no route |
//!
//! The maps that the agent fills are full when a pod is enrolled: that fails,
//! and changes nothing.

mod enrolling;
mod inbound;
mod outbound;

use std::{iter::repeat_n, net::SocketAddr};

use nix::libc;
use shunt_tests::{Agent, Node, Owner, agent::Place, mesh::ISTIO_DEFAULTS};
use socket2::{Domain, SockFilter, Socket, Type};

use crate::lab::{Lab, PORT};

const OUTSIDE: SocketAddr = SocketAddr::new(Node::OUTSIDE, PORT);

/// An agent some of whose maps are of another size, `NAME=ENTRIES`, and that has
/// enrolled the pod as Istio does.
fn enrolled_with(lab: &Lab, map_limits: &[&str]) -> Agent {
    let agent = agent_with(lab, map_limits);
    agent.enroll(lab.pod.netns(), &ISTIO_DEFAULTS);
    agent
}

fn agent_with(lab: &Lab, map_limits: &[&str]) -> Agent {
    let arguments: Vec<String> = map_limits
        .iter()
        .map(|limit| format!("--map-limit={limit}"))
        .collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    Agent::start_with(Place::new(lab.node.cgroup()), &arguments)
}

/// Takes what a socket has for options and storage (`net.core.optmem_max`) by a filter that
/// lets everything through, until that is taken away ([`Socket::detach_filter`]). Sockets that
/// are accepted from it have the filter, too.
fn take_memory(socket: &Socket) {
    // The kernel makes several instructions of its own of a load, and one of a number.
    let loads = most(|loads| filter(socket, loads, 0));
    let numbers = most(|numbers| filter(socket, loads, numbers));
    assert!(filter(socket, loads, numbers), "it was taken before");
}

/// Gives a socket a filter of so many instructions, in place of another; `false` when it has
/// no memory for it.
fn filter(socket: &Socket, loads: usize, numbers: usize) -> bool {
    /// `BPF_LD | BPF_B | BPF_ABS`: the first byte of a packet.
    const LOAD: u16 = 0x30;
    /// `BPF_LD | BPF_IMM`
    const NUMBER: u16 = 0;
    /// `BPF_RET | BPF_K`: so many bytes of the packet are let through.
    const RETURN: u16 = 6;
    let times = |code, count| repeat_n((code, 0), count);
    let program: Vec<_> = times(LOAD, loads)
        .chain(times(NUMBER, numbers))
        .chain([(RETURN, u32::MAX)])
        .map(|(code, value)| SockFilter::new(code, 0, 0, value))
        .collect();
    // There may be none.
    let _ = socket.detach_filter();
    match socket.attach_filter(&program) {
        Ok(()) => true,
        Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => false,
        Err(error) => panic!("a filter of {loads} loads and {numbers} numbers: {error}"),
    }
}

/// The largest number below 4,000 that is taken, where all smaller ones are.
fn most(is_taken: impl Fn(usize) -> bool) -> usize {
    let (mut taken, mut refused) = (0, 4000);
    while refused - taken > 1 {
        let middle = usize::midpoint(taken, refused);
        if is_taken(middle) {
            taken = middle;
        } else {
            refused = middle;
        }
    }
    taken
}

/// A new TCP socket, opened by `owner`.
fn open(domain: Domain, owner: Owner) -> Socket {
    owner.assume();
    let socket = Socket::new(domain, Type::STREAM, None).expect("a new socket");
    Owner::ROOT.assume();
    socket
}
