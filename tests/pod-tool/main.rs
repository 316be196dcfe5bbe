//! What runs in the pods of the tests on a real node: a server that tells its clients
//! how they came to it, and clients that take offence when they did not come through
//! the mesh.
//!
//! Every Envoy puts a line of the PROXY protocol before what it passes on for its
//! application, and connects to its application from 127.0.0.6. So a server sees of
//! each connection whether both of its ends were redirected: without that line the
//! client's was not, and from another address the server's was not.
//!
//! ```text
//! pod-tool serve PORT
//! pod-tool call ADDRESS…          once each, first thing; the outcomes as JSON lines, and then stays
//! pod-tool try ADDRESS…           the same, and ends
//! pod-tool both PORT ADDRESS…     serves, and calls these, and itself at POD_IP
//! pod-tool load CONTROL ADDRESS RATE LONG
//! pod-tool wait ADDRESS           until somebody listens there
//! pod-tool stay
//! ```
#![expect(
    unused_crate_dependencies,
    reason = "these are the dependencies of the harness"
)]
#![expect(
    clippy::print_stdout,
    reason = "the container's log is read by the test"
)]

mod client;
mod load;
mod server;

use std::{net::SocketAddr, process::ExitCode, thread, time::Duration};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["serve", port] => server::serve(&server::listen(number(port))),
        ["call", servers @ ..] => {
            call(servers);
            stay()
        }
        ["try", servers @ ..] => {
            call(servers);
            ExitCode::SUCCESS
        }
        ["both", port, servers @ ..] => {
            let port = number(port);
            let listener = server::listen(port);
            let server = thread::spawn(move || server::serve(&listener));
            call(servers);
            call(&[&format!("{}:{port}", own_address())]);
            server.join().unwrap_or(ExitCode::FAILURE)
        }
        ["load", control, server, rate, long] => {
            load::run(number(control), address(server), number(rate), number(long))
        }
        ["wait", server] => {
            while std::net::TcpStream::connect(address(server)).is_err() {
                thread::sleep(Duration::from_millis(10));
            }
            ExitCode::SUCCESS
        }
        ["stay"] | [] => stay(),
        _ => {
            println!("pod-tool: what is {words:?}?");
            ExitCode::FAILURE
        }
    }
}

/// Calls each once, and says what came of it.
fn call(servers: &[&str]) {
    for server in servers {
        println!("{}", client::outcome(address(server)));
    }
}

/// The address of the pod, which kubelet has put into its environment.
fn own_address() -> String {
    std::env::var("POD_IP").expect("the test sets POD_IP")
}

/// Until a signal comes. Process 1 of a container has no default action for
/// SIGTERM: the test takes its pods away without a grace period.
fn stay() -> ! {
    loop {
        thread::park();
    }
}

fn address(text: &str) -> SocketAddr {
    text.parse()
        .unwrap_or_else(|error| panic!("{text} is no address: {error}"))
}

fn number<T: std::str::FromStr>(text: &str) -> T {
    text.parse()
        .unwrap_or_else(|_| panic!("{text} is no number here"))
}
