//! A proxy that does nothing but pass on: the least that any sidecar does.

use std::{
    io::{self, Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddr},
    time::Duration,
};

use mio::{Events, Interest, Poll, Token, net};
use nix::sys::socket::{setsockopt, sockopt::IpBindAddressNoPort};
use serde::{Deserialize, Serialize};
use shunt_tests::mesh::SIDECAR_SOURCE;
use socket2::{Domain, SockRef, Socket, Type};

use crate::role;

/// Where it listens for what leaves the pod.
pub(crate) const OUTBOUND_PORT: u16 = 15001;
/// Where it listens for what comes into the pod.
pub(crate) const INBOUND_PORT: u16 = 15006;
/// It has passed on a connection of this direction.
pub(crate) const PASSED: [&str; 2] = ["passed outbound", "passed inbound"];

/// Where connections go on to.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) enum Routes {
    /// To where they were going when they were redirected.
    OriginalDestination,
    /// To these addresses, by the port that they came to.
    Fixed {
        outbound: SocketAddr,
        inbound: SocketAddr,
    },
}

/// The queue of a listener.
pub(crate) const BACKLOG: i32 = 4096;

/// As much as is read at once.
const CHUNK: usize = 256 * 1024;

/// Listens on a port of every address; several processes can share it.
pub(crate) fn listen(port: u16) -> io::Result<net::TcpListener> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None)?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)).into())?;
    socket.listen(BACKLOG)?;
    Ok(net::TcpListener::from_std(socket.into()))
}

/// Waits for events, whatever signals come between.
pub(crate) fn wait(poll: &mut Poll, events: &mut Events) -> io::Result<()> {
    match poll.poll(events, None) {
        Err(error) if error.kind() == io::ErrorKind::Interrupted => {
            events.clear();
            Ok(())
        }
        done => done,
    }
}

/// Takes the next connection; `None` when there is none.
pub(crate) fn accept(listener: &net::TcpListener) -> io::Result<Option<net::TcpStream>> {
    loop {
        return match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nodelay(true)?;
                Ok(Some(stream))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            // The client was quicker to close than we to accept.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            Err(error) => Err(error),
        };
    }
}

/// Serves until it is killed.
pub(crate) fn run(routes: &Routes) -> io::Result<()> {
    let mut proxy = Proxy {
        routes: *routes,
        poll: Poll::new()?,
        pairs: Vec::new(),
        free: Vec::new(),
        chunk: vec![0; CHUNK],
        passed: [false; 2],
    };
    let mut listeners = [listen(OUTBOUND_PORT)?, listen(INBOUND_PORT)?];
    for (index, listener) in listeners.iter_mut().enumerate() {
        let registry = proxy.poll.registry();
        registry.register(listener, Token(index), Interest::READABLE)?;
    }
    role::tell(role::READY);
    let mut events = Events::with_capacity(1024);
    loop {
        wait(&mut proxy.poll, &mut events)?;
        for event in &events {
            match event.token() {
                Token(direction) if direction < LISTENERS => {
                    while let Some(stream) = accept(&listeners[direction])? {
                        proxy.take(direction, stream)?;
                    }
                }
                Token(socket) => proxy.pump((socket - LISTENERS) / 2),
            }
        }
    }
}

/// Tokens below this are listeners: 0 outbound, 1 inbound. Those above are
/// sockets, two for each pair.
const LISTENERS: usize = 2;
const OUTBOUND: usize = 0;

struct Proxy {
    routes: Routes,
    poll: Poll,
    pairs: Vec<Option<Pair>>,
    free: Vec<usize>,
    chunk: Vec<u8>,
    /// Which directions had a connection.
    passed: [bool; 2],
}

impl Proxy {
    fn take(&mut self, direction: usize, mut accepted: net::TcpStream) -> io::Result<()> {
        // A connection whose client or destination has gone is no reason to end.
        let Ok(mut upstream) = self.connect(direction, &accepted) else {
            return Ok(());
        };
        let place = self.free.pop().unwrap_or_else(|| {
            self.pairs.push(None);
            self.pairs.len() - 1
        });
        let both = Interest::READABLE | Interest::WRITABLE;
        let registry = self.poll.registry();
        registry.register(&mut accepted, Token(LISTENERS + 2 * place), both)?;
        registry.register(&mut upstream, Token(LISTENERS + 2 * place + 1), both)?;
        self.pairs[place] = Some(Pair {
            accepted: Half::new(accepted),
            upstream: Half::new(upstream),
        });
        if !std::mem::replace(&mut self.passed[direction], true) {
            role::tell(PASSED[direction]);
        }
        Ok(())
    }

