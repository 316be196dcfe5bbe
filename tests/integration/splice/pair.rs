//! Both ends of a redirected connection, in the hands of the test.

use std::{
    io::{self, Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::fd::AsFd,
    time::{Duration, Instant},
};

use nix::{
    getsockopt_impl, libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sockopt_impl,
    sys::socket::getsockopt,
};
use serde_json::Value;
use shunt_tests::{
    Agent, Node, Owner, Pod,
    agent::Place,
    deadline::{DEADLINE, wait_until},
    mesh::ISTIO_DEFAULTS,
};

use crate::lab::PORT;

/// A pod, its agent, and where its proxy listens.
pub(super) struct Lab {
    agent: Option<Agent>,
    listener: TcpListener,
    pub(super) pod: Pod,
    pub(super) node: Node,
}

/// A connection of the application that the proxy has accepted. Both ends are in
/// non-blocking mode.
pub(super) struct Pair {
    pub(super) application: TcpStream,
    pub(super) proxy: TcpStream,
}

impl Lab {
    /// With an agent that is started with these arguments.
    pub(super) fn new(arguments: &[&str]) -> Self {
        let node = Node::new();
        let pod = node.pod("pod");
        let listener = pod.netns().run(|| {
            Owner::PROXY.assume();
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, 15001)).expect("the proxy's port is free")
        });
        let mut lab = Self {
            agent: None,
            listener,
            pod,
            node,
        };
        lab.start_agent(Place::new(lab.node.cgroup()), arguments);
        lab
    }

    /// Starts an agent in a place where there may have been another.
    pub(super) fn start_agent(&mut self, place: Place, arguments: &[&str]) {
        let agent = Agent::start_with(place, arguments);
        agent.enroll(self.pod.netns(), &ISTIO_DEFAULTS);
        self.agent = Some(agent);
    }

    pub(super) fn agent(&self) -> &Agent {
        self.agent.as_ref().expect("an agent is running")
    }

    /// Hands the agent over, to be ended.
    pub(super) fn take_agent(&mut self) -> Agent {
        self.agent.take().expect("an agent is running")
    }

    /// A connection of the application to a host outside, which the proxy has
    /// accepted.
    pub(super) fn connect(&self) -> Pair {
        self.connect_with(|| TcpStream::connect((Node::OUTSIDE, PORT)).expect("the proxy accepts"))
    }

    /// The same, connected in another way.
    pub(super) fn connect_with(&self, connect: impl FnOnce() -> TcpStream + Send) -> Pair {
        let application = self.pod.netns().run(|| {
            Owner::APP.assume();
            connect()
        });
        let (proxy, _) = self.listener.accept().expect("a connection comes");
        for end in [&application, &proxy] {
            end.set_nonblocking(true).expect("it is open");
            end.set_nodelay(true).expect("it is open");
        }
        Pair { application, proxy }
    }

    /// A connection on which what the application sends is spliced.
    pub(super) fn spliced(&self) -> Pair {
        let pair = self.connect();
        self.splice(&pair);
        pair
    }

    /// Talks on a connection until it is spliced.
    pub(super) fn splice(&self, pair: &Pair) {
        let before = self.spliced_bytes();
        wait_until("the connection to be spliced", || {
            pair.ask(b"question", b"answer");
            let now = self.spliced_bytes();
            if now > before {
                Ok(())
            } else {
                Err(self.counters().to_string())
            }
        });
    }

    /// What `shunt status` says of what the pod's sockets spliced.
    pub(super) fn counters(&self) -> Value {
        self.agent().status()["pods"][0]["counters"]["splice"].clone()
    }

    /// How many bytes were spliced.
    pub(super) fn spliced_bytes(&self) -> u64 {
        self.counters()["bytes"].as_u64().unwrap_or(0)
    }

    /// How many messages were spliced.
    pub(super) fn spliced_messages(&self) -> u64 {
        self.counters()["messages"].as_u64().unwrap_or(0)
    }

    /// What the pod's TCP has counted of segments that it dropped because a buffer was full:
    /// each of them is a stall until it is sent again.
    pub(super) fn dropped(&self) -> Vec<(String, u64)> {
        let netstat = self
            .pod
            .netns()
            .run(|| std::fs::read_to_string("/proc/thread-self/net/netstat").expect("it is there"));
        let mut lines = netstat.lines().filter(|line| line.starts_with("TcpExt:"));
        let (names, values) = (lines.next().expect("names"), lines.next().expect("values"));
        names
            .split(' ')
            .zip(values.split(' '))
            .filter(|(name, _)| ["TCPRcvQDrop", "RcvPruned", "TCPZeroWindowDrop"].contains(name))
            .filter_map(|(name, value)| Some((name.to_owned(), value.parse().ok()?)))
            .filter(|(_, count)| *count > 0)
            .collect()
    }

    /// How many messages went by TCP for this reason.
    pub(super) fn fallbacks(&self, why: &str) -> u64 {
        self.counters()["fallbacks"][why].as_u64().unwrap_or(0)
    }
}

