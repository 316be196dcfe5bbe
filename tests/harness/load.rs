//! Connections that are used in every way at once, with every byte checked.
//!
//! What happens on a connection follows from its number and a seed, so both ends
//! know what to expect: how much comes each way, and whether one of them is going
//! to break it off. When things happen is left to chance.

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr},
    time::{Duration, Instant},
};

use mio::{
    Events, Interest, Poll, Token,
    net::{TcpListener, TcpStream},
};
use nix::libc;
use socket2::{Domain, SockRef, Socket, Type};

use crate::{
    deadline::DEADLINE,
    pattern::{Pattern, mix},
};

/// The largest message, in bytes: what is given to one write().
const LARGEST: u64 = 1 << 20;
/// The most that goes one way, in bytes, but for the last message.
const MOST: u64 = 4 << 20;
/// The longest that a reader rests.
const REST_MICROSECONDS: u64 = 50_000;
/// A client sends the number of its connection first, in so many bytes.
const HEADER: usize = 8;
/// How many bytes one connection moves before another has its turn.
const TURN: u64 = 1 << 20;

/// Numbers by chance, the same ones for the same seed.
struct Dice(u64);

impl Dice {
    fn throw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(1);
        mix(self.0)
    }

    /// Below `end`.
    fn below(&mut self, end: u64) -> u64 {
        self.throw() % end
    }

    /// From 1 to `most`, which is a power of 2: each order of magnitude as often
    /// as another.
    fn size(&mut self, most: u64) -> u64 {
        let power = self.below(u64::from(most.ilog2()) + 1);
        1 + self.below(1 << power)
    }
}

/// Who does something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Client,
    Server,
}

/// What both ends of a load have to agree on.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Everything that is drawn follows from it.
    pub seed: u64,
    /// The client says first that it has said all, and the server when it has
    /// read that; else it is either of them, or both at once.
    pub client_ends_first: bool,
}

/// What is to happen on one connection.
#[derive(Clone, Copy, Debug)]
struct Plan {
    number: u64,
    seed: u64,
    /// Bytes from the client to the server.
    there: u64,
    /// Bytes from the server to the client.
    back: u64,
    /// Who says first that it has said all. The other does when it has read that,
    /// and has sent all; `None` is when each does as soon as it has sent all.
    first: Option<Who>,
    end: Ending,
}

/// How a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    /// Each half when all of it was sent.
    Well,
    /// Somebody has enough when so many bytes have gone through its end.
    Broken { by: Who, after: u64, reset: bool },
}

impl Plan {
    fn new(rules: Rules, number: u64) -> Self {
        let mut dice = Dice(mix(rules.seed ^ mix(number)));
        let (there, back) = (dice.size(MOST), dice.size(MOST));
        let by = [Who::Client, Who::Server][usize::from(dice.below(2) == 0)];
        let end = match dice.below(8) {
            0 => Ending::Broken {
                by,
                after: dice.below(there + back),
                reset: dice.below(2) == 0,
            },
            _ => Ending::Well,
        };
        let first = [Some(Who::Client), Some(Who::Server), None];
        let kinds = if rules.client_ends_first { 1 } else { 3 };
        Self {
            number,
            seed: dice.throw(),
            there,
            back,
            first: first[usize::try_from(dice.below(kinds)).expect("small")],
            end,
        }
    }

    /// The bytes that somebody sends, and how many.
    fn stream(&self, from: Who) -> (Pattern, u64) {
        match from {
            Who::Client => (Pattern::new(self.seed), self.there),
            Who::Server => (Pattern::new(!self.seed), self.back),
        }
    }
}

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum {
    /// Connections that have ended.
    pub connections: u64,
    /// Of those, such as somebody has broken off.
    pub broken: u64,
    /// Bytes that have arrived and were right.
    pub bytes: u64,
    /// How often a reader has rested.
    pub rests: u64,
}

impl std::ops::AddAssign for Sum {
    fn add_assign(&mut self, other: Self) {
        self.connections += other.connections;
        self.broken += other.broken;
        self.bytes += other.bytes;
        self.rests += other.rests;
    }
}

