//! One side has said all that it has to say, and still listens.

use std::{collections::BTreeMap, net::SocketAddr};

use shunt_tests::{Process, deadline::wait_until};

use super::{
    Host, Least, PORT, Spliced, World, assert_same_bytes, bytes,
    host::{PYTHON, ended_well},
    in_every_mode,
};

const UP: usize = 1 << 20;
const DOWN: usize = 3 << 20;

/// Where a read after a half-close fails, it does so in some of the rounds only.
const ROUNDS: usize = 40;
/// How many connections there are.
pub(super) const CONNECTIONS: usize = 3 * ROUNDS;
/// The least that they carry, both ways together.
pub(super) const BYTES: usize = 40_000_000;

/// A server with blocking sockets in Python.
pub(super) fn serve(host: &Host, port: u16) -> Process {
    host.write("half_close.py", SOURCE);
    let text = port.to_string();
    host.serve(port, &[PYTHON, "half_close.py", "serve", &text])
}

/// Its client calls it at `server`; what the two have seen, and how often. (The
/// threads of the server need not speak in the order of the calls.)
pub(super) fn ask(
    host: &Host,
    server: SocketAddr,
    process: &Process,
) -> [BTreeMap<String, usize>; 2] {
    host.write("half_close.py", SOURCE);
    let (ip, port, rounds) = (
        server.ip().to_string(),
        server.port().to_string(),
        ROUNDS.to_string(),
    );
    let said = host.output(&[PYTHON, "half_close.py", "ask", &ip, &port, &rounds]);
    assert_eq!(said.lines().count(), CONNECTIONS);
    let heard = wait_until("the server to have said all", || {
        let heard = process.output();
        let all = heard.lines().count() == CONNECTIONS;
        all.then(|| heard.clone()).ok_or(heard)
    });
    [said, heard].map(|text| {
        let mut lines = BTreeMap::new();
        for line in text.lines() {
            *lines.entry(line.to_owned()).or_insert(0) += 1;
        }
        lines
    })
}

const SOURCE: &str = include_str!("../../fixtures/half_close.py");

/// Sockets that wait in recv().
#[test]
fn pythons_blocking_sockets() {
    in_every_mode(
        Least {
            connections: CONNECTIONS,
            bytes: BYTES,
            spliced: Spliced::AtLast,
        },
        |world| {
            let server = serve(&world.server, PORT);
            ask(&world.client, world.address(), &server)
        },
    );
}

/// A file to the server, one from it, and a question whose end the server waits
/// for. Not two files at once: then netcat loses the end of one of them on a plain
/// TCP connection already.
#[test]
fn netcat() {
    const LINES: u32 = 200_000;
    let line = |number| format!("{number:010}\n");
    let up: String = (0..LINES).rev().map(line).collect();
    let sorted: String = (0..LINES).map(line).collect();
    let down = bytes(2, DOWN);
    in_every_mode(
        Least {
            connections: 3,
            bytes: 3 * up.len() + DOWN,
            spliced: Spliced::AtLast,
        },
        |world| {
            let (client, server) = (&world.client, &world.server);
            let to = format!("{} {PORT}", world.ip());
            let shell = |line: &str| client.output(&["sh", "-c", &format!("exec {line}")]);
            let serve = |line: &str| server.serve(PORT, &["sh", "-c", &format!("exec {line}")]);

            client.write("up", &up);
            let taker = serve(&format!("nc.openbsd -d -l {PORT} > taken"));
            shell(&format!("nc.openbsd -N {to} < up"));
            ended_well(taker);
            assert_same_bytes("to the server", &server.read("taken"), up.as_bytes());

            server.write("down", &down);
            let giver = serve(&format!("nc.openbsd -N -l {PORT} < down"));
            shell(&format!("nc.openbsd -d {to} > taken"));
            ended_well(giver);
            assert_same_bytes("to the client", &client.read("taken"), &down);

            let sort = serve(&format!(
                "socat -t 100 TCP-LISTEN:{PORT},reuseaddr EXEC:sort"
            ));
            shell(&format!("nc.openbsd -N {to} < up > answer"));
            ended_well(sort);
            assert_same_bytes("the answer", &client.read("answer"), sorted.as_bytes());
        },
    );
}

/// A server that answers with what it was sent, and one that answers with the
/// digest of it, after the end of file.
#[test]
fn socat() {
    const CALLS: usize = 3;
    let up = bytes(3, UP);
    let ask = |world: &World| {
        world.client.write("up", &up);
        // How long it waits for the other direction's end after the first.
        let ask = format!("exec socat -t 100 - TCP:{} < up > arrived", world.address());
        world.client.output(&["sh", "-c", &ask]);
        world.client.read("arrived")
    };
    in_every_mode(
        Least {
            connections: 2 * CALLS,
            bytes: 3 * CALLS * UP,
            spliced: Spliced::AtLast,
        },
        |world| {
            let listen = format!("TCP-LISTEN:{PORT},fork,reuseaddr");
            let echo = world.server.serve(PORT, &["socat", &listen, "PIPE"]);
            for _ in 0..CALLS {
                assert_same_bytes("the echo", &ask(world), &up);
            }
            drop(echo);
            let digest = ["socat", "-t", "100", &listen, "EXEC:sha256sum"];
            let _digest = world.server.serve(PORT, &digest);
            let said = [(); CALLS].map(|()| String::from_utf8(ask(world)).expect("a digest"));
            assert!(said.iter().all(|digest| digest.len() > 64), "{said:?}");
            said
        },
    );
}
