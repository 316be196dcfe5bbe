//! A server that tells each client what it sees of the connection.

use std::{
    collections::HashMap,
    io::{self, Read, Write},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use mio::{Interest, Poll, Token, event::Event, net::TcpStream};
use serde::{Deserialize, Serialize};

use crate::{
    Netns, Owner,
    netns::Entrance,
    service::{Connections, FIRST_TOKEN, Families, Service, original_destination, watch},
};

/// What a responder sees of one connection; it is the first line that it sends,
/// as JSON. Everything after it is an echo.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Greeting {
    /// What the namespace of the responder stands for.
    pub place: String,
    /// The port that was listened on.
    pub listener: u16,
    /// The client, as `accept` tells it.
    pub peer: SocketAddr,
    /// The accepted socket's own address, as `getsockname` tells it.
    pub local: SocketAddr,
    /// The answer to `SO_ORIGINAL_DST`, or its errno.
    pub original_dst: Result<SocketAddr, i32>,
}

impl Greeting {
    /// Reads it from a connection, and nothing of what comes after it.
    ///
    /// # Panics
    ///
    /// When the other end is no responder, or says nothing.
    pub fn read(mut from: impl Read) -> Self {
        let mut line = Vec::new();
        let mut byte = [0];
        while line.last() != Some(&b'\n') {
            from.read_exact(&mut byte).expect("a responder's line");
            line.extend(byte);
        }
        serde_json::from_slice(&line).expect("a responder's greeting")
    }

    /// What the client asked for, as a proxy finds out: the original
    /// destination, and where there is none the accepted socket's own address.
    /// An IPv4 address is one of IPv4, whatever family the listener is of.
    ///
    /// With rules, connection tracking answers `SO_ORIGINAL_DST` on every
    /// connection; without, the kernel says ENOENT on those that were not
    /// redirected. Both mean the same.
    pub fn destination(&self) -> SocketAddr {
        let destination = self.original_dst.unwrap_or(self.local);
        SocketAddr::new(destination.ip().to_canonical(), destination.port())
    }

    /// Whether a proxy that asks for the original destination is given one,
    /// where it needs one: when the connection came to another port.
    pub fn knows_destination(&self) -> bool {
        self.original_dst.is_ok() || self.destination().port() == self.listener
    }
}

/// Listens on a set of ports, on every address of a namespace, until it is
/// dropped. Its sockets have SO_REUSEPORT: several responders can share a port.
#[derive(Debug)]
pub struct Responder {
    accepted: Arc<AtomicU64>,
    _service: Service,
}

impl Responder {
    /// Listens on `ports` in `netns`, for IPv4, with sockets of `owner`. They
    /// accept when this returns.
    ///
    /// # Panics
    ///
    /// When a port cannot be had.
    pub fn start(netns: &Netns, owner: Owner, ports: &[u16]) -> Self {
        Self::start_for(Families::V4, netns, owner, ports)
    }

    /// The same for these families.
    ///
    /// # Panics
    ///
    /// As [`start`](Self::start).
    pub fn start_for(families: Families, netns: &Netns, owner: Owner, ports: &[u16]) -> Self {
        let entrance = Some(netns.entrance());
        Self::serve(netns.purpose(), entrance, owner, (families, ports))
    }

    /// The same in the namespace of the calling thread; it is told to be
    /// `place`.
    ///
    /// # Panics
    ///
    /// As [`start`](Self::start).
    pub fn start_here(place: &str, owner: Owner, ports: &[u16]) -> Self {
        Self::serve(place, None, owner, (Families::V4, ports))
    }

    fn serve(
        place: &str,
        entrance: Option<Entrance>,
        owner: Owner,
        at: (Families, &[u16]),
    ) -> Self {
        let accepted = Arc::new(AtomicU64::new(0));
        let responding = Responding {
            place: place.to_owned(),
            connections: HashMap::new(),
            next: FIRST_TOKEN,
            accepted: Arc::clone(&accepted),
        };
        Self {
            accepted,
            _service: Service::start(entrance, owner, at, responding),
        }
    }

    /// How many connections it has accepted so far.
    pub fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::Relaxed)
    }
}

/// The thread's side of a responder.
struct Responding {
    place: String,
    connections: HashMap<Token, Connection>,
    next: usize,
    accepted: Arc<AtomicU64>,
}

impl Connections for Responding {
    fn accepted(&mut self, poll: &Poll, port: u16, mut stream: TcpStream, peer: SocketAddr) {
        let greeting = self.greeting(port, &stream, peer);
        let token = Token(self.next);
        self.next += 1;
        self.accepted.fetch_add(1, Ordering::Relaxed);
        let interest = Interest::READABLE | Interest::WRITABLE;
        watch(poll, &mut stream, token, interest);
        let connection = Connection::new(stream, &greeting);
        self.connections.insert(token, connection);
        self.serve(token);
    }

    fn happened(&mut self, _: &Poll, event: &Event) {
        self.serve(event.token());
    }
}

impl Responding {
    fn greeting(&self, listener: u16, stream: &TcpStream, peer: SocketAddr) -> Greeting {
        Greeting {
            place: self.place.clone(),
            listener,
            peer,
            // A connection that was reset meanwhile still has its address.
            local: stream.local_addr().expect("getsockname"),
            original_dst: original_destination(stream, peer),
        }
    }

    fn serve(&mut self, token: Token) {
        if let Some(connection) = self.connections.get_mut(&token)
            && !connection.is_open_after_echo()
        {
            self.connections.remove(&token);
        }
    }
}

/// An accepted connection and what it still has to be sent.
struct Connection {
    stream: TcpStream,
    unsent: Vec<u8>,
}

impl Connection {
    fn new(stream: TcpStream, greeting: &Greeting) -> Self {
        let mut unsent = serde_json::to_vec(greeting).expect("plain data");
        unsent.push(b'\n');
        Self { stream, unsent }
    }

    /// Sends back what has come in, until the socket has no more for now. False
    /// when the client is gone: nobody is left to tell about an error.
    fn is_open_after_echo(&mut self) -> bool {
        let mut chunk = [0; 4096];
        loop {
            match self.stream.read(&mut chunk) {
                Ok(0) => return false,
                Ok(read) => self.unsent.extend_from_slice(&chunk[..read]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return self.send(),
                Err(_) => return false,
            }
        }
    }

    fn send(&mut self) -> bool {
        while !self.unsent.is_empty() {
            match self.stream.write(&self.unsent) {
                Ok(sent) => drop(self.unsent.drain(..sent)),
                Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
            }
        }
        true
    }
}
