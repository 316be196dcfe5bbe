//! Connections that are tried out, many at a time.

use std::{
    collections::HashMap,
    fmt,
    io::{self, Read},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use mio::{Events, Interest, Poll, Token, net};
use nix::{
    errno::Errno,
    sys::socket::{setsockopt, sockopt},
};
use socket2::{Domain, Socket, Type};

use crate::{Greeting, Netns, Owner};

/// How long a connection may stay without an answer, while no other of the trial has
/// begun or ended, before it counts as [`Outcome::Silent`]: longer than the kernel takes to
/// send a lost SYN again.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// How many connections are tried at the same time.
const WINDOW: usize = 512;

/// How a connection chooses its source.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub enum Source {
    /// The kernel does, in connect().
    Unbound,
    /// This address, with a port from the kernel at bind().
    Addr(IpAddr),
    /// This address, with a port from the kernel at connect()
    /// (IP_BIND_ADDRESS_NO_PORT), as Envoy does.
    AddrLatePort(IpAddr),
    /// This port, with an address from the kernel at connect().
    Port(u16),
}

impl Source {
    /// What bind() is given for a connection to `destination`; `None` when it is
    /// not called.
    fn address(self, destination: SocketAddr) -> Option<SocketAddr> {
        match self {
            Self::Unbound => None,
            Self::Addr(ip) | Self::AddrLatePort(ip) => Some((ip, 0).into()),
            Self::Port(port) if destination.is_ipv4() => Some((Ipv4Addr::UNSPECIFIED, port).into()),
            Self::Port(port) => Some((Ipv6Addr::UNSPECIFIED, port).into()),
        }
    }
}

/// One connection to try.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub struct Probe {
    /// Who opens the socket.
    pub owner: Owner,
    /// Where it comes from.
    pub source: Source,
    /// What it asks for.
    pub destination: SocketAddr,
}

impl Probe {
    /// A connection from an unbound socket.
    pub fn new(owner: Owner, destination: impl Into<SocketAddr>) -> Self {
        Self {
            owner,
            source: Source::Unbound,
            destination: destination.into(),
        }
    }

    /// The same from another source.
    pub fn from(self, source: Source) -> Self {
        Self { source, ..self }
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} from ", self.owner)?;
        match self.source {
            Source::Unbound => write!(f, "an unbound socket")?,
            Source::Addr(ip) => write!(f, "{ip}")?,
            Source::AddrLatePort(ip) => write!(f, "{ip} (late port)")?,
            Source::Port(port) => write!(f, "port {port}")?,
        }
        write!(f, " to {}", self.destination)
    }
}

/// How a connection ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A responder answered.
    Answered(Greeting),
    /// It was refused (ECONNREFUSED).
    Refused,
    /// It was accepted, and then closed or reset before anybody answered.
    Closed,
    /// Nothing came back, and no connection of its trial began or ended for the [`DEADLINE`].
    Silent,
    /// A system call failed in another way.
    Failed(Errno),
}

/// `pod:15001`: who answered, or `refused`, `closed`, `silent`, or the errno.
impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Answered(greeting) => write!(f, "{}:{}", greeting.place, greeting.listener),
            Self::Refused => f.write_str("refused"),
            Self::Closed => f.write_str("closed"),
            Self::Silent => f.write_str("silent"),
            Self::Failed(errno) => write!(f, "{errno}"),
        }
    }
}

/// What the client of a connection saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// How it ended.
    pub outcome: Outcome,
    /// The answer to getpeername(), once connected.
    pub peername: Option<SocketAddr>,
    /// The answer to getsockname(), once connected.
    pub sockname: Option<SocketAddr>,
}

impl Answer {
    /// One of a socket that was never connected.
    fn without(outcome: Outcome) -> Self {
        Self {
            outcome,
            peername: None,
            sockname: None,
        }
    }

