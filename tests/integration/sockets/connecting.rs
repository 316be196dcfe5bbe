//! The ways to connect a socket, and to connect it again.

use std::{
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::fd::AsFd,
};

use nix::{
    errno::Errno,
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{setsockopt, sockopt},
};
use shunt_tests::{
    Node, Owner,
    syscall::{disconnect, option},
    uring,
};
use socket2::Socket;

use super::{
    FAR_OUTSIDE, LOOPBACK, OUTSIDE, OWN, Seen, Sides, address, call, connect, errno, open,
    owned_by, patient, seen,
};

/// The socket asks anew each time, and nobody remembers what it asked before.
#[test]
fn a_socket_that_is_disconnected_can_be_connected_elsewhere() {
    let sides = Sides::new();
    let found = sides.ask(|_| {
        let socket = open(Owner::APP);
        [OUTSIDE, FAR_OUTSIDE, OWN, OUTSIDE].map(|to| {
            let seen = call(&socket, to);
            errno(disconnect(&socket)).expect("a TCP socket can be disconnected");
            (seen, address(socket.peer_addr()))
        })
    });
    let none = Err(Errno::ENOTCONN);
    found.assert_both(&[
        (Ok(Seen::redirected(OUTSIDE)), none),
        (Ok(Seen::redirected(FAR_OUTSIDE)), none),
        (Ok(Seen::inside(OWN)), none),
        (Ok(Seen::redirected(OUTSIDE)), none),
    ]);
}

/// The next connect() chooses a source address anew. Until then a socket that
/// was redirected still shows the former one: a program can bind a socket, and
/// nobody can take that back.
#[test]
fn a_socket_that_is_disconnected_gets_another_source_address() {
    let sides = Sides::new();
    let found = sides.ask(|_| {
        let socket = open(Owner::APP);
        let first = call(&socket, OUTSIDE);
        errno(disconnect(&socket)).expect("a TCP socket can be disconnected");
        let between = address(socket.local_addr()).map(|addr| addr.ip());
        (first, between, call(&socket, LOOPBACK))
    });
    let seen = |between: IpAddr| {
        (
            Ok(Seen::redirected(OUTSIDE)),
            Ok(between),
            Ok(Seen::inside(LOOPBACK)),
        )
    };
    found.assert_each(&seen(Ipv4Addr::UNSPECIFIED.into()), &seen(Node::FIRST_POD));
}

#[test]
fn a_socket_that_was_refused_can_be_connected_elsewhere() {
    let sides = Sides::without_proxy();
    let found = sides.ask(|side| {
        let socket = open(Owner::APP);
        let refused = [OUTSIDE, FAR_OUTSIDE].map(|to| connect(&socket, to));
        let peer = address(socket.peer_addr());
        let direct = call(&socket, OWN);

        let other = open(Owner::APP);
        let refused_again = connect(&other, OUTSIDE);
        let _proxy = side.start_proxy();
        let redirected = call(&other, FAR_OUTSIDE);
        (refused, peer, direct, refused_again, redirected)
    });
    let refused = Err(Errno::ECONNREFUSED);
    found.assert_both(&(
        [refused; 2],
        Err(Errno::ENOTCONN),
        Ok(Seen::inside(OWN)),
        refused,
        Ok(Seen::redirected(FAR_OUTSIDE)),
    ));
}

/// As above, for an address at which the kernel has another source.
#[test]
fn a_socket_that_was_refused_has_no_source_address_left() {
    let sides = Sides::without_proxy();
    let found = sides.ask(|_| {
        let socket = open(Owner::APP);
        (connect(&socket, OUTSIDE), call(&socket, LOOPBACK))
    });
    found.assert_both(&(Err(Errno::ECONNREFUSED), Ok(Seen::inside(LOOPBACK))));
}

/// What happened to a socket that does not wait.
#[derive(Debug, PartialEq)]
struct NotWaiting {
    first: Result<(), Errno>,
    /// SO_ERROR after the first poll.
    error: Option<Errno>,
    again: [Result<(), Errno>; 2],
    peer: Result<SocketAddr, Errno>,
}

fn connect_without_waiting(to: SocketAddr) -> (NotWaiting, Socket) {
    let socket = open(Owner::APP);
    socket.set_nonblocking(true).expect("an open socket");
    let first = connect(&socket, to);
    let mut ready = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
    poll(&mut ready, PollTimeout::from(20_000_u16)).expect("poll");
    let error = socket.take_error().expect("SO_ERROR");
    let seen = NotWaiting {
        first,
        error: error.map(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0))),
        again: [(); 2].map(|()| connect(&socket, to)),
        peer: address(socket.peer_addr()),
    };
    socket.set_nonblocking(false).expect("an open socket");
    (seen, socket)
}

