//! From the first packet to the accepted socket: what the application asked for
//! is carried over from its socket to the proxy's.
//!
//! Before the SYN leaves, the four-tuple is known and the proxy cannot have seen
//! anything yet, with TCP Fast Open either: that is when it is published. When
//! the proxy's side is established it moves into the accepted socket's own
//! storage, and nothing is left behind.

use aya_ebpf::bindings::{
    BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_HDR_OPT_LEN_CB,
    BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_RTT_CB, BPF_SOCK_OPS_STATE_CB,
    BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_SOCK_OPS_TCP_LISTEN_CB,
    BPF_SOCK_OPS_WRITE_HDR_OPT_CB, BPF_TCP_CLOSE, BPF_TCP_SYN_SENT,
};
use shunt_abi::{Endpoint, ErrorCode, FlowKey, NetnsCookie, OriginalDst, PodSettings, flags};

use crate::{
    bind, counters,
    ctx::{Socket, TcpEvent},
    flows, listeners,
    maps::{ASKED, FORWARDED, ORIGINAL_DST},
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
            // Where nothing can be spliced there is no look at the settings.
            if splice_ends::may_concern(event)
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
        BPF_SOCK_OPS_HDR_OPT_LEN_CB => splice_ends::sends(event, socket),
        BPF_SOCK_OPS_WRITE_HDR_OPT_CB => splice_ends::has_options(event, socket),
        BPF_SOCK_OPS_TCP_LISTEN_CB => {
            bind::listens(event, socket);
            listeners::opened(event, socket);
        }
        BPF_SOCK_OPS_STATE_CB => {
            if event.new_state() == BPF_TCP_CLOSE {
                ends(event, socket);
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
    let Some(asked) = ASKED.get_mut(socket) else {
        return;
    };
    if asked.destination().is_none() {
        return;
    }
    // A handshake that never ends leaves its entry to the end of the socket.
    event.watch(BPF_SOCK_OPS_STATE_CB_FLAG);
    let netns = event.netns();
    let mut key = flow(netns, &event.local(), &event.remote());
    if flows::publish(&mut key, asked).is_err() {
        counters::failed(netns, ErrorCode::PublishFailed);
    }
}

/// Whether a redirected connection from `client` to `server` is under way.
#[inline(always)]
pub fn is_published(netns: NetnsCookie, client: &Endpoint, server: &Endpoint) -> bool {
    flows::is_published(&flow(netns, client, server))
}

/// A socket is about to be closed, by whomever.
#[inline(always)]
fn ends(event: TcpEvent, socket: Socket) {
    let Some(asked) = ASKED.get(socket) else {
        return;
    };
    let netns = event.netns();
    // A connection ends before it was one. On its way to the proxy's port, which is
    // within the pod, that means that nobody listens there.
    if event.old_state() == BPF_TCP_SYN_SENT && asked.destination().is_some() {
        counters::failed(netns, ErrorCode::ProxyAwayOutbound);
    }
    flows::withdraw(&mut flow(netns, &event.local(), &event.remote()), asked);
}

/// A listener has a new connection.
#[inline(always)]
fn take(event: TcpEvent, socket: Socket, netns: NetnsCookie, settings: &PodSettings) {
    let port = event.local_port();
    let mut key = flow(netns, &event.remote(), &event.local());
    if settings.has(flags::INTERFACES) {
        take_forwarded(netns, &key, socket);
    }
    let kept = ORIGINAL_DST.get_mut(socket);
    if kept.as_ref().is_some_and(|kept| kept.port != port) {
        // Steered here by sk_lookup: its own local address is the answer.
        return;
    }
    if !settings.is_proxy_port(port) {
        return;
    }
    let Some(asked) = flows::take(&mut key) else {
        return;
    };
    let asked = OriginalDst::new(&asked);
    if let Some(kept) = kept {
        *kept = asked;
    } else if ORIGINAL_DST.set(socket, &asked).is_err() {
        counters::failed(netns, ErrorCode::KeepFailed);
    }
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
    if ORIGINAL_DST.set(socket, &OriginalDst::new(&asked)).is_err() {
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
