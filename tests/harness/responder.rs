//! A server that tells each client what it sees of the connection.

use std::{
    collections::HashMap,
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr},
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
};

use mio::{Events, Interest, Poll, Token, Waker, event::Source, net};
use serde::{Deserialize, Serialize};
use socket2::{Domain, SockRef, Socket, Type};

use crate::{Netns, Owner, netns::Entrance};

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

/// Which connections a responder accepts, on which sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Families {
    /// IPv4 alone.
    V4,
    /// IPv4 and IPv6, on a socket each.
    Split,
    /// Both on one IPv6 socket, as Go and the JVM listen.
    Dual,
}

/// Listens on a set of ports, on every address of a namespace, until it is
/// dropped. Its sockets have SO_REUSEPORT: several responders can share a port.
#[derive(Debug)]
pub struct Responder {
    waker: Arc<Waker>,
    accepted: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

/// The queue of each listener: larger than any test's number of connections
/// that are not accepted yet.
const BACKLOG: i32 = 4096;

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
        Self::spawn(netns.purpose(), entrance, owner, (families, ports))
    }

    /// The same in the namespace of the calling thread; it is told to be
    /// `place`.
    ///
    /// # Panics
    ///
    /// As [`start`](Self::start).
    pub fn start_here(place: &str, owner: Owner, ports: &[u16]) -> Self {
        Self::spawn(place, None, owner, (Families::V4, ports))
    }

    fn spawn(
        place: &str,
        entrance: Option<Entrance>,
        owner: Owner,
        (families, ports): (Families, &[u16]),
    ) -> Self {
        let (report, reported) = mpsc::channel();
        let accepted = Arc::new(AtomicU64::new(0));
        let thread = {
            let (place, ports) = (place.to_owned(), ports.to_vec());
            let accepted = Arc::clone(&accepted);
            thread::spawn(move || {
                if let Some(entrance) = entrance {
                    entrance.enter();
                }
                owner.assume();
                let mut serving = Serving::listen(place, (families, &ports), accepted);
                report.send(Arc::clone(&serving.waker)).ok();
                serving.run();
            })
        };
        let Ok(waker) = reported.recv() else {
            match thread.join() {
                Err(panic) => std::panic::resume_unwind(panic),
                Ok(()) => unreachable!("it reports before it ends"),
            }
        };
        Self {
            waker,
            accepted,
            thread: Some(thread),
        }
    }

    /// How many connections it has accepted so far.
    pub fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::Relaxed)
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        // A thread that has panicked has no use for it.
        let _ = self.waker.wake();
        if let Some(thread) = self.thread.take()
            && let Err(panic) = thread.join()
            && !thread::panicking()
        {
            std::panic::resume_unwind(panic);
        }
    }
}

/// The token of the waker, which means: stop. No listener or connection has it.
const STOP: Token = Token(usize::MAX);

/// The thread's side of a responder.
struct Serving {
    place: String,
    poll: Poll,
    waker: Arc<Waker>,
    listeners: Vec<(u16, net::TcpListener)>,
    connections: HashMap<Token, Connection>,
    next: usize,
    accepted: Arc<AtomicU64>,
}

impl Serving {
    fn listen(
        place: String,
        (families, ports): (Families, &[u16]),
        accepted: Arc<AtomicU64>,
    ) -> Self {
        let poll = Poll::new().expect("an epoll instance");
        let waker = Waker::new(poll.registry(), STOP).expect("an event file");
        let mut listeners = Vec::new();
        let sockets = ports
            .iter()
            .flat_map(|&port| families.sockets().iter().map(move |&socket| (port, socket)));
        for (index, (port, socket)) in sockets.enumerate() {
            let mut listener = listen(socket, port)
                .unwrap_or_else(|e| panic!("cannot listen on {place}:{port}: {e}"));
            watch(&poll, &mut listener, Token(index), Interest::READABLE);
            listeners.push((port, listener));
        }
        Self {
            place,
            poll,
            waker: Arc::new(waker),
            next: listeners.len(),
            listeners,
            connections: HashMap::new(),
            accepted,
        }
    }

