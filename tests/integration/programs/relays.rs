//! Programs that copy from one connection to another: between two of them lies
//! the mesh, at the ends are programs that notice when anything is lost.
//!
//! ```text
//! client → relay →│ Envoy → Envoy │→ relay → server
//! ```

use std::{
    fs,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::unix::net::UnixStream,
    process::Command,
};

use shunt_tests::{Process, command::output_of, leftovers::temp_dir};

use super::{
    Host, Least, PORT, Spliced,
    half_close::{self, BYTES, CONNECTIONS},
    in_every_mode,
};

/// Where the first relay listens, and behind the second the server. Inside of a
/// pod nothing is redirected.
const LOCAL: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8081);

/// A relay in each pod, started by `start`; `check` looks at them afterwards.
fn relays(
    start: impl Fn(&Host, SocketAddr, SocketAddr) -> Process,
    check: impl Fn(&Host, &Process),
) {
    in_every_mode(
        Least {
            connections: CONNECTIONS,
            bytes: BYTES,
            spliced: Spliced::AtLast,
        },
        |world| {
            let server = half_close::serve(&world.server, LOCAL.port());
            let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT));
            let relays = [
                (&world.client, start(&world.client, LOCAL, world.address())),
                (&world.server, start(&world.server, any, LOCAL)),
            ];
            let seen = half_close::ask(&world.client, LOCAL, &server);
            for (host, relay) in &relays {
                check(host, relay);
            }
            seen
        },
    );
}

#[test]
fn haproxy_with_splice_auto() {
    let start = |host: &Host, listen: SocketAddr, connect: SocketAddr| {
        let config = include_str!("../../fixtures/haproxy.cfg")
            .replace("LISTEN", &listen.to_string())
            .replace("CONNECT", &connect.to_string());
        host.write("haproxy.cfg", config);
        host.serve(listen.port(), &["haproxy", "-db", "-f", "haproxy.cfg"])
    };
    relays(start, |host, _| {
        let mut stats = UnixStream::connect(host.path("stats.sock")).expect("haproxy answers");
        stats.write_all(b"show info\n").expect("haproxy answers");
        let mut said = String::new();
        stats.read_to_string(&mut said).expect("haproxy answers");
        let spliced = said
            .lines()
            // The typing error is haproxy's.
            .find_map(|line| line.strip_prefix("TotalSplicdedBytesOut: "))
            .unwrap_or_else(|| panic!("haproxy does not count: {said}"));
        assert_ne!(spliced, "0", "haproxy does not use splice(2)");
    });
}

#[test]
fn gos_io_copy() {
    let directory = temp_dir("go");
    let source = directory.path().join("relay.go");
    let program = directory.path().join("relay");
    fs::write(&source, include_str!("../../fixtures/relay.go")).expect("a new file");
    output_of(
        Command::new("go")
            .args(["build", "-o"])
            .args([&program, &source])
            .env("GOCACHE", directory.path().join("cache"))
            .env("GO111MODULE", "off")
            .current_dir(directory.path()),
    );
    let start = |host: &Host, listen: SocketAddr, connect: SocketAddr| {
        host.copy_program(&program, "relay");
        let (listen_on, connect) = (listen.to_string(), connect.to_string());
        host.serve(listen.port(), &["./relay", &listen_on, &connect])
    };
    relays(start, |_, relay| {
        assert_eq!(relay.output(), "", "the relay complains");
        // It keeps the pipes for the next splice(2).
        let files = fs::read_dir(format!("/proc/{}/fd", relay.pid())).expect("it runs");
        let pipes = files
            .flatten()
            .filter(|file| file.file_name().len() > 1 || file.file_name() > *"2")
            .filter_map(|file| fs::read_link(file.path()).ok())
            .filter(|target| target.to_string_lossy().starts_with("pipe:"))
            .count();
        assert!(pipes > 0, "the relay does not use splice(2)");
    });
}

#[test]
fn socat_between() {
    let start = |host: &Host, listen: SocketAddr, connect: SocketAddr| {
        let from = format!("TCP-LISTEN:{},bind={},fork", listen.port(), listen.ip());
        let to = format!("TCP:{connect}");
        host.serve(listen.port(), &["socat", "-t", "100", &from, &to])
    };
    relays(start, |_, relay| assert_eq!(relay.output(), ""));
}
