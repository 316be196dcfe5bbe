//! From the application's connect() to the proxy's accept().

use std::{
    collections::BTreeMap,
    io,
    net::{Ipv4Addr, SocketAddr},
};

use nix::errno::Errno;
use shunt_tests::{
    Owner, bpf,
    deadline::{DEADLINE, wait_until},
};
use socket2::{Domain, SockAddr, Socket};

use super::{OUTSIDE, enrolled_with, open, take_memory};
use crate::lab::{Lab, PORT};

/// A proxy with room for one connection that it has not accepted: the kernel
/// drops the SYN of the next, whose client sends it again a second later.
struct BusyProxy {
    listener: Socket,
    /// The connection that takes up the room.
    _first: Socket,
}

impl BusyProxy {
    fn start(lab: &Lab) -> Self {
        Self::with(lab, listener(lab, 0, |_| {}))
    }

    fn with(lab: &Lab, listener: Socket) -> Self {
        let first = app(lab);
        first.connect(&OUTSIDE.into()).expect("the proxy has room");
        Self {
            listener,
            _first: first,
        }
    }

    /// Begins to accept, and gives the answer to SO_ORIGINAL_DST on each
    /// accepted socket after the first, by the client that it belongs to.
    fn accept(&self, clients: &[Socket]) -> Vec<Result<SocketAddr, Errno>> {
        self.listener.listen(4096).expect("it listens already");
        let accepted: Vec<_> = (0..=clients.len()).map(|_| self.accept_one()).collect();
        let told = clients.iter().map(|client| {
            let name = client.local_addr().expect("it is connected");
            let found = accepted
                .iter()
                .find(|(_, peer)| peer.as_socket() == name.as_socket());
            let (socket, _) = found.expect("each was accepted");
            original_dst(socket)
        });
        told.collect()
    }

    fn accept_one(&self) -> (Socket, SockAddr) {
        loop {
            match self.listener.accept() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                accepted => break accepted.expect("a client is waiting"),
            }
        }
    }
}

fn listener(lab: &Lab, backlog: i32, before: fn(&Socket)) -> Socket {
    lab.pod.netns().run(|| {
        let listener = open(Domain::IPV4, Owner::PROXY);
        let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 15001));
        listener.bind(&any.into()).expect("a free port");
        before(&listener);
        listener.listen(backlog).expect("a bound socket");
        // accept() waits as long as a read may.
        listener
            .set_read_timeout(Some(DEADLINE))
            .expect("an open socket");
        listener
    })
}

/// A socket of the application.
fn app(lab: &Lab) -> Socket {
    lab.pod.netns().run(|| open(Domain::IPV4, Owner::APP))
}

/// The application begins to connect, and does not wait.
fn begin(lab: &Lab, to: SocketAddr) -> Socket {
    begin_with(app(lab), to)
}

/// The same with this socket.
fn begin_with(socket: Socket, to: SocketAddr) -> Socket {
    socket.set_nonblocking(true).expect("an open socket");
    let begun = errno_of(socket.connect(&to.into()));
    assert_eq!(begun, Some(Errno::EINPROGRESS));
    socket
}

fn original_dst(socket: &Socket) -> Result<SocketAddr, Errno> {
    match socket.original_dst_v4() {
        Ok(addr) => Ok(addr.as_socket().expect("an IPv4 address")),
        // Without connection tracking there is no such option, with it no destination.
        Err(error) if errno(&error) == Errno::ENOPROTOOPT => Err(Errno::ENOENT),
        Err(error) => Err(errno(&error)),
    }
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(0))
}

fn errno_of<T>(result: io::Result<T>) -> Option<Errno> {
    result.err().map(|error| errno(&error))
}

/// The kernel's own answer on a socket that was not redirected: a proxy that
/// asks gets no destination, and has nowhere to send the connection.
const NO_DESTINATION: Result<SocketAddr, Errno> = Err(Errno::ENOENT);