    fn run(&mut self) {
        let mut events = Events::with_capacity(1024);
        loop {
            match self.poll.poll(&mut events, None) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => result.expect("epoll_wait"),
            }
            for event in &events {
                match event.token() {
                    STOP => return,
                    Token(index) if index < self.listeners.len() => self.accept(index),
                    connection => self.serve(connection),
                }
            }
        }
    }

    fn accept(&mut self, index: usize) {
        loop {
            let (port, listener) = &self.listeners[index];
            let (stream, peer) = match listener.accept() {
                Ok(accepted) => accepted,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // The client was quicker to close than we to accept.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                Err(error) => panic!("cannot accept on {}:{port}: {error}", self.place),
            };
            let greeting = self.greeting(*port, &stream, peer);
            let token = Token(self.next);
            self.next += 1;
            self.accepted.fetch_add(1, Ordering::Relaxed);
            let mut stream = stream;
            watch(
                &self.poll,
                &mut stream,
                token,
                Interest::READABLE | Interest::WRITABLE,
            );
            let connection = Connection::new(stream, &greeting);
            self.connections.insert(token, connection);
            self.serve(token);
        }
    }

    fn greeting(&self, listener: u16, stream: &net::TcpStream, peer: SocketAddr) -> Greeting {
        let socket = SockRef::from(stream);
        // A client of IPv4 on a listener of IPv6 has an IPv4-mapped address.
        let original_dst = match peer.ip().to_canonical() {
            IpAddr::V4(_) => socket.original_dst_v4(),
            IpAddr::V6(_) => socket.original_dst_v6(),
        };
        Greeting {
            place: self.place.clone(),
            listener,
            peer,
            // A connection that was reset meanwhile still has its address.
            local: stream.local_addr().expect("getsockname"),
            original_dst: original_dst
                .map(|addr| addr.as_socket().expect("an address of IPv4 or IPv6"))
                .map_err(|error| error.raw_os_error().unwrap_or(0)),
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

/// Closing alone would not do: a child that another test has just forked has
/// every file of this process until it calls exec, and would keep the listeners
/// accepting.
impl Drop for Serving {
    fn drop(&mut self) {
        for (_, listener) in &self.listeners {
            // It cannot fail on a listener, and nothing is lost when it does.
            let _ = SockRef::from(listener).shutdown(Shutdown::Both);
        }
    }
}

/// What a listening socket accepts.
#[derive(Clone, Copy)]
enum Accepts {
    V4,
    V6,
    Both,
}

impl Families {
    const fn sockets(self) -> &'static [Accepts] {
        match self {
            Self::V4 => &[Accepts::V4],
            Self::Split => &[Accepts::V4, Accepts::V6],
            Self::Dual => &[Accepts::Both],
        }
    }
}

fn listen(accepts: Accepts, port: u16) -> io::Result<net::TcpListener> {
    let (domain, any): (_, IpAddr) = match accepts {
        Accepts::V4 => (Domain::IPV4, Ipv4Addr::UNSPECIFIED.into()),
        Accepts::V6 | Accepts::Both => (Domain::IPV6, Ipv6Addr::UNSPECIFIED.into()),
    };
    let socket = Socket::new(domain, Type::STREAM.nonblocking(), None)?;
    match accepts {
        Accepts::V4 => {}
        Accepts::V6 => socket.set_only_v6(true)?,
        Accepts::Both => socket.set_only_v6(false)?,
    }
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.bind(&SocketAddr::new(any, port).into())?;
    socket.listen(BACKLOG)?;
    Ok(net::TcpListener::from_std(socket.into()))
}

fn watch(poll: &Poll, source: &mut (impl Source + AsFd), token: Token, interest: Interest) {
    poll.registry()
        .register(source, token, interest)
        .expect("an open socket can be watched");
}

/// An accepted connection and what it still has to be sent.
struct Connection {
    stream: net::TcpStream,
    unsent: Vec<u8>,
}

impl Connection {
    fn new(stream: net::TcpStream, greeting: &Greeting) -> Self {
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