#[test]
fn a_socket_that_does_not_wait_is_redirected() {
    let sides = Sides::new();
    let found = sides.ask(|_| {
        let (steps, socket) = connect_without_waiting(OUTSIDE);
        (steps, seen(&socket))
    });
    let steps = NotWaiting {
        first: Err(Errno::EINPROGRESS),
        error: None,
        again: [Ok(()), Err(Errno::EISCONN)],
        peer: Ok(OUTSIDE),
    };
    found.assert_both(&(steps, Seen::redirected(OUTSIDE)));
}

#[test]
fn a_socket_that_does_not_wait_learns_that_it_is_refused() {
    let sides = Sides::without_proxy();
    let found = sides.ask(|_| connect_without_waiting(OUTSIDE).0);
    found.assert_both(&NotWaiting {
        first: Err(Errno::EINPROGRESS),
        error: Some(Errno::ECONNREFUSED),
        // Asked for its error it has none left, and tells that it gave up;
        // then it tries anew.
        again: [Err(Errno::ECONNABORTED), Err(Errno::EINPROGRESS)],
        peer: Err(Errno::ENOTCONN),
    });
}

/// Fast Open on both ends: `0x1 | 0x2`, and `0x400` for listeners that do not
/// ask for it themselves.
const FAST_OPEN: (&str, &str) = ("net.ipv4.tcp_fastopen", "1027");

/// Two pods in which Fast Open is on, also for the proxy.
fn fast_open_sides() -> Sides {
    let sides = Sides::without_proxy();
    for side in [&sides.rules, &sides.enrolled] {
        side.sysctl(FAST_OPEN.0, FAST_OPEN.1);
    }
    Sides {
        rules: sides.rules.with_proxy(),
        enrolled: sides.enrolled.with_proxy(),
    }
}

/// Whether what the client sent with its SYN was taken (`tcpi_options`).
fn sent_data_with_syn(socket: &Socket) -> bool {
    const OFFSET_OF_OPTIONS: usize = 5;
    const TCPI_OPT_SYN_DATA: u8 = 32;
    let info = option(socket, libc::IPPROTO_TCP, libc::TCP_INFO, 104);
    info.result.expect("every TCP socket has it");
    info.buffer[OFFSET_OF_OPTIONS] & TCPI_OPT_SYN_DATA != 0
}

const EARLY: &[u8] = b"early";

/// What comes back of [`EARLY`]: a responder echoes.
fn echo(mut socket: &Socket) -> Vec<u8> {
    let mut echo = vec![0; EARLY.len()];
    socket.read_exact(&mut echo).expect("a responder echoes");
    echo
}

/// The first connection asks for a cookie, the second sends its data with the
/// SYN: the original destination has to be known before that.
#[test]
fn data_in_the_syn_goes_to_the_proxy_by_msg_fastopen() {
    let sides = fast_open_sides();
    let found = sides.ask(|_| {
        [(); 2].map(|()| {
            let socket = open(Owner::APP);
            let sent = socket.send_to_with_flags(EARLY, &OUTSIDE.into(), libc::MSG_FASTOPEN);
            assert_eq!(errno(sent), Ok(EARLY.len()));
            let seen = seen(&socket);
            (seen, echo(&socket), sent_data_with_syn(&socket))
        })
    });
    found.assert_both(&[
        (Seen::redirected(OUTSIDE), EARLY.to_vec(), false),
        (Seen::redirected(OUTSIDE), EARLY.to_vec(), true),
    ]);
}

/// Here connect() answers at once, and the SYN leaves with the first write.
#[test]
fn data_in_the_syn_goes_to_the_proxy_by_tcp_fastopen_connect() {
    let sides = fast_open_sides();
    let found = sides.ask(|_| {
        [(); 2].map(|()| {
            let socket = open(Owner::APP);
            setsockopt(&socket, sockopt::TcpFastOpenConnect, &true).expect("a TCP socket");
            connect(&socket, OUTSIDE).expect("the proxy listens");
            let peer = address(socket.peer_addr());
            (&socket).write_all(EARLY).expect("it is connected");
            let seen = seen(&socket);
            (seen, peer, echo(&socket), sent_data_with_syn(&socket))
        })
    });
    let seen = Seen::redirected(OUTSIDE);
    found.assert_both(&[
        (seen.clone(), Ok(OUTSIDE), EARLY.to_vec(), false),
        (seen, Err(Errno::ENOTCONN), EARLY.to_vec(), true),
    ]);
}