impl fmt::Display for Sum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            connections,
            broken,
            bytes,
            rests,
        } = self;
        write!(
            f,
            "{connections} connections, {broken} of them broken off, {} MB, {rests} rests",
            bytes / 1_000_000
        )
    }
}

/// What the ends of connections have in common.
pub struct Load {
    rules: Rules,
    poll: Poll,
    ends: HashMap<Token, End>,
    /// Those that have something to do.
    ready: VecDeque<Token>,
    next: usize,
    sum: Sum,
    /// When bytes went through any of them last.
    moved: Instant,
}

const LISTENER: Token = Token(usize::MAX);

impl Load {
    fn new(rules: Rules) -> Self {
        Self {
            rules,
            poll: Poll::new().expect("an epoll instance"),
            ends: HashMap::new(),
            ready: VecDeque::new(),
            next: 0,
            sum: Sum::default(),
            moved: Instant::now(),
        }
    }

    /// Has `at_once` connections to `server` open, with numbers from `first` on,
    /// one after the other, for `time`; from the namespace and as the owner of
    /// the calling thread. Returns when all have ended.
    ///
    /// # Errors
    ///
    /// The first that goes wrong on a connection, which includes that nothing
    /// happens on it for minutes.
    pub fn call(
        server: SocketAddr,
        rules: Rules,
        first: u64,
        at_once: usize,
        time: Duration,
    ) -> Result<Sum, String> {
        let mut load = Self::new(rules);
        let end = Instant::now() + time;
        let mut number = first;
        loop {
            let is_over = Instant::now() >= end;
            while !is_over && load.ends.len() < at_once {
                let plan = Plan::new(rules, number);
                let stream = connect(server).map_err(|error| format!("{plan:?}: {error}"))?;
                load.add(End::of_client(stream, rules, plan));
                number += 1;
            }
            if load.ends.is_empty() {
                return Ok(load.sum);
            }
            load.work(None)?;
        }
    }

    /// Is the other end of those connections, until `is_over` says so and all
    /// have ended.
    ///
    /// # Errors
    ///
    /// As [`call`](Self::call).
    pub fn answer(
        listener: Socket,
        rules: Rules,
        is_over: impl Fn() -> bool,
    ) -> Result<Sum, String> {
        listener.set_nonblocking(true).expect("an open socket");
        let mut listener = TcpListener::from_std(listener.into());
        let mut load = Self::new(rules);
        load.poll
            .registry()
            .register(&mut listener, LISTENER, Interest::READABLE)
            .expect("an open socket");
        while !is_over() || !load.ends.is_empty() {
            load.work(Some(&listener))?;
        }
        Ok(load.sum)
    }

    fn add(&mut self, mut end: End) {
        let token = Token(self.next);
        self.next += 1;
        let interest = Interest::READABLE | Interest::WRITABLE;
        self.poll
            .registry()
            .register(&mut end.stream, token, interest)
            .expect("an open socket");
        self.moved = self.moved.max(end.moved);
        self.ends.insert(token, end);
    }

    /// Waits for something to do, and does it.
    fn work(&mut self, listener: Option<&TcpListener>) -> Result<(), String> {
        /// Between two looks at those that rest and those that are stuck.
        const LOOK: Duration = Duration::from_millis(5);
        let mut events = Events::with_capacity(1024);
        let patience = if self.ready.is_empty() {
            LOOK
        } else {
            Duration::ZERO
        };
        match self.poll.poll(&mut events, Some(patience)) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => result.expect("epoll_wait"),
        }
        self.ready.extend(events.iter().map(|event| event.token()));
        self.look_at_clock()?;
        for token in std::mem::take(&mut self.ready) {
            match listener {
                Some(listener) if token == LISTENER => self.accept(listener),
                _ => self.serve(token)?,
            }
        }
        Ok(())
    }

    fn accept(&mut self, listener: &TcpListener) {
        while let Ok((stream, _)) = listener.accept() {
            let end = End::of_server(stream, self.rules);
            self.add(end);
        }
    }

    fn look_at_clock(&mut self) -> Result<(), String> {
        let now = Instant::now();
        for (token, end) in &mut self.ends {
            if end.rests_until.is_some_and(|until| until <= now) {
                end.rests_until = None;
                self.ready.push_back(*token);
            }
            // Among hundreds, one may have to wait for long until the other end has read
            // what is on the way. A connection that is stuck is still here when the
            // others have ended.
            if now.duration_since(self.moved.max(end.moved)) > DEADLINE {
                return Err(format!("nothing happens any more: {end}"));
            }
        }
        Ok(())
    }

    fn serve(&mut self, token: Token) -> Result<(), String> {
        let Some(end) = self.ends.get_mut(&token) else {
            return Ok(());
        };
        let state = end.work().map_err(|what| format!("{what}: {end}"))?;
        self.moved = self.moved.max(end.moved);
        match state {
            State::Idle => {}
            State::Busy => self.ready.push_back(token),
            State::Ended => {
                let end = self.ends.remove(&token).expect("it is here");
                self.sum += end.sum();
            }
        }
        Ok(())
    }
}

fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None)?;
    match socket.connect(&to.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(TcpStream::from_std(socket.into())),
    }
}

/// Whether there is more to do now.
enum State {
    Idle,
    Busy,
    Ended,
}

/// One end of one connection.
struct End {
    who: Who,
    rules: Rules,
    stream: TcpStream,
    /// A server has none before it has read the header.
    plan: Option<Plan>,
    dice: Dice,
    header: Vec<u8>,
    /// What is being written, and from where on.
    message: (Vec<u8>, usize),
    /// The message is the header.
    is_greeting: bool,
    sent: u64,
    read: u64,
    has_said_all: bool,
    has_read_all: bool,
    rests_until: Option<Instant>,
    rests: u64,
    /// When bytes went through it last.
    moved: Instant,
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            who, sent, read, ..
        } = self;
        write!(
            f,
            "{who:?} has sent {sent} and read {read}, of {:?}, {:?}",
            self.plan, self.stream
        )
    }
}

impl End {
    fn of_client(stream: TcpStream, rules: Rules, plan: Plan) -> Self {
        let mut end = Self::new(Who::Client, stream, rules);
        end.message.0 = plan.number.to_be_bytes().to_vec();
        end.is_greeting = true;
        end.plan = Some(plan);
        end
    }

    fn of_server(stream: TcpStream, rules: Rules) -> Self {
        Self::new(Who::Server, stream, rules)
    }

    fn new(who: Who, stream: TcpStream, rules: Rules) -> Self {
        Self {
            who,
            rules,
            stream,
            plan: None,
            dice: Dice(mix(rules.seed ^ who as u64)),
            header: Vec::new(),
            message: (Vec::new(), 0),
            is_greeting: false,
            sent: 0,
            read: 0,
            has_said_all: false,
            has_read_all: false,
            rests_until: None,
            rests: 0,
            moved: Instant::now(),
        }
    }

    fn sum(&self) -> Sum {
        let broken = self.plan.is_none_or(|plan| plan.end != Ending::Well);
        Sum {
            connections: 1,
            broken: u64::from(broken),
            bytes: self.read,
            rests: self.rests,
        }
    }

    /// Reads and writes as far as there is something to; what is wrong, if
    /// anything is.
    fn work(&mut self) -> Result<State, String> {
        let before = self.sent + self.read;
        let moved = loop {
            let moved = self.sent + self.read - before;
            if self.breaks_off() {
                return Ok(State::Ended);
            }
            let step = self
                .read_some()
                .and_then(|read| Ok(read | self.send_some()?));
            match step {
                Ok(true) if moved < TURN => {}
                Ok(_) => break moved,
                Err(Failure::Wrong(what)) => return Err(what),
                Err(Failure::Io(error)) => return self.judge(&error),
            }
        };
        if moved > 0 {
            self.moved = Instant::now();
        }
        Ok(
            match (self.has_said_all && self.has_read_all, moved >= TURN) {
                (true, _) => State::Ended,
                (_, true) => State::Busy,
                _ => State::Idle,
            },
        )
    }

    /// An error is to be expected where one end breaks off.
    fn judge(&self, error: &io::Error) -> Result<State, String> {
        match self.plan {
            Some(plan) if plan.end == Ending::Well => Err(error.to_string()),
            _ => Ok(State::Ended),
        }
    }

