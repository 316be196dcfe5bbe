//! A small proxy: it passes bytes on, as a sidecar does that looks into
//! nothing.

use std::{
    collections::{HashMap, VecDeque},
    io::{self, Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddr},
    os::fd::AsRawFd,
    time::Duration,
};

use mio::{Interest, Poll, Token, event::Event, net::TcpStream};
use nix::libc;
use socket2::{Domain, SockRef, Socket, Type};

use crate::{
    Netns, Owner,
    service::{Connections, FIRST_TOKEN, Families, Service, original_destination, watch},
};

/// Where connections that leave the pod are sent.
const OUTBOUND: u16 = 15001;
/// Where connections that come into the pod are sent.
const INBOUND: u16 = 15006;
/// From where the application is called: such a connection is never redirected.
const SIDECAR_SOURCE: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 6);

/// How much one direction of a connection may hold, in bytes: what is above
/// stays with the sender.
const LIMIT: usize = 128 * 1024;
/// How much is passed on before another connection has its turn, in bytes.
const TURN: usize = 1024 * 1024;

/// A sidecar of a pod, on its usual ports: one thread, non-blocking sockets,
/// owned by [`Owner::PROXY`]. Half-closes, resets and urgent bytes are passed on
/// as well. It ends when it is dropped.
#[derive(Debug)]
pub struct Proxy {
    service: Service,
}

impl Proxy {
    /// Starts one. Several can serve one pod (SO_REUSEPORT).
    ///
    /// # Panics
    ///
    /// When it cannot listen.
    pub fn start(netns: &Netns) -> Self {
        Self {
            service: Service::start(
                Some(netns.entrance()),
                Owner::PROXY,
                (Families::V4, &[OUTBOUND, INBOUND]),
                Passing::default(),
            ),
        }
    }

    /// Has it take no more connections, soon, as one that is about to be
    /// replaced; those that it has go on.
    pub fn stop_listening(&self) {
        self.service.stop_listening();
    }
}

/// The thread's side.
#[derive(Default)]
struct Passing {
    pairs: HashMap<usize, Pair>,
    next: usize,
}

impl Connections for Passing {
    fn accepted(&mut self, poll: &Poll, port: u16, stream: TcpStream, peer: SocketAddr) {
        let Some(upstream) = upstream(port, &stream, peer) else {
            return reset(&stream);
        };
        let number = self.next;
        self.next += 1;
        let mut pair = Pair::new([stream, upstream]);
        pair.watch(poll, number);
        self.pairs.insert(number, pair);
    }

    fn happened(&mut self, poll: &Poll, event: &Event) {
        let (number, side) = pair_of(event.token());
        let Some(pair) = self.pairs.get_mut(&number) else {
            return;
        };
        pair.connected |= side == UPSTREAM && event.is_writable();
        let state = if event.is_error() {
            State::Broken
        } else {
            pair.pass()
        };
        match state {
            State::Idle => {}
            State::Busy => pair.take_turn(poll, number),
            State::Done => drop(self.pairs.remove(&number)),
            State::Broken => {
                pair.streams.iter().for_each(reset);
                self.pairs.remove(&number);
            }
        }
    }
}

/// The two sides of a pair: who called, and who was called for it.
const DOWNSTREAM: usize = 0;
const UPSTREAM: usize = 1;

fn token_of(number: usize, side: usize) -> Token {
    Token(FIRST_TOKEN + 2 * number + side)
}

fn pair_of(token: Token) -> (usize, usize) {
    let index = token.0 - FIRST_TOKEN;
    (index / 2, index % 2)
}

/// Calls whom the client of `stream` wanted; `None` when that is not known, or
/// there is no way.
fn upstream(port: u16, stream: &TcpStream, peer: SocketAddr) -> Option<TcpStream> {
    let asked = match original_destination(stream, peer) {
        Ok(asked) => asked,
        Err(_) => stream.local_addr().ok()?,
    };
    if asked.port() == port {
        // It was not redirected: it would come back for ever.
        return None;
    }
    let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None).ok()?;
    if port == INBOUND {
        let source = SocketAddr::from((SIDECAR_SOURCE, 0));
        socket.bind(&source.into()).ok()?;
    }
    match socket.connect(&asked.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => None,
        _ => Some(TcpStream::from_std(socket.into())),
    }
}

/// Has the connection end with a reset when it is closed.
fn reset(stream: &TcpStream) {
    // It may have ended by itself.
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

/// What there is to do for a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing until something happens.
    Idle,
    /// More, after the others had their turn.
    Busy,
    /// Both directions have ended.
    Done,
    /// One side has ended without a farewell: so must the other.
    Broken,
}

/// Two connections that are one to those at its ends.
struct Pair {
    streams: [TcpStream; 2],
    /// By the side that it comes from.
    flows: [Flow; 2],
    /// Whether the upstream is.
    connected: bool,
}

impl Pair {
    fn new(streams: [TcpStream; 2]) -> Self {
        for stream in &streams {
            // It is there to fail later if one does now.
            let _ = stream.set_nodelay(true);
            let _ = SockRef::from(stream).set_out_of_band_inline(true);
        }
        Self {
            streams,
            flows: [Flow::default(), Flow::default()],
            connected: false,
        }
    }

