//! The application that calls: one job each, and what it measured.

use std::{
    io::{self, BufRead, ErrorKind, Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    os::fd::AsFd,
    thread,
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        prctl,
        socket::{setsockopt, sockopt::IpBindAddressNoPort},
    },
    time::ClockId,
};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Socket, Type};

use crate::{
    role,
    server::{self, HEAD},
    times::{Times, nanoseconds},
};

/// What the client does: each time that it is told to by a line on its standard input,
/// which says for how many nanoseconds. Whatever connection it keeps is open when it says
/// [`role::READY`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Job {
    /// Requests one after the other on one connection, with answers as long.
    Requests {
        to: SocketAddr,
        /// Bytes.
        size: usize,
    },
    /// Connections at a constant rate, each closed at once.
    Connects {
        to: SocketAddr,
        /// In one second.
        rate: u32,
    },
    /// Connections as fast as possible, each with one request of 64 bytes.
    Cycles { to: SocketAddr, threads: usize },
    /// As many bytes as possible, on one connection.
    Bulk { to: SocketAddr },
    /// Opens connections and makes so many requests on each; it is told nothing, and holds
    /// them until its standard input ends.
    Hold {
        to: SocketAddr,
        count: usize,
        from: Option<IpAddr>,
        requests: usize,
    },
}

impl Job {
    /// Whether others would be measured with it if they ran when they like.
    /// Nothing that keeps a processor busy may have precedence.
    pub(crate) const fn wants_precedence(&self) -> bool {
        matches!(self, Self::Connects { .. })
    }
}

/// What `Requests` and `Connects` measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Latency {
    /// How many calls there were, those for warming up included.
    pub(crate) count: u64,
    /// From when each was planned to begin; of requests, each of which begins when the one
    /// before has been answered, from when it did.
    pub(crate) times: Times,
    /// From when it did begin.
    pub(crate) calls: Times,
    /// CPU time of the client, in nanoseconds.
    pub(crate) cpu: u64,
}

/// What `Cycles` and `Bulk` measured.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Done {
    /// Connections, or bytes.
    pub(crate) count: u64,
    /// Nanoseconds.
    pub(crate) took: u64,
    /// CPU time of the client, in nanoseconds.
    pub(crate) cpu: u64,
}

/// Does the job whenever it is told to, until its standard input ends.
pub(crate) fn run(job: &Job) -> anyhow::Result<()> {
    // A sleep ends when it should, not up to 50 µs later.
    prctl::set_timerslack(1)?;
    match *job {
        Job::Requests { to, size } => {
            let mut requests = Requests::start(to, size)?;
            in_turns(|time| requests.make(time))
        }
        Job::Connects { to, rate } => in_turns(|time| connects(to, rate, time)),
        Job::Cycles { to, threads } => in_turns(|time| cycles(to, threads, time)),
        Job::Bulk { to } => {
            let mut flow = Flow::start(to)?;
            in_turns(|time| flow.measure(time))
        }
        Job::Hold {
            to,
            count,
            from,
            requests,
        } => Ok(hold(to, count, from, requests)?),
    }
}

/// Works for as long as each line of standard input says, and answers with what was
/// measured, behind the number of the turn.
fn in_turns<T: Serialize>(mut work: impl FnMut(Duration) -> io::Result<T>) -> anyhow::Result<()> {
    role::tell(role::READY);
    for (number, line) in io::stdin().lock().lines().enumerate() {
        let measured = work(Duration::from_nanos(line?.parse()?))?;
        role::tell(&format!("{number} {}", serde_json::to_string(&measured)?));
    }
    Ok(())
}

/// No answer takes longer.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Before the first turn of a connection that is kept: it is spliced a while after it was
/// opened.
const WARM_UP: Duration = Duration::from_millis(250);

/// Before each turn: others have used the processor's caches, and TCP begins anew after
/// a rest.
const WARM_AGAIN: Duration = Duration::from_millis(5);

fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(to)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    Ok(stream)
}

/// CPU time of this process.
fn cpu() -> io::Result<Duration> {
    Ok(ClockId::CLOCK_PROCESS_CPUTIME_ID.now()?.into())
}

/// A connection as most programs with more than one have it: non-blocking, and
/// waited for when there is nothing to do.
struct Patient(TcpStream);

impl Patient {
    fn connect(to: SocketAddr) -> io::Result<Self> {
        let stream = connect(to)?;
        stream.set_nonblocking(true)?;
        Ok(Self(stream))
    }

    fn write_all(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.0.write(bytes) {
                Ok(written) => bytes = &bytes[written..],
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.wait(PollFlags::POLLOUT)?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn read_exact(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        let mut filled = 0;
        while filled < bytes.len() {
            match self.read_now(&mut bytes[filled..])? {
                0 => self.wait(PollFlags::POLLIN)?,
                read => filled += read,
            }
        }
        Ok(())
    }

    /// What is there now, which may be nothing.
    fn read_now(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self.0.read(bytes) {
            Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(0),
            done => done,
        }
    }

    fn wait(&self, wanted: PollFlags) -> io::Result<()> {
        let timeout = PollTimeout::try_from(TIMEOUT).unwrap_or(PollTimeout::MAX);
        let mut files = [PollFd::new(self.0.as_fd(), wanted)];
        match poll(&mut files, timeout)? {
            0 => Err(ErrorKind::TimedOut.into()),
            _ => Ok(()),
        }
    }
}

/// A connection with requests of one size.
struct Requests {
    stream: Patient,
    request: Vec<u8>,
    answer: Vec<u8>,
}

impl Requests {
    fn start(to: SocketAddr, size: usize) -> io::Result<Self> {
        let size = size.max(HEAD);
        let mut request = vec![0; size];
        request[..HEAD].copy_from_slice(&server::head(size as u64, size as u64));
        let mut requests = Self {
            stream: Patient::connect(to)?,
            request,
            answer: vec![0; size],
        };
        requests.repeat(WARM_UP)?;
        Ok(requests)
    }

    fn make(&mut self, time: Duration) -> io::Result<Latency> {
        let before = cpu()?;
        let warm = self.repeat(WARM_AGAIN)?;
        let times = self.repeat(time)?;
        Ok(Latency {
            // What the others spend their CPU time on, too.
            count: warm.count() + times.count(),
            calls: times.clone(),
            times,
            cpu: nanoseconds(cpu()? - before),
        })
    }

    fn repeat(&mut self, time: Duration) -> io::Result<Times> {
        let mut times = Times::new();
        let end = Instant::now() + time;
        while Instant::now() < end {
            let start = Instant::now();
            self.stream.write_all(&self.request)?;
            self.stream.read_exact(&mut self.answer)?;
            times.record(start.elapsed());
        }
        Ok(times)
    }
}

/// How many connections of each turn do not count: others have used the processor's caches.
const COLD: u32 = 5;

/// Before a moment, the rest of the wait is spent awake.
const AWAKE: Duration = Duration::from_micros(80);

fn connects(to: SocketAddr, rate: u32, time: Duration) -> io::Result<Latency> {
    let interval = Duration::from_secs(1) / rate;
    let planned = u32::try_from(time.as_nanos() / interval.as_nanos()).unwrap_or(u32::MAX);
    let (mut times, mut calls) = (Times::new(), Times::new());
    let before = cpu()?;
    let start = Instant::now() + interval;
    for number in 0..COLD + planned {
        let plan = start + interval * number;
        wait_until(plan);
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        let called = Instant::now();
        socket.connect(&to.into())?;
        if number < COLD {
            continue;
        }
        // What was late because the one before it was slow counts as slow.
        times.record(plan.elapsed());
        calls.record(called.elapsed());
    }
    Ok(Latency {
        count: calls.count(),
        times,
        calls,
        cpu: nanoseconds(cpu()? - before),
    })
}

fn wait_until(moment: Instant) {
    if let Some(rest) = moment.checked_duration_since(Instant::now())
        && rest > AWAKE
    {
        thread::sleep(rest - AWAKE);
    }
    while Instant::now() < moment {
        std::hint::spin_loop();
    }
}

/// The request of a connection that is there for its own sake.
const SMALL: usize = 64;

fn one_request(stream: &mut TcpStream) -> io::Result<()> {
    let mut bytes = [0; SMALL];
    bytes[..HEAD].copy_from_slice(&server::head(SMALL as u64, SMALL as u64));
    stream.write_all(&bytes)?;
    stream.read_exact(&mut bytes)
}

fn cycles(to: SocketAddr, threads: usize, time: Duration) -> io::Result<Done> {
    let before = cpu()?;
    let start = Instant::now();
    let cycle = || -> io::Result<u64> {
        let mut count = 0;
        while start.elapsed() < time {
            one_request(&mut connect(to)?)?;
            count += 1;
        }
        Ok(count)
    };
    let counts: io::Result<Vec<u64>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(cycle)).collect();
        let join = |thread: thread::ScopedJoinHandle<'_, _>| {
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        threads.into_iter().map(join).collect()
    });
    Ok(Done {
        count: counts?.iter().sum(),
        took: nanoseconds(start.elapsed()),
        cpu: nanoseconds(cpu()? - before),
    })
}

