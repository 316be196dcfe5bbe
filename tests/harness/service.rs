//! Threads that serve TCP connections beside a test, many at a time.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr},
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
};

use mio::{
    Events, Interest, Poll, Token, Waker,
    event::{Event, Source},
    net::{TcpListener, TcpStream},
};
use socket2::{Domain, SockRef, Socket, Type};

use crate::{Owner, netns::Entrance};

/// The queue of each listener: larger than any test's number of connections
/// that are not accepted yet.
const BACKLOG: i32 = 4096;

/// What is done with connections. Tokens below [`FIRST_TOKEN`] are taken.
pub(crate) trait Connections: Send {
    /// One was accepted on `port`, non-blocking.
    fn accepted(&mut self, poll: &Poll, port: u16, stream: TcpStream, peer: SocketAddr);
    /// Something has happened to one.
    fn happened(&mut self, poll: &Poll, event: &Event);
}

/// The first token that is free for connections.
pub(crate) const FIRST_TOKEN: usize = 1 << 16;
/// The token of the waker.
const ORDER: Token = Token(FIRST_TOKEN - 1);

/// What the thread is told when it is woken.
const GO_ON: u8 = 0;
const STOP_LISTENING: u8 = 1;
const END: u8 = 2;

/// Which connections a service accepts, on which sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Families {
    /// IPv4 alone.
    V4,
    /// IPv4 and IPv6, on a socket each.
    Split,
    /// Both on one IPv6 socket, as Go and the JVM listen.
    Dual,
    /// IPv4 and IPv6, on a socket each, at the loopback address and no other.
    Loopback,
}

/// A thread that listens and serves until it is dropped. Its listeners have
/// SO_REUSEPORT: several services can share a port.
#[derive(Debug)]
pub(crate) struct Service {
    orders: Arc<AtomicU8>,
    waker: Arc<Waker>,
    thread: Option<JoinHandle<()>>,
}

impl Service {
    /// Listens on ports, on every address of these families, with sockets of
    /// `owner`; where `entrance` leads to, else here. It accepts when this returns.
    ///
    /// # Panics
    ///
    /// When a port cannot be had.
    pub(crate) fn start(
        entrance: Option<Entrance>,
        owner: Owner,
        (families, ports): (Families, &[u16]),
        connections: impl Connections + 'static,
    ) -> Self {
        let (report, reported) = mpsc::channel();
        let orders = Arc::new(AtomicU8::new(GO_ON));
        let thread = {
            let (ports, orders) = (ports.to_vec(), Arc::clone(&orders));
            thread::spawn(move || {
                if let Some(entrance) = entrance {
                    entrance.enter();
                }
                owner.assume();
                let mut serving = Serving::listen((families, &ports), orders, connections);
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
            orders,
            waker,
            thread: Some(thread),
        }
    }

    /// Has it close its listeners soon; connections that are open stay so.
    pub(crate) fn stop_listening(&self) {
        self.order(STOP_LISTENING);
    }

    fn order(&self, order: u8) {
        self.orders.store(order, Ordering::Release);
        // A thread that has panicked has no use for it.
        let _ = self.waker.wake();
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.order(END);
        if let Some(thread) = self.thread.take()
            && let Err(panic) = thread.join()
            && !thread::panicking()
        {
            std::panic::resume_unwind(panic);
        }
    }
}

/// The thread's side of a service.
struct Serving<C> {
    poll: Poll,
    orders: Arc<AtomicU8>,
    waker: Arc<Waker>,
    listeners: Vec<(u16, TcpListener)>,
    connections: C,
}

impl<C: Connections> Serving<C> {
    fn listen(
        (families, ports): (Families, &[u16]),
        orders: Arc<AtomicU8>,
        connections: C,
    ) -> Self {
        let poll = Poll::new().expect("an epoll instance");
        let waker = Waker::new(poll.registry(), ORDER).expect("an event file");
        let mut listeners = Vec::new();
        let sockets = ports
            .iter()
            .flat_map(|&port| families.sockets().iter().map(move |&socket| (port, socket)));
        for (index, (port, socket)) in sockets.enumerate() {
            let mut listener = listen(socket, port)
                .unwrap_or_else(|e| panic!("cannot listen on port {port}: {e}"));
            watch(&poll, &mut listener, Token(index), Interest::READABLE);
            listeners.push((port, listener));
        }
        Self {
            poll,
            orders,
            waker: Arc::new(waker),
            listeners,
            connections,
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
                    ORDER => match self.orders.load(Ordering::Acquire) {
                        END => return,
                        STOP_LISTENING => self.stop_listening(),
                        _ => {}
                    },
                    Token(index) if index < FIRST_TOKEN => self.accept(index),
                    _ => self.connections.happened(&self.poll, event),
                }
            }
        }
    }

