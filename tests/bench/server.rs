//! The application that is called: it reads requests and answers them.

use std::{
    collections::HashMap,
    io::{self, Read},
};

use mio::{Events, Interest, Poll, Token, net};

use crate::{
    proxy::{accept, listen, send, wait},
    role,
};

/// How a request begins: its own length and that of the answer, both in bytes
/// and little-endian. Its length counts this head.
pub(crate) const HEAD: usize = 16;

/// The head of a request of `length` bytes that wants `answer` bytes.
pub(crate) fn head(length: u64, answer: u64) -> [u8; HEAD] {
    let mut head = [0; HEAD];
    head[..8].copy_from_slice(&length.to_le_bytes());
    head[8..].copy_from_slice(&answer.to_le_bytes());
    head
}

const CHUNK: usize = 256 * 1024;
const LISTENER: Token = Token(0);

/// Serves until it is killed.
pub(crate) fn run(port: u16) -> io::Result<()> {
    let mut poll = Poll::new()?;
    let mut listener = listen(port)?;
    poll.registry()
        .register(&mut listener, LISTENER, Interest::READABLE)?;
    role::tell(role::READY);
    let mut connections = HashMap::new();
    let mut next = 1;
    let mut chunk = vec![0; CHUNK];
    let zeros = vec![0; CHUNK];
    let mut events = Events::with_capacity(1024);
    loop {
        wait(&mut poll, &mut events)?;
        for event in &events {
            if event.token() != LISTENER {
                let Some(connection) = connections.get_mut(&event.token()) else {
                    continue;
                };
                if !Connection::is_open_after_serving(connection, &mut chunk, &zeros) {
                    connections.remove(&event.token());
                }
                continue;
            }
            while let Some(mut stream) = accept(&listener)? {
                let both = Interest::READABLE | Interest::WRITABLE;
                poll.registry().register(&mut stream, Token(next), both)?;
                connections.insert(Token(next), Connection::new(stream));
                next += 1;
            }
        }
    }
}

struct Connection {
    stream: net::TcpStream,
    requests: Requests,
    /// Bytes of answers that have to be sent.
    unsent: u64,
}

impl Connection {
    fn new(stream: net::TcpStream) -> Self {
        Self {
            stream,
            requests: Requests::default(),
            unsent: 0,
        }
    }

    /// False when the client is gone.
    fn is_open_after_serving(&mut self, chunk: &mut [u8], zeros: &[u8]) -> bool {
        loop {
            if !self.is_open_after_sending(zeros) {
                return false;
            }
            match self.stream.read(chunk) {
                Ok(0) => return false,
                Ok(read) => self.unsent += self.requests.take(&chunk[..read]),
                Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
            }
        }
    }

    fn is_open_after_sending(&mut self, zeros: &[u8]) -> bool {
        while self.unsent > 0 {
            let now =
                usize::try_from(self.unsent).map_or(zeros.len(), |left| left.min(zeros.len()));
            match send(&mut self.stream, &zeros[..now]) {
                Ok(0) => break,
                Ok(sent) => self.unsent -= u64::try_from(sent).unwrap_or(self.unsent),
                Err(_) => return false,
            }
        }
        true
    }
}

/// Finds the ends of requests in what comes in.
#[derive(Debug, Default)]
struct Requests {
    head: Vec<u8>,
    /// Of the request whose head is complete.
    left: u64,
    answer: u64,
}

impl Requests {
    /// Takes in the next bytes; returns how many bytes of answers they are worth.
    fn take(&mut self, mut bytes: &[u8]) -> u64 {
        let mut answers = 0;
        while !bytes.is_empty() {
            if self.left == 0 {
                let wanted = (HEAD - self.head.len()).min(bytes.len());
                self.head.extend_from_slice(&bytes[..wanted]);
                bytes = &bytes[wanted..];
                if self.head.len() < HEAD {
                    return answers;
                }
                self.left = number(&self.head[..8]).saturating_sub(HEAD as u64);
                self.answer = number(&self.head[8..]);
                self.head.clear();
            }
            let body = usize::try_from(self.left).map_or(bytes.len(), |left| left.min(bytes.len()));
            self.left -= body as u64;
            bytes = &bytes[body..];
            if self.left == 0 {
                answers += self.answer;
            }
        }
        answers
    }
}

fn number(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |number, &byte| number << 8 | u64::from(byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(length: u64, answer: u64) -> Vec<u8> {
        let mut bytes = head(length, answer).to_vec();
        bytes.resize(usize::try_from(length).expect("a small request"), 7);
        bytes
    }

    #[test]
    fn requests_are_found_however_they_are_cut() {
        let mut stream = request(64, 5);
        stream.extend(request(16, 70_000));
        stream.extend(request(300, 1));
        for size in [1, 3, 16, 17, 64, 1000] {
            let mut requests = Requests::default();
            let answers: u64 = stream.chunks(size).map(|cut| requests.take(cut)).sum();
            assert_eq!(answers, 70_006, "in cuts of {size}");
        }
    }

    #[test]
    fn an_unfinished_request_is_not_answered() {
        let bytes = request(64, 5);
        assert_eq!(Requests::default().take(&bytes[..63]), 0);
    }
}
