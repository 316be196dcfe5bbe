//! From the first packet to the accepted socket: what the application asked for
//! is carried over from its socket to the proxy's.
//!
//! Before the SYN leaves, the four-tuple is known and the proxy cannot have seen
//! anything yet, with TCP Fast Open either: that is when it is published. When
//! the proxy's side is established it moves into the accepted socket's own
//! storage, and nothing is left behind.

use aya_ebpf::bindings::{
    BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_RTT_CB,
    BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB,
    BPF_SOCK_OPS_TCP_LISTEN_CB, BPF_TCP_CLOSE, BPF_TCP_SYN_SENT,
};
use shunt_abi::{Asked, Endpoint, ErrorCode, FlowKey, NetnsCookie, PodSettings, flags};

use crate::{
    bind, counters,
    ctx::{Socket, TcpEvent},
    facts::loopback_like,
    listeners,
    maps::{ASKED, FLOWS, FORWARDED, ORIGINAL_DST},
    pods, splice_ends,
};

/// Follows a TCP socket.
#[inline(always)]
pub fn event(event: TcpEvent) {
    let Some(socket) = event.socket() else {
        return;
    };
    match event.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => publish(event, socket),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => {
            // A node without splicing is spared the look.
            if splice_ends::is_on()
                && let Some((netns, settings)) = enrolled(event)
            {
                splice_ends::established(event, socket, netns, settings, true);
            }
        }
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => {
            if let Some((netns, settings)) = enrolled(event) {
                take(event, socket, netns, settings);
                if splice_ends::is_on() {
                    splice_ends::established(event, socket, netns, settings, false);
                }
            }
        }
        BPF_SOCK_OPS_RTT_CB => splice_ends::acknowledged(event, socket),
        BPF_SOCK_OPS_TCP_LISTEN_CB => {
            bind::listens(event, socket);
            listeners::opened(event, socket);
        }
        BPF_SOCK_OPS_STATE_CB => {
            if event.new_state() == BPF_TCP_CLOSE {
                refused(event, socket);
                withdraw(event, socket);
            }
            splice_ends::changes(event, socket);
        }
        _ => {}
    }
}

/// The namespace of the socket and its settings, if it is enrolled.
#[inline(always)]
fn enrolled<'a>(event: TcpEvent) -> Option<(NetnsCookie, &'a PodSettings)> {
    let netns = event.netns();
    Some((netns, pods::settings(netns)?))
}

/// The application's side is about to send its SYN.
#[inline(always)]
fn publish(event: TcpEvent, socket: Socket) {
    let Some(asked) = ASKED.get(socket).and_then(Asked::destination) else {
        return;
    };
    let netns = event.netns();
    let mut key = flow(netns, &event.local(), &event.remote());
    // A handshake that never ends leaves its entry to the end of the socket.
    event.watch(BPF_SOCK_OPS_STATE_CB_FLAG);
    let mut published = FLOWS.insert(&key, asked, 0).is_ok();
    if published && !key.server.is_loopback() {
        turn_to_twin(&mut key);
        published = FLOWS.insert(&key, asked, 0).is_ok();
    }
    if !published {
        counters::failed(netns, ErrorCode::PublishFailed);
    }
}

/// Turns the key to the other place of the proxy's port where a connection may end up.
/// One that is sent to the pod's own address, which is that of its client, ends up at
/// loopback when the pod carries Istio's iptables rules as well: those send the proxy's
/// own there. Others are sent to loopback in the first place, and have no twin.
#[inline(always)]
fn turn_to_twin(key: &mut FlowKey) {
    key.server = if key.server.is_loopback() {
        key.client
    } else {
        loopback_like(&key.server)
    };
}

/// Removes a connection, wherever it may have ended up.
#[inline(always)]
fn remove(mut key: FlowKey) {
    let _ = FLOWS.remove(&key);
    turn_to_twin(&mut key);
    let _ = FLOWS.remove(&key);
}

/// Whether a redirected connection from `client` to `server` is under way.
#[inline(always)]
pub fn is_published(netns: NetnsCookie, client: &Endpoint, server: &Endpoint) -> bool {
    // SAFETY: the element is not looked into.
    unsafe { FLOWS.get(flow(netns, client, server)) }.is_some()
}

/// A connection ends before it was one. On its way to the proxy's port, which is
/// within the pod, that means that nobody listens there.
#[inline(always)]
fn refused(event: TcpEvent, socket: Socket) {
    let redirected = || {
        ASKED
            .get(socket)
            .is_some_and(|asked| asked.destination().is_some())
    };
    if event.old_state() == BPF_TCP_SYN_SENT && redirected() {
        counters::failed(event.netns(), ErrorCode::ProxyAwayOutbound);
    }
}

/// The application's socket is closed.
#[inline(always)]
fn withdraw(event: TcpEvent, socket: Socket) {
    if ASKED.get(socket).is_some() {
        remove(flow(event.netns(), &event.local(), &event.remote()));
    }
}

/// A listener has a new connection.
#[inline(always)]
fn take(event: TcpEvent, socket: Socket, netns: NetnsCookie, settings: &PodSettings) {
    let port = event.local_port();
    let key = flow(netns, &event.remote(), &event.local());
    if settings.has(flags::INTERFACES) {
        take_forwarded(netns, &key, socket);
    }
    if ORIGINAL_DST
        .get(socket)
        .is_some_and(|kept| kept.port != port)
    {
        // Steered here by sk_lookup: its own local address is the answer.
        return;
    }
    if !settings.is_proxy_port(port) {
        return;
    }
    // SAFETY: an element is written once and removed by the two ends of one
    // connection; this is one of them, the other still waits.
    let Some(asked) = (unsafe { FLOWS.get(&key) }).copied() else {
        return;
    };
    if ORIGINAL_DST.set(socket, &asked).is_err() {
        counters::failed(netns, ErrorCode::KeepFailed);
    }
    remove(key);
}

/// The same for a connection from a virtual interface, whose client has no
/// socket here.
#[inline(always)]
fn take_forwarded(netns: NetnsCookie, key: &FlowKey, socket: Socket) {
    // SAFETY: an element is replaced as a whole; one that is given to another
    // connection meanwhile is that of another key.
    let Some(asked) = (unsafe { FORWARDED.get(key) }).copied() else {
        return;
    };
    if ORIGINAL_DST.set(socket, &asked).is_err() {
        counters::failed(netns, ErrorCode::KeepFailed);
    }
    let _ = FORWARDED.remove(key);
}

/// The key of a connection.
#[inline(always)]
pub const fn flow(cookie: NetnsCookie, client: &Endpoint, server: &Endpoint) -> FlowKey {
    FlowKey {
        cookie,
        client: client.addr,
        server: server.addr,
        client_port: client.port,
        server_port: server.port,
        pad: 0,
    }
}
