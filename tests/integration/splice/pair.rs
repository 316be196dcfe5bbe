//! Both ends of a redirected connection, in the hands of the test: from an application to
//! its proxy, or from a proxy to another pod's.

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd,
    thread,
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
    cgroup::Cgroup,
    deadline::{DEADLINE, wait_until},
    mesh::ISTIO_DEFAULTS,
};

use super::{BETWEEN, INTO_PROXY};
use crate::lab::PORT;

/// Whose sockets the two ends of a connection are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hop {
    /// The application's, and its own proxy's: spliced in mode `proxy`.
    IntoProxy,
    /// One pod's proxy's, and that of another pod: spliced in mode `between`, which an
    /// agent takes by itself.
    Between,
}

impl Hop {
    /// That of the default mode first.
    pub(super) const BOTH: [Self; 2] = [Self::Between, Self::IntoProxy];

    /// The least that an agent has to be told so that it splices here.
    pub(super) fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::IntoProxy => INTO_PROXY,
            Self::Between => BETWEEN,
        }
    }

    fn pods(self) -> &'static [&'static str] {
        match self {
            Self::IntoProxy => &["pod"],
            Self::Between => &["client", "server"],
        }
    }

    /// Who connects.
    fn client(self) -> Owner {
        match self {
            Self::IntoProxy => Owner::APP,
            Self::Between => Owner::PROXY,
        }
    }

    /// Where the proxy listens that gets the connection.
    fn port(self) -> u16 {
        match self {
            Self::IntoProxy => 15001,
            Self::Between => 15006,
        }
    }
}

/// A pod or two, their agent, and where the proxy listens that is connected to.
pub(super) struct Lab {
    agent: Option<Agent>,
    listener: TcpListener,
    hop: Hop,
    /// The client's is the first, and the server's the last.
    pub(super) pods: Vec<Pod>,
    pub(super) node: Node,
}

/// A connection that was redirected to a proxy. Both ends are in non-blocking mode.
pub(super) struct Pair {
    /// Who has connected: an application, or another pod's proxy.
    pub(super) client: TcpStream,
    /// The proxy that has accepted.
    pub(super) server: TcpStream,
}

impl Lab {
    /// A pod with an application and a proxy, and an agent that is started with these
    /// arguments.
    pub(super) fn new(arguments: &[&str]) -> Self {
        Self::with(Hop::IntoProxy, arguments)
    }

    /// One for this hop, with an agent that splices there and nowhere else.
    pub(super) fn on(hop: Hop) -> Self {
        Self::with(hop, hop.arguments())
    }

    /// One for this hop, with an agent that is started with these arguments.
    pub(super) fn with(hop: Hop, arguments: &[&str]) -> Self {
        let mut lab = Self::without_agent(hop);
        let place = Place::new(lab.cgroup());
        lab.set_agent(Agent::start_with(place, arguments));
        lab.enroll(&ISTIO_DEFAULTS);
        lab
    }

    /// One for this hop, which is to be given an agent.
    pub(super) fn without_agent(hop: Hop) -> Self {
        let node = Node::new();
        let pods: Vec<_> = hop.pods().iter().map(|name| node.pod(name)).collect();
        let server = pods.last().expect("a hop has pods");
        let listener = server.netns().run(|| {
            Owner::PROXY.assume();
            let address = (Ipv4Addr::UNSPECIFIED, hop.port());
            TcpListener::bind(address).expect("the proxy's port is free")
        });
        Self {
            agent: None,
            listener,
            hop,
            pods,
            node,
        }
    }

    /// Gives it an agent, which has enrolled nothing, or what a former one had.
    pub(super) fn set_agent(&mut self, agent: Agent) {
        self.agent = Some(agent);
    }

    /// Starts an agent in the place of another which left nothing in force.
    pub(super) fn start_agent(&mut self, place: Place) {
        self.set_agent(Agent::start_with(place, self.hop.arguments()));
        self.enroll(&ISTIO_DEFAULTS);
    }

    /// Enrols every pod.
    pub(super) fn enroll(&self, flags: &[&str]) {
        for pod in &self.pods {
            self.agent().enroll(pod.netns(), flags);
        }
    }

    pub(super) fn unenroll(&self) {
        for pod in &self.pods {
            self.agent().unenroll(pod.netns());
        }
    }

    pub(super) fn agent(&self) -> &Agent {
        self.agent.as_ref().expect("an agent is running")
    }

    /// Hands the agent over, to be ended.
    pub(super) fn take_agent(&mut self) -> Agent {
        self.agent.take().expect("an agent is running")
    }

    pub(super) fn cgroup(&self) -> &Cgroup {
        self.node.cgroup()
    }

    pub(super) fn hop(&self) -> Hop {
        self.hop
    }

    /// The pod of who connects.
    pub(super) fn client_pod(&self) -> &Pod {
        &self.pods[0]
    }

    /// The pod of the proxy that is connected to.
    pub(super) fn server_pod(&self) -> &Pod {
        self.pods.last().expect("a hop has pods")
    }

    /// The proxy's socket for new connections.
    pub(super) fn listener(&self) -> &TcpListener {
        &self.listener
    }

    /// Whom the client asks for: a host outside, or the server's pod.
    pub(super) fn destination(&self) -> SocketAddr {
        match self.hop {
            Hop::IntoProxy => (Node::OUTSIDE, PORT).into(),
            Hop::Between => (self.server_pod().ip(), PORT).into(),
        }
    }