    fn watch(&mut self, poll: &Poll, number: usize) {
        for (side, stream) in self.streams.iter_mut().enumerate() {
            watch(poll, stream, token_of(number, side), INTEREST);
        }
    }

    /// Has the kernel tell again what it has told.
    fn take_turn(&mut self, poll: &Poll, number: usize) {
        for (side, stream) in self.streams.iter_mut().enumerate() {
            poll.registry()
                .reregister(stream, token_of(number, side), INTEREST)
                .expect("it is watched");
        }
    }

    /// Passes on what there is.
    fn pass(&mut self) -> State {
        if !self.connected {
            return State::Idle;
        }
        let [down, up] = &mut self.streams;
        let mut moved = 0;
        loop {
            // An error is told once: after it the same socket may seem to have
            // ended well.
            let Ok(there) = self.flows[DOWNSTREAM].pass(down, up) else {
                return State::Broken;
            };
            let Ok(back) = self.flows[UPSTREAM].pass(up, down) else {
                return State::Broken;
            };
            moved += there + back;
            if self.flows.iter().all(|flow| flow.ended_both) {
                return State::Done;
            }
            if there + back == 0 {
                return State::Idle;
            }
            if moved > TURN {
                return State::Busy;
            }
        }
    }
}

const INTEREST: Interest = Interest::READABLE
    .add(Interest::WRITABLE)
    .add(Interest::PRIORITY);

/// One direction.
#[derive(Default)]
struct Flow {
    queue: VecDeque<Piece>,
    /// Bytes in the queue.
    held: usize,
    /// Its source has sent its last byte.
    ended: bool,
    /// And its sink was told so.
    ended_both: bool,
}

/// What was read at once.
enum Piece {
    /// The bytes from an index on are to be sent.
    Bytes(Vec<u8>, usize),
    /// To be sent with MSG_OOB.
    Urgent(u8),
}

impl Piece {
    /// In bytes.
    fn length(&self) -> usize {
        match self {
            Self::Bytes(bytes, start) => bytes.len() - start,
            Self::Urgent(_) => 1,
        }
    }
}

impl Flow {
    /// Reads and writes as long as neither would block; tells how many bytes it
    /// has read and written.
    fn pass(&mut self, from: &mut TcpStream, to: &mut TcpStream) -> io::Result<usize> {
        let read = self.fill(from)?;
        let sent = self.drain(to)?;
        if self.ended && self.queue.is_empty() && !self.ended_both {
            to.shutdown(Shutdown::Write)?;
            self.ended_both = true;
        }
        Ok(read + sent)
    }

    fn fill(&mut self, from: &mut TcpStream) -> io::Result<usize> {
        let mut total = 0;
        while !self.ended && self.held < LIMIT {
            let piece = match next_piece(from, LIMIT - self.held) {
                Ok(Some(piece)) => piece,
                Ok(None) => {
                    self.ended = true;
                    break;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            };
            self.held += piece.length();
            total += piece.length();
            self.queue.push_back(piece);
        }
        Ok(total)
    }

    fn drain(&mut self, to: &mut TcpStream) -> io::Result<usize> {
        let mut total = 0;
        while let Some(piece) = self.queue.front_mut() {
            let sent = match piece {
                Piece::Bytes(bytes, start) => to.write(&bytes[*start..]),
                Piece::Urgent(byte) => SockRef::from(&*to).send_out_of_band(&[*byte]),
            };
            let sent = match sent {
                Ok(sent) => sent,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            };
            total += sent;
            self.held -= sent;
            let done = match piece {
                Piece::Urgent(_) => true,
                Piece::Bytes(bytes, start) => {
                    *start += sent;
                    *start == bytes.len()
                }
            };
            if done {
                self.queue.pop_front();
            }
        }
        Ok(total)
    }
}

nix::ioctl_read_bad!(
    /// Whether the next byte is the urgent one.
    at_mark,
    0x8905,
    libc::c_int
);

/// Reads from a socket that has urgent bytes in its stream (SO_OOBINLINE): the urgent
/// one alone, or up to it, or up to `most` bytes; `None` at the end of the stream.
///
/// An urgent byte is known by the time that it can be read, and a read that begins
/// before one ends there. So it is asked about a byte that is there already: between
/// a look at an empty queue and the read an urgent byte might come.
fn next_piece(from: &mut TcpStream, most: usize) -> io::Result<Option<Piece>> {
    if from.peek(&mut [0])? == 0 {
        return Ok(None);
    }
    let mut is_urgent = 0;
    // SAFETY: the kernel writes one int.
    unsafe { at_mark(from.as_raw_fd(), &raw mut is_urgent) }?;
    if is_urgent != 0 {
        let mut byte = [0];
        from.read_exact(&mut byte)?;
        return Ok(Some(Piece::Urgent(byte[0])));
    }
    let mut chunk = vec![0; most];
    let read = from.read(&mut chunk)?;
    chunk.truncate(read);
    Ok(Some(Piece::Bytes(chunk, 0)))
}
