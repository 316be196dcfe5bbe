//! Who a socket belongs to, when more than one has it.

use std::os::{
    linux::net::SocketAddrExt,
    unix::net::{SocketAddr as UnixAddr, UnixListener, UnixStream},
};

use nix::unistd::{Gid, Uid, setgid, setgroups, setuid};
use shunt_tests::{Owner, Process, actor, deadline::DEADLINE, leftovers::unique_name, syscall};
use socket2::Socket;

use super::{OUTSIDE, Seen, Sides, call, connect, open, seen};

/// What an actor writes before what it has seen.
const SEEN: &str = "seen: ";

/// Tells the test, and stays until it has heard.
#[expect(clippy::print_stdout, reason = "it is how actors tell their test")]
fn tell(seen: &Seen) {
    let json = serde_json::to_string(seen).expect("plain data");
    println!("\n{SEEN}{json}");
    std::io::stdin()
        .read_line(&mut String::new())
        .expect("the test keeps the other end");
}

fn hear(actor: &Process) -> Seen {
    let line = actor.wait_for_line(SEEN, DEADLINE);
    serde_json::from_str(&line[SEEN.len()..]).expect("an actor tells what it has seen")
}

/// Gives this process, with all its threads, the ids of `owner` for good.
fn become_for_good(owner: Owner, groups: &[Gid]) {
    setgroups(groups).expect("root may");
    setgid(Gid::from_raw(owner.gid)).expect("root may");
    setuid(Uid::from_raw(owner.uid)).expect("root may");
}

/// Runs `act` in a process of its own in each pod, and gives what they tell.
fn played(sides: &Sides, test: &str) -> [Seen; 2] {
    [&sides.rules, &sides.enrolled]
        .map(|side| hear(&actor::start(side.pod.netns(), test, "caller")))
}

/// `iptables -m owner` looks at who opened the socket, not at who has it.
#[test]
fn a_socket_that_is_passed_on_keeps_its_owner() {
    const NAME: &str = "sockets::owners::a_socket_that_is_passed_on_keeps_its_owner";
    if let Some(role) = actor::role() {
        return connect_what_comes(&role);
    }
    let sides = Sides::new();
    for (opener, holder, expected) in [
        (Owner::APP, "1337", Seen::redirected(OUTSIDE)),
        (Owner::PROXY, "1000", Seen::direct(OUTSIDE)),
    ] {
        let found = [&sides.rules, &sides.enrolled].map(|side| {
            let name = unique_name("passing");
            let address = UnixAddr::from_abstract_name(&name).expect("a short name");
            let role = format!("{holder} {name}");
            side.pod.netns().run(|| {
                let listener = UnixListener::bind_addr(&address).expect("a new name");
                let other = actor::start(side.pod.netns(), NAME, &role);
                let (to, _) = listener.accept().expect("the actor connects");
                syscall::pass(&to, open(opener));
                hear(&other)
            })
        });
        assert_eq!(found, [expected.clone(), expected]);
    }
}

/// The other process: `role` is its user id and where the socket comes from.
fn connect_what_comes(role: &str) {
    let (id, name) = role.split_once(' ').expect("an id and a name");
    let id = id.parse().expect("a user id");
    become_for_good(Owner::new(id, id), &[]);
    let address = UnixAddr::from_abstract_name(name).expect("a short name");
    let from = UnixStream::connect_addr(&address).expect("the test listens");
    let socket = super::patient(Socket::from(syscall::receive(&from)));
    connect(&socket, OUTSIDE).expect("somebody answers");
    tell(&seen(&socket));
}

/// A proxy that opens sockets as root, and then drops its rights.
#[test]
fn a_socket_opened_as_root_is_roots_when_its_process_becomes_the_proxy() {
    const NAME: &str =
        "sockets::owners::a_socket_opened_as_root_is_roots_when_its_process_becomes_the_proxy";
    if actor::role().is_some() {
        let socket = open(Owner::ROOT);
        become_for_good(Owner::PROXY, &[]);
        return tell(&call(&socket, OUTSIDE).expect("somebody answers"));
    }
    let expected = Seen::redirected(OUTSIDE);
    assert_eq!(played(&Sides::new(), NAME), [expected.clone(), expected]);
}

#[test]
fn supplementary_groups_do_not_count() {
    const NAME: &str = "sockets::owners::supplementary_groups_do_not_count";
    if actor::role().is_some() {
        become_for_good(Owner::APP, &[Gid::from_raw(Owner::PROXY.gid)]);
        let socket = Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None);
        let socket = super::patient(socket.expect("a new socket"));
        return tell(&call(&socket, OUTSIDE).expect("somebody answers"));
    }
    let expected = Seen::redirected(OUTSIDE);
    assert_eq!(played(&Sides::new(), NAME), [expected.clone(), expected]);
}