/// Fast Open does not step around a proxy that is away.
#[test]
fn data_in_the_syn_is_refused_while_no_proxy_listens() {
    let sides = Sides::without_proxy();
    for side in [&sides.rules, &sides.enrolled] {
        side.sysctl(FAST_OPEN.0, FAST_OPEN.1);
    }
    let found = sides.ask(|side| {
        let socket = open(Owner::APP);
        let sent = socket.send_to_with_flags(EARLY, &OUTSIDE.into(), libc::MSG_FASTOPEN);
        (errno(sent), side.outside.accepted())
    });
    found.assert_both(&(Err(Errno::ECONNREFUSED), 0));
}

#[test]
fn io_uring_connects_as_connect_does() {
    let sides = Sides::new();
    let found = sides.ask(|_| {
        let by_uring = |owner: Owner, to: SocketAddr| {
            let open = || uring::open().expect("io_uring opens sockets");
            let socket = patient(owned_by(owner, open));
            uring::connect(&socket, to).expect("somebody answers");
            seen(&socket)
        };
        let opened_before = open(Owner::APP);
        uring::connect(&opened_before, FAR_OUTSIDE).expect("somebody answers");
        (
            by_uring(Owner::APP, OUTSIDE),
            by_uring(Owner::PROXY, OUTSIDE),
            by_uring(Owner::APP, OWN),
            seen(&opened_before),
        )
    });
    found.assert_both(&(
        Seen::redirected(OUTSIDE),
        Seen::direct(OUTSIDE),
        Seen::inside(OWN),
        Seen::redirected(FAR_OUTSIDE),
    ));
}

#[test]
fn io_uring_learns_that_it_is_refused() {
    let sides = Sides::without_proxy();
    let found = sides.ask(|_| errno(uring::connect(&open(Owner::APP), OUTSIDE)));
    found.assert_both(&Err(Errno::ECONNREFUSED));
}

/// A socket that is older than the redirection is redirected by its next
/// connect(); a connection that is open already stays what it is.
#[test]
fn a_socket_opened_before_the_redirection_is_redirected_after_it() {
    let sides = Sides::plain();
    let open_before = [Owner::APP, Owner::PROXY];
    let before = sides.ask(|_| {
        let connected = open(Owner::APP);
        connect(&connected, OUTSIDE).expect("the host outside listens");
        (open_before.map(open), connected)
    });
    sides.rules.redirect();
    sides.enrolled.redirect();
    let _proxies = [&sides.rules, &sides.enrolled].map(super::Side::start_proxy);

    let found = [before.rules, before.enrolled].map(|([app, proxy], connected)| {
        let open_still = seen(&connected);
        errno(disconnect(&connected)).expect("a TCP socket can be disconnected");
        [
            call(&app, OUTSIDE),
            call(&proxy, OUTSIDE),
            Ok(open_still),
            call(&connected, OUTSIDE),
        ]
    });
    let expected = [
        Ok(Seen::redirected(OUTSIDE)),
        Ok(Seen::direct(OUTSIDE)),
        Ok(Seen::direct(OUTSIDE)),
        Ok(Seen::redirected(OUTSIDE)),
    ];
    assert_eq!(found, [expected.clone(), expected]);
}

/// What a socket asked for while its pod was enrolled is forgotten when it is
/// connected anew after the enrolment has ended.
#[test]
fn a_socket_that_was_redirected_is_as_any_other_after_the_enrolment() {
    let sides = Sides::new();
    let side = &sides.enrolled;
    let socket = side.pod.netns().run(|| {
        let socket = open(Owner::APP);
        assert_eq!(call(&socket, OUTSIDE), Ok(Seen::redirected(OUTSIDE)));
        errno(disconnect(&socket)).expect("a TCP socket can be disconnected");
        socket
    });
    let super::Redirection::Agent(agent) = &side.redirection else {
        unreachable!("this side has an agent");
    };
    agent.unenroll(side.pod.netns());
    assert_eq!(call(&socket, FAR_OUTSIDE), Ok(Seen::direct(FAR_OUTSIDE)));
}