    /// The responder's greeting.
    ///
    /// # Panics
    ///
    /// When none answered.
    #[track_caller]
    pub fn greeting(&self) -> &Greeting {
        let Outcome::Answered(greeting) = &self.outcome else {
            panic!("no responder answered: {self:?}");
        };
        greeting
    }
}

/// Tries one connection out.
///
/// # Panics
///
/// As [`probe_all`].
pub fn probe(netns: &Netns, probe: &Probe) -> Answer {
    probe_all(netns, std::slice::from_ref(probe)).remove(0)
}

/// Tries connections out, from `netns`, and closes each when it has its answer;
/// the answers are in the order of the probes.
///
/// # Panics
///
/// When a socket cannot be made at all; what the network does is an answer.
pub fn probe_all(netns: &Netns, probes: &[Probe]) -> Vec<Answer> {
    let closed = |(answer, stream)| {
        drop::<Option<TcpStream>>(stream);
        answer
    };
    netns.run(|| Trial::new(probes).run(closed))
}

/// Opens connections from `netns` and keeps them open: each with its answer,
/// and the stream where a responder answered. It echoes what it is sent.
///
/// # Panics
///
/// As [`probe_all`].
pub fn connect_all(netns: &Netns, probes: &[Probe]) -> Vec<(Answer, Option<TcpStream>)> {
    netns.run(|| connect_all_here(probes))
}

/// The same from the namespace of the calling thread, which takes on the
/// identity of the last probe.
///
/// # Panics
///
/// As [`probe_all`].
pub fn connect_all_here(probes: &[Probe]) -> Vec<(Answer, Option<TcpStream>)> {
    Trial::new(probes).run(|kept| kept)
}

/// Probes on their way.
struct Trial<'a> {
    probes: &'a [Probe],
    poll: Poll,
    /// By the index of the probe.
    attempts: HashMap<usize, Attempt>,
    /// When one of them began or ended last: hundreds at once may take a slow machine longer
    /// than one may wait.
    moved: Instant,
}

impl<'a> Trial<'a> {
    fn new(probes: &'a [Probe]) -> Self {
        Self {
            probes,
            poll: Poll::new().expect("an epoll instance"),
            attempts: HashMap::new(),
            moved: Instant::now(),
        }
    }

    /// Tries all of them, and gives each that has ended to `end`.
    fn run<T>(mut self, mut end: impl FnMut((Answer, Option<TcpStream>)) -> T) -> Vec<T> {
        let mut ended: Vec<Option<T>> = self.probes.iter().map(|_| None).collect();
        let mut events = Events::with_capacity(WINDOW);
        let mut next = 0;
        loop {
            while next < self.probes.len() && self.attempts.len() < WINDOW {
                match Attempt::start(&self.probes[next]) {
                    Ok(attempt) => self.watch(next, attempt),
                    Err(errno) => ended[next] = Some(end((Answer::without(failed(errno)), None))),
                }
                next += 1;
            }
            let Some(patience) = self.patience() else {
                return ended.into_iter().map(|e| e.expect("all ended")).collect();
            };
            match self.poll.poll(&mut events, Some(patience)) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => result.expect("epoll_wait"),
            }
            for index in events.iter().map(|event| event.token().0) {
                if let Some(attempt) = self.attempts.get_mut(&index)
                    && let Some(outcome) = attempt.progress()
                {
                    ended[index] = Some(end(self.take(index, outcome)));
                }
            }
            for index in self.expired() {
                ended[index] = Some(end(self.take(index, Outcome::Silent)));
            }
        }
    }

    fn watch(&mut self, index: usize, mut attempt: Attempt) {
        self.moved = Instant::now();
        let interest = Interest::READABLE | Interest::WRITABLE;
        self.poll
            .registry()
            .register(&mut attempt.stream, Token(index), interest)
            .expect("an open socket can be watched");
        self.attempts.insert(index, attempt);
    }

    fn take(&mut self, index: usize, outcome: Outcome) -> (Answer, Option<TcpStream>) {
        let mut attempt = self.attempts.remove(&index).expect("it is on its way");
        self.moved = Instant::now();
        self.poll
            .registry()
            .deregister(&mut attempt.stream)
            .expect("it was watched");
        let answered = matches!(outcome, Outcome::Answered(_));
        let answer = Answer {
            outcome,
            peername: attempt.peername,
            sockname: attempt.sockname,
        };
        (answer, answered.then(|| attempt.into_std()))
    }

    /// How long until those that are on their way have waited enough; `None` when there
    /// are none.
    fn patience(&self) -> Option<Duration> {
        (!self.attempts.is_empty()).then(|| DEADLINE.saturating_sub(self.moved.elapsed()))
    }

    /// Those that have waited enough.
    fn expired(&self) -> Vec<usize> {
        match self.patience() {
            Some(Duration::ZERO) => self.attempts.keys().copied().collect(),
            _ => Vec::new(),
        }
    }
}