    /// A connection that the proxy has accepted in the place of whom it was meant for.
    pub(super) fn connect(&self) -> Pair {
        let to = self.destination();
        self.connect_with(|| TcpStream::connect(to).expect("the proxy accepts"))
    }

    /// The same, connected in another way.
    pub(super) fn connect_with(&self, connect: impl FnOnce() -> TcpStream + Send) -> Pair {
        self.accept(self.call(connect))
    }

    /// Connects as the client does, in its pod.
    pub(super) fn call<T: Send>(&self, connect: impl FnOnce() -> T + Send) -> T {
        self.client_pod().netns().run(|| {
            self.hop.client().assume();
            connect()
        })
    }

    /// The proxy accepts the connection of this client.
    pub(super) fn accept(&self, client: TcpStream) -> Pair {
        let (server, _) = self.listener.accept().expect("a connection comes");
        for end in [&client, &server] {
            end.set_nonblocking(true).expect("it is open");
            end.set_nodelay(true).expect("it is open");
        }
        Pair { client, server }
    }

    /// A connection on which what the client sends is spliced.
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

    /// The client sends something that nobody reads yet, and all of it is spliced.
    pub(super) fn send_spliced(&self, pair: &Pair, bytes: &[u8]) {
        let before = self.spliced_bytes();
        send(&pair.client, bytes);
        let spliced = self.spliced_bytes() - before;
        assert_eq!(spliced, bytes.len() as u64, "{}", self.counters());
    }

    /// Waits until more is spliced of what the client sends, whoever makes it send.
    pub(super) fn splices_more(&self) {
        let before = self.spliced_bytes();
        wait_until("more to be spliced", || {
            let now = self.spliced_bytes();
            (now > before)
                .then_some(())
                .ok_or_else(|| self.counters().to_string())
        });
    }

    /// Waits until nothing is counted of what the client's pod sends, neither what is spliced nor
    /// what is not: its socket is out of the map.
    pub(super) fn splices_nothing(&self) {
        wait_until("the socket to be taken out of the map", || {
            let before = self.counters();
            let now = self.counters();
            (now == before)
                .then_some(())
                .ok_or_else(|| format!("{before}, then {now}"))
        });
    }

    /// What `shunt status` says of what the sockets of the client's pod spliced.
    pub(super) fn counters(&self) -> Value {
        let status = self.agent().status();
        let path = self.client_pod().netns().path();
        let pods = status["pods"].as_array().into_iter().flatten();
        let mut pods = pods.filter(|pod| pod["netns"].as_str() == path.to_str());
        let pod = pods
            .next()
            .unwrap_or_else(|| panic!("{} is not enrolled: {status}", path.display()));
        pod["counters"]["splice"].clone()
    }

    /// How many bytes were spliced of what the client's pod sent.
    pub(super) fn spliced_bytes(&self) -> u64 {
        self.counters()["bytes"].as_u64().unwrap_or(0)
    }

    /// How many messages were spliced.
    pub(super) fn spliced_messages(&self) -> u64 {
        self.counters()["messages"].as_u64().unwrap_or(0)
    }

    /// What TCP has counted in the server's pod, by name.
    pub(super) fn netstat(&self) -> BTreeMap<String, u64> {
        self.server_pod().netns().tcp_counters()
    }

    /// What the pods' TCP has counted of segments that it dropped because a buffer was full:
    /// each of them is a stall until it is sent again.
    pub(super) fn dropped(&self) -> Vec<(String, u64)> {
        const NAMES: [&str; 3] = ["TCPRcvQDrop", "RcvPruned", "TCPZeroWindowDrop"];
        let counts = self.pods.iter().flat_map(|pod| pod.netns().tcp_counters());
        counts
            .filter(|(name, count)| NAMES.contains(&name.as_str()) && *count > 0)
            .collect()
    }

    /// How many messages went by TCP for this reason.
    pub(super) fn fallbacks(&self, why: &str) -> u64 {
        self.counters()["fallbacks"][why].as_u64().unwrap_or(0)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if thread::panicking() {
            #[expect(clippy::print_stderr, reason = "evidence of a failed test")]
            {
                eprintln!("--- on the hop {:?}", self.hop);
            }
        }
    }
}

impl Pair {
    /// The client asks and the server answers.
    pub(super) fn ask(&self, question: &[u8], answer: &[u8]) {
        send(&self.client, question);
        assert_eq!(receive(&self.server, question.len()), question);
        send(&self.server, answer);
        assert_eq!(receive(&self.client, answer.len()), answer);
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
pub(super) fn receive(end: &TcpStream, count: usize) -> Vec<u8> {
    receive_and_time(end, count).0
}

/// The same; and how long it waited, at most, until there was one more. (What it takes to copy
/// many of them is no wait: in an emulated machine that may be long.)
pub(super) fn receive_and_time(mut end: &TcpStream, count: usize) -> (Vec<u8>, Duration) {
    let mut bytes = vec![0; count];
    let mut read = 0;
    let mut longest = Duration::ZERO;
    while read < count {
        match end.read(&mut bytes[read..]) {
            Ok(0) => break,
            Ok(more) => read += more,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let since = Instant::now();
                ready(end, PollFlags::POLLIN);
                longest = longest.max(since.elapsed());
            }
            Err(error) => panic!("a read failed after {read} bytes: {error}"),
        }
    }
    bytes.truncate(read);
    (bytes, longest)
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