#[test]
fn a_handshake_that_finds_no_room_reaches_the_proxy_without_a_destination() {
    let lab = Lab::new();
    let agent = enrolled_with(&lab, &["FLOWS=1", "FLOW_SLOTS=1"]);
    let proxy = BusyProxy::start(&lab);
    // One has the entry, and one the slot, if it is its own.
    let mut held = vec![begin(&lab, OUTSIDE)];
    assert_eq!(agent.errors("publish_failed"), 0);

    while agent.errors("publish_failed") == 0 {
        assert!(held.len() < 3, "there is room for two at most");
        held.push(begin(&lab, OUTSIDE));
    }

    let told = proxy.accept(&held);
    let (one_too_many, others) = told.split_last().expect("there are some");
    assert_eq!(others, vec![Ok(OUTSIDE); others.len()]);
    assert_eq!(*one_too_many, NO_DESTINATION);
    assert_eq!(lab.outside().accepted(), 0);

    // There is room again.
    let next = begin(&lab, OUTSIDE);
    let (socket, _) = proxy.accept_one();
    assert_eq!(original_dst(&socket), Ok(OUTSIDE));
    drop(next);
}

/// More of them than there are slots: some share one, and are kept apart all the same, when
/// they go on and when they are given up.
#[test]
fn handshakes_that_share_a_slot_reach_the_proxy_each_with_its_destination() {
    const MANY: u16 = 300;
    let lab = Lab::new();
    let agent = enrolled_with(&lab, &[]);
    let proxy = BusyProxy::start(&lab);
    let entries = || bpf::entries_by_map(&agent.status());
    let asked: Vec<_> = (0..MANY)
        .map(|number| SocketAddr::new(OUTSIDE.ip(), 1000 + number))
        .collect();

    let mut held: Vec<_> = asked.iter().map(|to| begin(&lab, *to)).collect();

    let all = entries();
    assert_eq!(bpf::under_way(&all), usize::from(MANY));
    assert!(all["FLOWS"] > 0 && all["FLOW_SLOTS"] > 0, "{all:?}");
    let kept = usize::from(MANY / 3);
    drop(held.split_off(kept));
    become_under_way(kept, entries);
    let told = proxy.accept(&held);
    let expected: Vec<_> = asked.iter().take(kept).copied().map(Ok).collect();
    assert_eq!(told, expected);
    assert_eq!(bpf::under_way(&entries()), 0);
    assert_eq!(agent.errors("publish_failed"), 0);
}

/// Waits until so many connections are under way. Sockets that were closed are gone only when
/// no child of another test, on its way from fork to exec, has them.
fn become_under_way(count: usize, entries: impl Fn() -> BTreeMap<String, usize>) {
    wait_until("closed sockets to be gone", || {
        let now = bpf::under_way(&entries());
        (now == count)
            .then_some(())
            .ok_or_else(|| format!("{now} of {count}"))
    });
}

/// Nothing leaves a slot taken, as far as is known. If something did, the next connection
/// from the same port to the same place would find it.
#[test]
fn what_is_left_in_a_slot_is_not_the_answer_for_the_next() {
    let lab = Lab::new();
    let agent = enrolled_with(&lab, &[]);
    let proxy = BusyProxy::start(&lab);
    let from_port = |to| {
        let socket = app(&lab);
        let own = SocketAddr::new(lab.pod.ip(), 17_000);
        socket.bind(&own.into()).expect("nobody else has it");
        begin_with(socket, to)
    };
    let former = from_port(SocketAddr::new(OUTSIDE.ip(), 1));
    let slot = bpf::UsedSlot::only(&agent.status());
    drop(former);
    become_under_way(0, || bpf::entries_by_map(&agent.status()));
    slot.put_back();

    let next = from_port(OUTSIDE);

    assert_eq!(proxy.accept(&[next]), [Ok(OUTSIDE)]);
    assert_eq!(bpf::under_way(&bpf::entries_by_map(&agent.status())), 0);
}

#[test]
fn a_destination_that_cannot_be_kept_is_not_known_to_the_proxy() {
    let lab = Lab::new();
    let agent = enrolled_with(&lab, &[]);
    // A listener with a place for it would leave it to its sockets.
    let listener = listener(&lab, 0, take_memory);
    assert!(agent.errors("listener_failed") > 0);
    let proxy = BusyProxy::with(&lab, listener);
    let held = begin(&lab, OUTSIDE);

    assert_eq!(proxy.accept(&[held]), [NO_DESTINATION]);
    // That of the first connection neither.
    assert_eq!(agent.errors("keep_failed"), 2);
    assert_eq!(lab.outside().accepted(), 0);
}

