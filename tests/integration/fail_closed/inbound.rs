//! From outside to the proxy's listener.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};

use shunt_tests::{Owner, Responder, deadline::wait_until};
use socket2::Domain;

use super::{enrolled_with, open, take_memory};
use crate::lab::{Lab, PORT};

#[test]
fn without_a_listener_connections_are_refused() {
    let lab = Lab::new();
    let agent = lab.enrolled();
    assert_eq!(lab.inbound(), "refused");
    assert_eq!(agent.errors("proxy_away"), 1);
    assert_eq!(agent.errors("proxy_away_outbound"), 0);
    // The application's own side is refused by the kernel, and so is the proxy that
    // calls its own pod.
    assert_eq!(lab.outbound(), "refused");
    assert_eq!(agent.errors("proxy_away"), 1);
    assert_eq!(agent.errors("proxy_away_outbound"), 1);
    assert_eq!(lab.hairpin(), "refused");
    assert_eq!(agent.errors("proxy_away"), 1);
    assert_eq!(agent.errors("proxy_away_outbound"), 2);
}

/// There is a slot for the first of the proxy's ports, and none for the second.
#[test]
fn a_listener_that_finds_no_room_gets_no_connections() {
    let lab = Lab::new();
    let agent = enrolled_with(&lab, &["LISTENERS=1"]);
    let first = Responder::start(lab.pod.netns(), Owner::PROXY, &[15001]);
    assert_eq!(agent.errors("listener_failed"), 0);

    let _second = Responder::start(lab.pod.netns(), Owner::PROXY, &[15006]);

    assert_eq!(agent.errors("listener_failed"), 1);
    assert_eq!(lab.inbound(), "refused");
    assert!(agent.errors("proxy_away") > 0);
    // Outbound the kernel finds the listener itself.
    assert_eq!(lab.outbound(), "pod:15001");

    // With room it is found: the refused call has the agent look for it.
    drop(first);
    wait_until("the listener to be found", || {
        let seen = lab.inbound();
        assert_ne!(seen, "pod:80", "it went out directly");
        (seen == "pod:15006").then_some(()).ok_or(seen)
    });
}

#[test]
fn a_listener_that_cannot_be_remembered_gets_no_connections() {
    let lab = Lab::new();
    let agent = lab.enrolled();
    let listener = lab.pod.netns().run(|| {
        let listener = open(Domain::IPV4, Owner::PROXY);
        let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 15006));
        listener.bind(&any.into()).expect("a free port");
        take_memory(&listener);
        listener.listen(8).expect("a bound socket");
        listener.set_nonblocking(true).expect("an open socket");
        listener
    });
    assert!(agent.errors("listener_failed") > 0);
    assert_eq!(lab.inbound(), "refused");
    assert!(agent.errors("proxy_away") > 0);

    listener.detach_filter().expect("it has one");

    let called = SocketAddr::from((lab.pod.ip(), PORT));
    wait_until("the listener to be found", || {
        let call = lab.node.netns().run(|| TcpStream::connect(called));
        let _call = call.map_err(|error| error.to_string())?;
        let (taken, _) = listener.accept().expect("it went out directly");
        let local = taken.local_addr().expect("it is open");
        assert_eq!(local.as_socket(), Some(called));
        Ok(())
    });
}

/// A proxy that takes IPv6 only does not get IPv4, and nobody else does.
#[test]
fn a_listener_that_cannot_take_the_packet_gets_no_connections() {
    let lab = Lab::new();
    let agent = lab.enrolled();
    let _listener = lab.pod.netns().run(|| {
        let listener = open(Domain::IPV6, Owner::PROXY);
        listener.set_only_v6(true).expect("an open socket");
        let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 15006));
        listener.bind(&any.into()).expect("a free port");
        listener.listen(8).expect("a bound socket");
        listener
    });
    assert_eq!(lab.inbound(), "refused");
    assert_eq!(agent.errors("assign_failed"), 1);
}