    fn accept(&mut self, index: usize) {
        // None after `stop_listening`.
        while let Some((port, listener)) = self.listeners.get(index) {
            match listener.accept() {
                Ok((stream, peer)) => self.connections.accepted(&self.poll, *port, stream, peer),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // The client was quicker to close than we to accept.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => panic!("cannot accept on port {port}: {error}"),
            }
        }
    }

    /// Closing alone would not do: a child that another test has just forked has
    /// every file of this process until it calls exec, and would keep the
    /// listeners accepting.
    fn stop_listening(&mut self) {
        for (_, listener) in self.listeners.drain(..) {
            // It cannot fail on a listener, and nothing is lost when it does.
            let _ = SockRef::from(&listener).shutdown(Shutdown::Both);
        }
    }
}

impl<C> Drop for Serving<C> {
    fn drop(&mut self) {
        for (_, listener) in &self.listeners {
            let _ = SockRef::from(listener).shutdown(Shutdown::Both);
        }
    }
}

/// What a listening socket accepts.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Accepts {
    V4,
    V6,
    Both,
    Loopback4,
    Loopback6,
}

impl Families {
    const fn sockets(self) -> &'static [Accepts] {
        match self {
            Self::V4 => &[Accepts::V4],
            Self::Split => &[Accepts::V4, Accepts::V6],
            Self::Dual => &[Accepts::Both],
            Self::Loopback => &[Accepts::Loopback4, Accepts::Loopback6],
        }
    }
}

fn listen(accepts: Accepts, port: u16) -> io::Result<TcpListener> {
    let ip: IpAddr = match accepts {
        Accepts::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Accepts::V6 | Accepts::Both => Ipv6Addr::UNSPECIFIED.into(),
        Accepts::Loopback4 => Ipv4Addr::LOCALHOST.into(),
        Accepts::Loopback6 => Ipv6Addr::LOCALHOST.into(),
    };
    let address = SocketAddr::new(ip, port);
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM.nonblocking(),
        None,
    )?;
    if ip.is_ipv6() {
        socket.set_only_v6(accepts != Accepts::Both)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(TcpListener::from_std(socket.into()))
}

/// Watches for `interest`, edge by edge.
///
/// # Panics
///
/// When the kernel has no memory.
pub(crate) fn watch(
    poll: &Poll,
    source: &mut (impl Source + AsFd),
    token: Token,
    interest: Interest,
) {
    poll.registry()
        .register(source, token, interest)
        .expect("an open socket can be watched");
}

/// The original destination of an accepted connection, or the errno of
/// `SO_ORIGINAL_DST`.
pub(crate) fn original_destination(
    stream: &TcpStream,
    peer: SocketAddr,
) -> Result<SocketAddr, i32> {
    let socket = SockRef::from(stream);
    // A client of IPv4 on a listener of IPv6 has an IPv4-mapped address.
    let answer = match peer.ip().to_canonical() {
        IpAddr::V4(_) => socket.original_dst_v4(),
        IpAddr::V6(_) => socket.original_dst_v6(),
    };
    answer
        .map(|addr| addr.as_socket().expect("an address of IPv4 or IPv6"))
        .map_err(|error| error.raw_os_error().unwrap_or(0))
}
