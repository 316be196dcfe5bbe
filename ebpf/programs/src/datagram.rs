//! DNS over UDP sockets that are not connected: questions go to the proxy, and
//! answers seem to come from the server that was asked.

use shunt_abi::{Endpoint, ErrorCode, PodSettings};
use shunt_decide::{Protocol, may_capture};

use crate::{
    connect::Outcome,
    counters,
    ctx::{AddressCall, ENOMEM},
    facts::{self, Path, loopback_like},
    kernel,
    maps::{ASKED, QUESTIONS},
    pods,
};

/// Decides over a datagram that is sent to `asked`.
#[inline(always)]
pub fn send(call: AddressCall, asked: impl FnOnce(AddressCall) -> Endpoint) -> Outcome {
    let netns = call.netns();
    let Some(settings) = pods::settings(netns) else {
        return Outcome::Untouched;
    };
    let asked = asked(call);
    if !may_capture(settings, Protocol::Udp, asked.port) {
        return Outcome::Untouched;
    }
    let mut path = Path::of(call, netns, Protocol::Udp, &asked, false);
    let decision = facts::decide(call, netns, settings, &mut path);
    let Some(port) = decision.verdict.port(settings) else {
        return Outcome::Untouched;
    };
    if let Some(errno) = path.dead_end() {
        counters::failed(netns, ErrorCode::NoRoute);
        return Outcome::Refused(errno);
    }
    if !remember(call, path.asked()) {
        counters::failed(netns, ErrorCode::RememberFailed);
        return Outcome::Refused(ENOMEM);
    }
    Outcome::Redirected(Endpoint::new(loopback_like(&path.facts.destination), port))
}

#[inline(always)]
fn remember(call: AddressCall, server: Endpoint) -> bool {
    let socket = call.socket().socket();
    match QUESTIONS.get_or_zeros(socket) {
        Some(questions) => {
            questions.ask(server, kernel::now());
            true
        }
        None => false,
    }
}

/// Whom an answer that came from `from` seems to come from, when it is one of
/// the proxy to a question that was redirected.
#[inline(always)]
pub fn receive(call: AddressCall, from: Endpoint) -> Option<Endpoint> {
    let settings = pods::settings(call.netns())?;
    if !is_proxys_answer(settings, &from) {
        return None;
    }
    let socket = call.socket();
    if socket.is_connected() {
        return ASKED.get(socket.socket())?.destination().copied();
    }
    let questions = QUESTIONS.get_mut(socket.socket())?;
    Some(questions.answer().unwrap_or(questions.last()))
}

#[inline(always)]
fn is_proxys_answer(settings: &PodSettings, from: &Endpoint) -> bool {
    from.port == settings.dns_port && from.addr.same(&loopback_like(&from.addr))
}