    /// Whether this end has had enough, and leaves without more ado.
    fn breaks_off(&self) -> bool {
        let Some(Plan {
            end: Ending::Broken { by, after, reset },
            ..
        }) = self.plan
        else {
            return false;
        };
        let is_time = by == self.who && self.sent + self.read >= after;
        if is_time && reset {
            // It may be gone by itself.
            let _ = SockRef::from(&self.stream).set_linger(Some(Duration::ZERO));
        }
        is_time
    }

    fn read_some(&mut self) -> Result<bool, Failure> {
        if self.has_read_all || self.rests_until.is_some() {
            return Ok(false);
        }
        if self.who == Who::Server && self.plan.is_none() {
            return self.read_header();
        }
        let mut buffer = vec![0; usize::try_from(self.dice.size(1 << 18)).expect("small")];
        let Some(read) = would_block(self.stream.read(&mut buffer))? else {
            return Ok(false);
        };
        self.check(&buffer[..read])?;
        if self.dice.below(64) == 0 && read > 0 {
            let rest = self.dice.below(REST_MICROSECONDS);
            self.rests_until = Some(Instant::now() + Duration::from_micros(rest));
            self.rests += 1;
        }
        Ok(true)
    }

    fn read_header(&mut self) -> Result<bool, Failure> {
        let mut buffer = [0; HEADER];
        let missing = buffer.len() - self.header.len();
        let Some(read) = would_block(self.stream.read(&mut buffer[..missing]))? else {
            return Ok(false);
        };
        if read == 0 {
            // Broken off before it has begun.
            return Err(Failure::Io(io::ErrorKind::UnexpectedEof.into()));
        }
        self.header.extend(&buffer[..read]);
        if let Ok(number) = self.header.as_slice().try_into() {
            self.plan = Some(Plan::new(self.rules, u64::from_be_bytes(number)));
        }
        Ok(true)
    }

    /// Compares what came with what has to come; nothing is the end.
    fn check(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        let plan = self.plan.expect("it is known before it is checked");
        let from = match self.who {
            Who::Client => Who::Server,
            Who::Server => Who::Client,
        };
        let (pattern, total) = plan.stream(from);
        if bytes.is_empty() {
            self.has_read_all = true;
            return match plan.end {
                Ending::Well if self.read < total => {
                    Err(Failure::Wrong(format!("the end came before {total} bytes")))
                }
                Ending::Broken { .. } if self.read < total => {
                    Err(Failure::Io(io::ErrorKind::UnexpectedEof.into()))
                }
                Ending::Well | Ending::Broken { .. } => Ok(()),
            };
        }
        pattern.check(self.read, bytes).map_err(Failure::Wrong)?;
        self.read += bytes.len() as u64;
        if self.read > total {
            return Err(Failure::Wrong(format!("more than {total} bytes came")));
        }
        Ok(())
    }

    fn send_some(&mut self) -> Result<bool, Failure> {
        let Some(plan) = self.plan.filter(|_| !self.has_said_all) else {
            return Ok(false);
        };
        let (pattern, total) = plan.stream(self.who);
        let (message, start) = &mut self.message;
        if *start < message.len() {
            let Some(sent) = would_block(self.stream.write(&message[*start..]))? else {
                return Ok(false);
            };
            *start += sent;
            self.sent += if self.is_greeting { 0 } else { sent as u64 };
            return Ok(true);
        }
        self.is_greeting = false;
        if self.sent == total {
            if !self.has_read_all && plan.first.is_some_and(|first| first != self.who) {
                return Ok(false);
            }
            self.stream.shutdown(Shutdown::Write)?;
            self.has_said_all = true;
            return Ok(true);
        }
        let size = self.dice.size(LARGEST).min(total - self.sent);
        let size = usize::try_from(size).expect("small");
        self.message = (pattern.bytes(self.sent, size), 0);
        Ok(true)
    }
}

/// Why an end cannot go on.
enum Failure {
    /// The connection has ended.
    Io(io::Error),
    /// What has come is not what was sent.
    Wrong(String),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// `None` when it would have to wait.
fn would_block(result: io::Result<usize>) -> Result<Option<usize>, Failure> {
    match result {
        Ok(count) => Ok(Some(count)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        // Not connected yet.
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(None),
        Err(error) => Err(Failure::Io(error)),
    }
}