/// One probe on its way.
struct Attempt {
    stream: net::TcpStream,
    received: Vec<u8>,
    peername: Option<SocketAddr>,
    sockname: Option<SocketAddr>,
}

impl Attempt {
    fn start(probe: &Probe) -> Result<Self, Errno> {
        Ok(Self {
            stream: open(probe).map_err(|error| errno_of(&error))?,
            received: Vec::new(),
            peername: None,
            sockname: None,
        })
    }

    /// Goes as far as it can without waiting; the outcome, once there is one.
    fn progress(&mut self) -> Option<Outcome> {
        if self.peername.is_none() {
            if let Some(error) = self.stream.take_error().expect("SO_ERROR") {
                return Some(failed(errno_of(&error)));
            }
            match self.stream.peer_addr() {
                Ok(peername) => self.peername = Some(peername),
                Err(error) if error.kind() == io::ErrorKind::NotConnected => return None,
                Err(error) => return Some(failed(errno_of(&error))),
            }
            self.sockname = Some(self.stream.local_addr().expect("getsockname"));
        }
        self.read_greeting()
    }

    fn read_greeting(&mut self) -> Option<Outcome> {
        let mut chunk = [0; 1024];
        loop {
            match self.stream.read(&mut chunk) {
                Ok(0) => return Some(Outcome::Closed),
                Ok(read) => self.received.extend_from_slice(&chunk[..read]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Some(Outcome::Closed);
                }
                Err(error) => return Some(failed(errno_of(&error))),
            }
            if self.received.ends_with(b"\n") {
                let greeting = serde_json::from_slice(&self.received)
                    .unwrap_or_else(|e| panic!("no responder speaks like this: {e}"));
                return Some(Outcome::Answered(greeting));
            }
        }
    }

    fn into_std(self) -> TcpStream {
        let stream = TcpStream::from(OwnedFd::from(self.stream));
        stream.set_nonblocking(false).expect("an open socket");
        stream
            .set_read_timeout(Some(DEADLINE))
            .expect("an open socket");
        stream
    }
}

/// Opens the socket as the probe's owner and starts to connect it.
fn open(probe: &Probe) -> io::Result<net::TcpStream> {
    probe.owner.assume();
    let domain = Domain::for_address(probe.destination);
    let socket = Socket::new(domain, Type::STREAM.nonblocking(), None).expect("a new socket");
    if let Source::AddrLatePort(_) = probe.source {
        setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
    }
    if let Source::Port(_) = probe.source {
        // The port is wanted again before TIME_WAIT would be over.
        socket.set_linger(Some(Duration::ZERO))?;
    }
    if let Some(source) = probe.source.address(probe.destination) {
        socket.bind(&source.into())?;
    }
    match socket.connect(&probe.destination.into()) {
        Err(error) if errno_of(&error) != Errno::EINPROGRESS => Err(error),
        _ => Ok(net::TcpStream::from_std(socket.into())),
    }
}

fn failed(errno: Errno) -> Outcome {
    if errno == Errno::ECONNREFUSED {
        Outcome::Refused
    } else {
        Outcome::Failed(errno)
    }
}

fn errno_of(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(0))
}