impl Pair {
    /// The application asks and the proxy answers.
    pub(super) fn ask(&self, question: &[u8], answer: &[u8]) {
        send(&self.application, question);
        assert_eq!(receive(&self.proxy, question.len()), question);
        send(&self.proxy, answer);
        assert_eq!(receive(&self.application, answer.len()), answer);
    }
}

/// Writes until nothing more is taken; the number of bytes taken.
pub(super) fn fill(mut end: &TcpStream, bytes: &[u8], piece: usize) -> usize {
    let mut sent = 0;
    while sent < bytes.len() {
        let upto = (sent + piece).min(bytes.len());
        match end.write(&bytes[sent..upto]) {
            Ok(more) => sent += more,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => panic!("a write failed after {sent} bytes: {error}"),
        }
    }
    sent
}

/// Writes everything.
pub(super) fn send(mut end: &TcpStream, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        match end.write(bytes) {
            Ok(sent) => bytes = &bytes[sent..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                ready(end, PollFlags::POLLOUT);
            }
            Err(error) => panic!("a write failed: {error}"),
        }
    }
}

/// Reads that many bytes, and stops when the other end has closed.
pub(super) fn receive(mut end: &TcpStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    let mut read = 0;
    while read < count {
        match end.read(&mut bytes[read..]) {
            Ok(0) => break,
            Ok(more) => read += more,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                ready(end, PollFlags::POLLIN);
            }
            Err(error) => panic!("a read failed after {read} bytes: {error}"),
        }
    }
    bytes.truncate(read);
    bytes
}

/// Reads what there is, as soon as there is something.
pub(super) fn receive_some(mut end: &TcpStream, most: usize) -> Vec<u8> {
    let mut bytes = vec![0; most];
    loop {
        match end.read(&mut bytes) {
            Ok(read) => {
                bytes.truncate(read);
                return bytes;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                ready(end, PollFlags::POLLIN);
            }
            Err(error) => panic!("a read failed: {error}"),
        }
    }
}

/// Waits until `end` can be read from, or written to.
fn ready(end: &TcpStream, what: PollFlags) {
    let until = Instant::now() + DEADLINE;
    let mut files = [PollFd::new(end.as_fd(), what)];
    loop {
        let left = until.saturating_duration_since(Instant::now());
        assert!(left > Duration::ZERO, "it is stuck: {what:?} does not come");
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        if poll(&mut files, timeout).is_ok_and(|ready| ready > 0) {
            return;
        }
    }
}

/// Bytes of which no two stretches are alike.
pub(super) fn pattern(length: usize) -> Vec<u8> {
    let mut random = Random(1);
    (0..length).map(|_| random.next() as u8).collect()
}

/// Numbers without a pattern, the same every time (xorshift).
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 11
    }

    /// A length between 1 and `most`, short ones as often as long ones.
    pub(super) fn length(&mut self, most: usize) -> usize {
        let bits = self.next() as u32 % (usize::BITS - most.leading_zeros());
        1 + self.next() as usize % (1 << bits).min(most)
    }
}

sockopt_impl!(
    /// `SO_MEMINFO`
    Memory,
    GetOnly,
    libc::SOL_SOCKET,
    libc::SO_MEMINFO,
    [u32; 9]
);

/// How many bytes wait to be read and the size of the buffer, as the kernel counts
/// them.
pub(super) fn memory(end: &TcpStream) -> (u32, u32) {
    let memory = getsockopt(end, Memory).expect("it is open");
    (memory[0], memory[1])
}
