//! A connection to the server, and what the server says of it.

use std::{
    io::{BufRead, BufReader, Error, ErrorKind, Result, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use serde_json::{Value, json};

/// How long a step may take before the connection counts as failed.
const PATIENCE: Duration = Duration::from_secs(20);

/// An open connection.
pub(crate) struct Connection {
    stream: BufReader<TcpStream>,
}

impl Connection {
    pub(crate) fn open(server: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&server, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        let asked_for = stream.peer_addr()?;
        if asked_for != server {
            return Err(Error::other(format!(
                "getpeername() says {asked_for}, not {server}"
            )));
        }
        Ok(Self {
            stream: BufReader::new(stream),
        })
    }

    /// Asks once. An end of the connection is an error.
    pub(crate) fn ask(&mut self) -> Result<Value> {
        self.stream.get_mut().write_all(b"hello\n")?;
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        Ok(serde_json::from_str(&line)?)
    }
}

/// One connection with one question: its answer, or its error.
pub(crate) fn outcome(server: SocketAddr) -> Value {
    let said = Connection::open(server).and_then(|mut connection| connection.ask());
    match said {
        Ok(answer) => json!({"to": server, "answer": answer}),
        Err(error) => json!({"to": server, "error": error.to_string()}),
    }
}