    fn connect(&self, direction: usize, accepted: &net::TcpStream) -> io::Result<net::TcpStream> {
        let destination = match self.routes {
            Routes::OriginalDestination => destination(accepted)?,
            Routes::Fixed { outbound, .. } if direction == OUTBOUND => outbound,
            Routes::Fixed { inbound, .. } => inbound,
        };
        let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None)?;
        socket.set_tcp_nodelay(true)?;
        if direction != OUTBOUND {
            // Its port is chosen when it connects, so that one port can serve
            // several destinations.
            setsockopt(&socket, IpBindAddressNoPort, &true)?;
            socket.bind(&SocketAddr::from((SIDECAR_SOURCE, 0)).into())?;
        }
        match socket.connect(&destination.into()) {
            Err(error) if error.raw_os_error() != Some(nix::libc::EINPROGRESS) => Err(error),
            _ => Ok(net::TcpStream::from_std(socket.into())),
        }
    }

    /// Moves what can be moved between the sockets of a pair. Events of a pair
    /// that is gone, or of the one before it at its place, do no harm.
    fn pump(&mut self, place: usize) {
        let Some(Some(pair)) = self.pairs.get_mut(place) else {
            return;
        };
        if !pair.is_open_after_pump(&mut self.chunk) {
            self.pairs[place] = None;
            self.free.push(place);
        }
    }
}

/// Where an accepted connection was going.
fn destination(accepted: &net::TcpStream) -> io::Result<SocketAddr> {
    match SockRef::from(accepted).original_dst_v4() {
        Ok(address) => address
            .as_socket()
            .ok_or_else(|| io::Error::other("an original destination without an address")),
        // Not redirected: it goes where it has come to.
        Err(_) => accepted.local_addr(),
    }
}

/// A connection and the one that carries it on.
struct Pair {
    accepted: Half,
    upstream: Half,
}

impl Pair {
    fn is_open_after_pump(&mut self, chunk: &mut [u8]) -> bool {
        let Self { accepted, upstream } = self;
        let moved = accepted
            .pump_into(upstream, chunk)
            .and_then(|()| upstream.pump_into(accepted, chunk));
        if moved.is_err() {
            // A reset is passed on as one. It does not matter on the socket that
            // has met it.
            for half in [accepted, upstream] {
                let _ = SockRef::from(&half.stream).set_linger(Some(Duration::ZERO));
            }
            return false;
        }
        !(accepted.is_passed_on && upstream.is_passed_on)
    }
}

/// One of the two sockets, and what was read from it.
struct Half {
    stream: net::TcpStream,
    /// Read, and not yet taken by the other socket.
    unsent: Vec<u8>,
    is_at_end: bool,
    /// Its end was passed on, too.
    is_passed_on: bool,
}

impl Half {
    fn new(stream: net::TcpStream) -> Self {
        Self {
            stream,
            unsent: Vec::new(),
            is_at_end: false,
            is_passed_on: false,
        }
    }

    /// Passes on until one of both would block. An error means that the
    /// connection is lost.
    fn pump_into(&mut self, other: &mut Self, chunk: &mut [u8]) -> io::Result<()> {
        loop {
            if !self.unsent.is_empty() {
                let sent = send(&mut other.stream, &self.unsent)?;
                self.unsent.drain(..sent);
                if !self.unsent.is_empty() {
                    return Ok(());
                }
            }
            if self.is_at_end {
                if !std::mem::replace(&mut self.is_passed_on, true) {
                    other.stream.shutdown(Shutdown::Write)?;
                }
                return Ok(());
            }
            match self.stream.read(chunk) {
                Ok(0) => self.is_at_end = true,
                Ok(read) => {
                    let sent = send(&mut other.stream, &chunk[..read])?;
                    self.unsent.extend_from_slice(&chunk[sent..read]);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }
}

/// Sends until the socket takes no more; returns how much it took.
pub(crate) fn send(stream: &mut net::TcpStream, bytes: &[u8]) -> io::Result<usize> {
    let mut sent = 0;
    while sent < bytes.len() {
        match stream.write(&bytes[sent..]) {
            Ok(more) => sent += more,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    Ok(sent)
}
