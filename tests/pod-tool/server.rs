//! The server: every line is answered with what is known of the connection.

use std::{
    io::{self, BufRead, BufReader, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    process::ExitCode,
    thread,
};

use serde_json::json;

/// Listens on every address.
pub(crate) fn listen(port: u16) -> TcpListener {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))
        .unwrap_or_else(|error| panic!("cannot listen on {port}: {error}"));
    println!("serving on {port}");
    listener
}

/// Serves until the process ends.
pub(crate) fn serve(listener: &TcpListener) -> ExitCode {
    for stream in listener.incoming().flatten() {
        // A client that goes away is no concern of the others.
        thread::spawn(move || answer(&stream));
    }
    ExitCode::SUCCESS
}

fn answer(stream: &TcpStream) -> io::Result<()> {
    let peer = stream.peer_addr()?;
    let mut lines = BufReader::new(stream).lines();
    let mut line = lines.next().transpose()?;
    // `PROXY TCP4 SOURCE DESTINATION PORT PORT`
    let proxied = line
        .as_deref()
        .is_some_and(|line| line.starts_with("PROXY "));
    let header = if proxied { line.take() } else { None };
    if proxied {
        line = lines.next().transpose()?;
    }
    let mut reply = json!({"peer": peer.to_string(), "header": header}).to_string();
    reply.push('\n');
    let mut stream = stream;
    while line.is_some() {
        stream.write_all(reply.as_bytes())?;
        line = lines.next().transpose()?;
    }
    Ok(())
}