/// Bytes of one request of `bulk`, and of its answer.
const BLOCK: usize = 1024 * 1024;
const RECEIPT: usize = 1;

/// Blocks on their way, and receipts on their way back.
struct Flow {
    stream: Patient,
    block: Vec<u8>,
}

impl Flow {
    fn start(to: SocketAddr) -> io::Result<Self> {
        let mut block = vec![0; BLOCK];
        block[..HEAD].copy_from_slice(&server::head(BLOCK as u64, RECEIPT as u64));
        let mut flow = Self {
            stream: Patient::connect(to)?,
            block,
        };
        flow.send_until(Instant::now() + WARM_UP)?;
        Ok(flow)
    }

    fn measure(&mut self, time: Duration) -> io::Result<Done> {
        self.send_until(Instant::now() + WARM_AGAIN)?;
        let before = cpu()?;
        let start = Instant::now();
        let count = self.send_until(start + time)?;
        Ok(Done {
            count,
            took: nanoseconds(start.elapsed()),
            cpu: nanoseconds(cpu()? - before),
        })
    }

    /// Returns how many bytes have been sent and received when the last of them
    /// has its receipt.
    fn send_until(&mut self, end: Instant) -> io::Result<u64> {
        let mut receipts = [0; 64];
        let (mut sent, mut received) = (0, 0);
        while Instant::now() < end {
            self.stream.write_all(&self.block)?;
            sent += 1;
            received += self.stream.read_now(&mut receipts)?;
        }
        let mut rest = vec![0; sent * RECEIPT - received];
        self.stream.read_exact(&mut rest)?;
        Ok((sent * BLOCK) as u64)
    }
}

fn hold(to: SocketAddr, count: usize, from: Option<IpAddr>, requests: usize) -> io::Result<()> {
    let mut held = Vec::with_capacity(count);
    for _ in 0..count {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        if let Some(from) = from {
            setsockopt(&socket, IpBindAddressNoPort, &true)?;
            socket.bind(&SocketAddr::from((from, 0)).into())?;
        }
        // When they all end at once, they end at once everywhere.
        socket.set_linger(Some(Duration::ZERO))?;
        socket.connect(&to.into())?;
        let mut stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(TIMEOUT))?;
        for _ in 0..requests {
            one_request(&mut stream)?;
        }
        held.push(stream);
    }
    role::tell(role::READY);
    // Ends when whoever started this process has gone, too.
    for line in io::stdin().lock().lines() {
        drop(line?);
    }
    Ok(())
}
