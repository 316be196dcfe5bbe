//! The application that calls: one job each, and what it measured.

use std::{
    io::{self, BufRead, ErrorKind, Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    os::fd::AsFd,
    thread,
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
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
};

/// What the client does.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Job {
    /// Requests one after the other on one connection, with answers as long.
    Requests {
        to: SocketAddr,
        /// Bytes.
        size: usize,
        time: Duration,
    },
    /// Connections at a constant rate, each closed at once.
    Connects {
        to: SocketAddr,
        /// In one second.
        rate: u32,
        time: Duration,
    },
    /// Connections as fast as possible, each with one request of 64 bytes.
    Cycles {
        to: SocketAddr,
        threads: usize,
        time: Duration,
    },
    /// As many bytes as possible.
    Bulk { to: SocketAddr, time: Duration },
    /// Opens connections, makes a request on each, says [`role::READY`], and
    /// holds them until its standard input ends.
    Hold {
        to: SocketAddr,
        count: usize,
        from: Option<IpAddr>,
    },
}

impl Job {
    /// Whether others would be measured with it if they ran when they like.
    /// Nothing that keeps a processor busy may have precedence.
    pub(crate) const fn wants_precedence(&self) -> bool {
        matches!(self, Self::Connects { .. })
    }
}

/// What `Requests` and `Connects` measured. Times are in nanoseconds.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Latency {
    /// Of all calls, those for warming up included.
    pub(crate) count: u64,
    pub(crate) p50: u64,
    pub(crate) p99: u64,
    pub(crate) p999: u64,
    /// Of the call alone, wherever it began: half of them took less.
    pub(crate) call: u64,
    /// CPU time of the client.
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

/// Does the job and writes the result, as JSON.
pub(crate) fn run(job: &Job) -> anyhow::Result<()> {
    // A sleep ends when it should, not up to 50 µs later.
    prctl::set_timerslack(1)?;
    let result = match *job {
        Job::Requests { to, size, time } => serde_json::to_string(&requests(to, size, time)?),
        Job::Connects { to, rate, time } => serde_json::to_string(&connects(to, rate, time)?),
        Job::Cycles { to, threads, time } => serde_json::to_string(&cycles(to, threads, time)?),
        Job::Bulk { to, time } => serde_json::to_string(&bulk(to, time)?),
        Job::Hold { to, count, from } => return Ok(hold(to, count, from)?),
    }?;
    role::tell(&result);
    Ok(())
}

/// No answer takes longer.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Before requests and bytes are counted. A connection is spliced a while after
/// it was opened.
const WARM_UP: Duration = Duration::from_millis(250);

fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(to)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    Ok(stream)
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// CPU time of this process.
fn cpu() -> io::Result<Duration> {
    Ok(ClockId::CLOCK_PROCESS_CPUTIME_ID.now()?.into())
}

/// Latencies up to a minute, to three digits.
fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("these bounds make sense")
}

fn summary(from_plan: &Histogram<u64>, calls: &Histogram<u64>, cpu: Duration) -> Latency {
    Latency {
        count: calls.len(),
        p50: from_plan.value_at_quantile(0.5),
        p99: from_plan.value_at_quantile(0.99),
        p999: from_plan.value_at_quantile(0.999),
        call: calls.value_at_quantile(0.5),
        cpu: nanoseconds(cpu),
    }
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

fn requests(to: SocketAddr, size: usize, time: Duration) -> io::Result<Latency> {
    let size = size.max(HEAD);
    let mut stream = Patient::connect(to)?;
    let mut request = vec![0; size];
    request[..HEAD].copy_from_slice(&server::head(size as u64, size as u64));
    let mut answer = vec![0; size];
    let mut exchange = || -> io::Result<Duration> {
        let start = Instant::now();
        stream.write_all(&request)?;
        stream.read_exact(&mut answer)?;
        Ok(start.elapsed())
    };
    let mut times = histogram();
    let before = cpu()?;
    let mut count = 0;
    let warm = Instant::now() + WARM_UP;
    while Instant::now() < warm {
        exchange()?;
        count += 1;
    }
    let end = Instant::now() + time;
    while Instant::now() < end {
        times.saturating_record(nanoseconds(exchange()?));
        count += 1;
    }
    let cpu = cpu()? - before;
    Ok(Latency {
        // What the others spend their CPU time on, too.
        count,
        ..summary(&times, &times, cpu)
    })
}

/// Before a moment, the rest of the wait is spent awake.
const AWAKE: Duration = Duration::from_micros(80);

fn connects(to: SocketAddr, rate: u32, time: Duration) -> io::Result<Latency> {
    let interval = Duration::from_secs(1) / rate;
    let planned = u32::try_from(time.as_nanos() / interval.as_nanos()).unwrap_or(u32::MAX);
    let (mut from_plan, mut calls) = (histogram(), histogram());
    let before = cpu()?;
    let start = Instant::now() + interval;
    for number in 0..planned {
        let plan = start + interval * number;
        wait_until(plan);
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        let called = Instant::now();
        socket.connect(&to.into())?;
        // What was late because the one before it was slow counts as slow.
        from_plan.saturating_record(nanoseconds(plan.elapsed()));
        calls.saturating_record(nanoseconds(called.elapsed()));
    }
    Ok(summary(&from_plan, &calls, cpu()? - before))
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

fn bulk(to: SocketAddr, time: Duration) -> io::Result<Done> {
    let mut flow = Flow::start(to)?;
    flow.send_until(Instant::now() + WARM_UP)?;
    let before = cpu()?;
    let start = Instant::now();
    let count = flow.send_until(start + time)?;
    Ok(Done {
        count,
        took: nanoseconds(start.elapsed()),
        cpu: nanoseconds(cpu()? - before),
    })
}

/// Blocks on their way, and receipts on their way back.
struct Flow {
    stream: Patient,
    block: Vec<u8>,
}

impl Flow {
    fn start(to: SocketAddr) -> io::Result<Self> {
        let mut block = vec![0; BLOCK];
        block[..HEAD].copy_from_slice(&server::head(BLOCK as u64, RECEIPT as u64));
        let stream = Patient::connect(to)?;
        Ok(Self { stream, block })
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

fn hold(to: SocketAddr, count: usize, from: Option<IpAddr>) -> io::Result<()> {
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
        one_request(&mut stream)?;
        held.push(stream);
    }
    role::tell(role::READY);
    // Ends when whoever started this process has gone, too.
    for line in io::stdin().lock().lines() {
        drop(line?);
    }
    Ok(())
}