#[test]
fn a_destination_that_cannot_be_remembered_is_not_connected_to() {
    let lab = Lab::new();
    let agent = enrolled_with(&lab, &[]);
    let _proxy = lab.proxy();
    let socket = app(&lab);
    take_memory(&socket);

    let failed = errno_of(socket.connect(&OUTSIDE.into()));

    assert_eq!(failed, Some(Errno::ENOMEM));
    assert_eq!(agent.errors("remember_failed"), 1);
    assert_eq!(lab.outside().accepted(), 0);
    // A direct connection needs none, and this one has it again.
    let own = SocketAddr::from((lab.pod.ip(), PORT));
    let direct = app(&lab);
    take_memory(&direct);
    assert_eq!(errno_of(direct.connect(&own.into())), None);
    socket.detach_filter().expect("it has one");
    assert_eq!(errno_of(socket.connect(&OUTSIDE.into())), None);
    assert_eq!(lab.outside().accepted(), 0);
}

/// The proxy is not asked to find a way where the kernel has none.
#[test]
fn a_destination_without_a_route_is_not_reached() {
    let lab = Lab::new();
    let _proxy = lab.proxy();
    lab.pod.netns().ip("route del default\n");
    let without = errno_of(app(&lab).connect(&OUTSIDE.into()));
    let agent = lab.enrolled();

    let with = errno_of(app(&lab).connect(&OUTSIDE.into()));

    assert_eq!((without, with), (Some(Errno::ENETUNREACH), without));
    assert_eq!(agent.errors("no_route"), 1);
}

/// A route may say that there is no way, and with which error. With redirection
/// the error is always the same.
#[test]
fn a_destination_with_a_route_that_refuses_is_not_reached() {
    for (kind, expected) in [
        ("unreachable", Errno::EHOSTUNREACH),
        ("prohibit", Errno::EACCES),
        ("blackhole", Errno::EINVAL),
    ] {
        let lab = Lab::new();
        let _proxy = lab.proxy();
        let route = format!("route add {kind} {}/32\n", OUTSIDE.ip());
        lab.pod.netns().ip(&route);
        let without = errno_of(app(&lab).connect(&OUTSIDE.into()));
        let agent = lab.enrolled();

        let with = errno_of(app(&lab).connect(&OUTSIDE.into()));

        assert_eq!(without, Some(expected), "{kind}");
        assert_eq!(with, Some(Errno::ENETUNREACH), "{kind}");
        assert_eq!(agent.errors("no_route"), 1, "{kind}");
    }
}

/// The source address of an IPv4 route, for a socket that takes none.
#[test]
fn a_socket_that_cannot_be_bound_is_not_connected() {
    let lab = Lab::new();
    let _proxy = lab.proxy();
    let agent = lab.enrolled();
    let socket = lab.pod.netns().run(|| open(Domain::IPV6, Owner::APP));
    socket.set_only_v6(true).expect("an open socket");
    let mapped = Ipv4Addr::new(198, 51, 100, 7).to_ipv6_mapped();

    let failed = errno_of(socket.connect(&SocketAddr::from((mapped, PORT)).into()));

    assert!(failed.is_some());
    assert_eq!(agent.errors("bind_failed"), 1);
    assert_eq!(lab.outside().accepted(), 0);
}

#[test]
fn an_agent_that_is_killed_takes_its_redirection_with_it() {
    let lab = Lab::new();
    let _proxy = lab.proxy();
    let agent = lab.enrolled();
    lab.assert_redirected();
    let _place = agent.kill();
    // The kernel detaches programs some time after their last user is gone.
    wait_until("the redirection to end", || {
        let seen = lab.outbound();
        (seen == "node:80").then_some(()).ok_or(seen)
    });
    wait_until("the redirection to end inbound, too", || {
        let seen = lab.inbound();
        (seen == "pod:80").then_some(()).ok_or(seen)
    });
    lab.assert_direct();
}
