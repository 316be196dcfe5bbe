//! What a program sees of a connection that is spliced is what it sees of TCP.
//!
//! Each test is a script for the two ends of one connection, which goes from pod
//! to pod through both of their proxies. It is run with splicing off, and as far
//! as the agent splices by itself; with either end as the application that is
//! looked at; and in each [`Manner`] that the application may use its socket in.
//! The records have to be equal, whatever the script expects by itself.
//!
//! `SHUNT_TEST_SPLICE` (`cargo xtask test --splice MODE`) names another mode to try
//! than the one that the agent picks, such as `all`. Then the scripts may look other
//! than by TCP for which [`limits`] says so, and no others.

mod blocking;
mod closing;
mod information;
mod layers;
mod limits;
mod moving;
mod polling;
mod reading;
mod restarts;
mod urgent;
mod writing;

use std::{
    any::type_name,
    io::ErrorKind,
    net::SocketAddr,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Mutex, MutexGuard, PoisonError,
        mpsc::{self, RecvTimeoutError, Sender},
    },
    thread,
    time::{Duration, Instant},
};

use shunt_tests::{
    Agent, End, Netns, Node, Owner, Pod, Proxy, Record, Splice,
    deadline::{DEADLINE, wait_until},
    mesh::ISTIO_DEFAULTS,
};
use socket2::{Domain, SockAddr, Socket, Type};

/// Where the application of the second pod listens.
const PORT: u16 = 8080;

/// How the application uses its socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    /// Non-blocking, from before connect() on.
    NonBlocking,
    /// Blocking from the beginning.
    Blocking,
    /// Non-blocking at first, and blocking when the script begins.
    BlockingLater,
}

impl Manner {
    const ALL: [Self; 3] = [Self::NonBlocking, Self::Blocking, Self::BlockingLater];
    /// Those in which the script has a blocking socket.
    const BLOCKING: [Self; 2] = [Self::Blocking, Self::BlockingLater];
    const NON_BLOCKING: [Self; 1] = [Self::NonBlocking];

    fn is_blocking_at_first(self) -> bool {
        self == Self::Blocking
    }
}

/// Which end is the application that a script looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    /// The one that has called.
    Client,
    /// The one that was called.
    Server,
}

/// What a script has: the application, and whoever it talks to, whose socket is
/// non-blocking.
struct Ends {
    app: End,
    peer: End,
    manner: Manner,
}

/// Runs a script in every way, and compares what was seen; unless a mode is tried of
/// which it is known that this script shows a difference.
#[track_caller]
fn compare<S: Fn(Ends) + Copy + Send + 'static>(manners: &[Manner], script: S) {
    let Some(limit) = Splice::tried().and_then(|mode| limits::of(type_name::<S>(), mode)) else {
        return must_equal(manners, script);
    };
    let seen = catch_unwind(AssertUnwindSafe(|| must_equal(manners, script)));
    #[expect(clippy::print_stderr, reason = "what a limit is looked at for")]
    {
        let seen = if seen.is_ok() { "not seen" } else { "seen" };
        eprintln!("{seen} this time: {limit:?}");
    }
}

#[track_caller]
fn must_equal<S: Fn(Ends) + Copy + Send + 'static>(manners: &[Manner], script: S) {
    let visit = Visit::new();
    let [plain, spliced] = MODES.map(|mode| {
        let lab = visit.lab(mode());
        let mut records = Vec::new();
        for &manner in manners {
            for side in [Side::Client, Side::Server] {
                let what = format!("{:?}, {manner:?}, {side:?}", lab.mode);
                records.push((manner, side, lab.run(&what, manner, side, script)));
            }
        }
        visit.give_back(lab);
        records
    });
    for (without, with) in plain.iter().zip(&spliced) {
        assert_eq!(
            without, with,
            "spliced (right) it looks other than by TCP (left)"
        );
    }
}

/// How the two are told to splice that are compared.
const MODES: [fn() -> Option<Splice>; 2] = [|| Some(Splice::Off), Splice::tried];

/// The labs of the scripts that are running. An agent takes longer to start than a
/// script to run, so a lab serves one script after another. The last script leaves
/// none: nothing would drop them.
struct Labs {
    visits: usize,
    idle: Vec<Lab>,
}

static LABS: Mutex<Labs> = Mutex::new(Labs {
    visits: 0,
    idle: Vec::new(),
});

fn labs() -> MutexGuard<'static, Labs> {
    LABS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The time for which a script needs labs.
struct Visit;

impl Visit {
    fn new() -> Self {
        labs().visits += 1;
        Self
    }

    /// One whose agent was told this, for one script at a time.
    fn lab(&self, told: Option<Splice>) -> Lab {
        let is_meant = |lab: &mut Lab| lab.told == told;
        let idle = labs().idle.extract_if(.., is_meant).next();
        idle.unwrap_or_else(|| Lab::kept(told))
    }

    /// Not after a failure: the next script begins with one that has not seen it.
    fn give_back(&self, lab: Lab) {
        labs().idle.push(lab);
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        let mut labs = labs();
        labs.visits -= 1;
        let over = match labs.visits {
            0 => std::mem::take(&mut labs.idle),
            _ => Vec::new(),
        };
        drop(labs);
        drop(over);
    }
}

/// Two pods, a proxy in each, and somebody who listens in the second.
struct Lab {
    listener: Socket,
    agent: Agent,
    /// What its agent was told of splicing: nothing, to pick a mode.
    told: Option<Splice>,
    /// How far it splices.
    mode: Splice,
    proxies: [Proxy; 2],
    client: Pod,
    server: Pod,
    _node: Node,
    /// The thread that has made it ends with it.
    _keeper: Sender<()>,
}

impl Lab {
    /// One that outlives the calling thread: an agent ends with the thread that has
    /// started it.
    fn kept(told: Option<Splice>) -> Self {
        let (give, taken) = mpsc::channel();
        let keeper = thread::spawn(move || {
            let (keep, end) = mpsc::channel();
            give.send(Self::new(told, keep)).ok();
            // Nothing is ever sent: it is told by the end of the channel.
            end.recv().ok();
        });
        taken.recv().unwrap_or_else(|_| match keeper.join() {
            Err(panic) => resume_unwind(panic),
            Ok(()) => unreachable!("it gives a lab before it ends"),
        })
    }

    fn new(told: Option<Splice>, keeper: Sender<()>) -> Self {
        let node = Node::new();
        let [client, server] = ["client", "server"].map(|name| node.pod(name));
        let agent = Agent::start_splicing(node.cgroup(), told);
        for pod in [&client, &server] {
            small_buffers(pod);
            agent.enroll(pod.netns(), &ISTIO_DEFAULTS);
        }
        let mode = agent.splices();
        assert!(
            told.is_none_or(|told| told == mode),
            "{told:?}, not {mode:?}"
        );
        Self {
            told,
            mode,
            listener: server.netns().run(listen),
            proxies: [&client, &server].map(|pod| Proxy::start(pod.netns())),
            agent,
            client,
            server,
            _node: node,
            _keeper: keeper,
        }
    }

    /// A proxy for each pod, beside those that there are.
    fn new_proxies(&self) -> [Proxy; 2] {
        [&self.client, &self.server].map(|pod| Proxy::start(pod.netns()))
    }

    /// Runs a script on a connection of its own; what was seen of it.
    fn run(
        &self,
        what: &str,
        manner: Manner,
        side: Side,
        script: impl FnOnce(Ends) + Send + 'static,
    ) -> Vec<String> {
        let record = Record::default();
        let ends = self.ends(manner, side, &record);
        let (done, end) = mpsc::channel();
        thread::spawn(move || done.send(catch_unwind(AssertUnwindSafe(|| script(ends)))));
        let complaint = match end.recv_timeout(DEADLINE) {
            Ok(Ok(())) => return record.lines(),
            Ok(Err(panic)) => Some(panic),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => unreachable!("it reports every end"),
        };
        #[expect(clippy::print_stderr, reason = "evidence of a failed test")]
        {
            eprintln!("--- {what}\n{}\n---", record.lines().join("\n"));
        }
        match complaint {
            Some(panic) => resume_unwind(panic),
            None => panic!("the script waits for something that does not come"),
        }
    }

    /// A connection on which bytes have gone back and forth until it is spliced,
    /// as far as it is going to be.
    fn ends(&self, manner: Manner, side: Side, record: &Record) -> Ends {
        let blocking = |of: Side| of == side && manner.is_blocking_at_first();
        let (client, server) = self.connection(blocking(Side::Client), blocking(Side::Server));
        let [client, server] = [("client", client), ("server", server)]
            .map(|(name, socket)| End::new(name, socket, record));
        self.warm_up(
            &client,
            self.client.netns(),
            &server,
            blocking(Side::Client),
        );
        self.warm_up(
            &server,
            self.server.netns(),
            &client,
            blocking(Side::Server),
        );
        let (app, peer) = match side {
            Side::Client => (client, server),
            Side::Server => (server, client),
        };
        app.set_nonblocking(manner == Manner::NonBlocking);
        Ends { app, peer, manner }
    }

    /// A new connection: the client's end, and the server's.
    fn connection(&self, blocking_client: bool, blocking_server: bool) -> (Socket, Socket) {
        let to = SocketAddr::from((self.server.ip(), PORT));
        let client = self.client.netns().run(|| call(to, !blocking_client));
        let (server, _) = self.server.netns().run(|| accept(&self.listener));
        let mode = server.set_nonblocking(!blocking_server);
        mode.expect("an open socket");
        wait_until("the connection", || {
            client.peer_addr().map_err(|error| error.to_string())
        });
        (client, server)
    }

    /// Sends more from `end` than comes back, until all of it is spliced that the
    /// mode wants: to the proxy in the pod, and from there to the other pod's.
    /// What a blocking socket sends goes to the proxy by TCP.
    fn warm_up(&self, end: &End, pod: &Netns, other: &End, blocking: bool) {
        const REQUEST: usize = 1000;
        const ROUNDS: usize = 4;
        let (end, other) = (end.unnoticed(), other.unnoticed());
        let request = "q".repeat(REQUEST);
        let to_proxy = self.mode >= Splice::Proxy && !blocking;
        let between = self.mode >= Splice::Between;
        let hops = usize::from(to_proxy) + usize::from(between);
        let expected = hops * ROUNDS * REQUEST;
        wait_until("the connection to be spliced", || {
            let before = self.agent.spliced_bytes(pod);
            for _ in 0..ROUNDS {
                assert_eq!(end.send(&request), Ok(REQUEST));
                other.gets(&request);
                assert_eq!(other.send("a"), Ok(1));
                end.gets("a");
            }
            let bytes = self.agent.spliced_bytes(pod) - before;
            let bytes = usize::try_from(bytes).expect("few bytes");
            // Single bytes of answers may have been spliced as well.
            match bytes.checked_sub(expected) {
                Some(more) if more < REQUEST => Ok(()),
                _ => Err(format!("{bytes} bytes were, of {expected}")),
            }
        });
    }
}

/// Sockets of the pod hold little, so that what fills them is known.
fn small_buffers(pod: &Pod) {
    pod.sysctl("net.ipv4.tcp_rmem", "4096 65536 131072");
    pod.sysctl("net.ipv4.tcp_wmem", "4096 65536 131072");
}

/// Does what has to wait for so long: no machine is so busy that it waits less. Half of
/// it will do, because an emulated one has two clocks that do not keep in step.
#[track_caller]
fn at_least<T>(time: Duration, work: impl FnOnce() -> T) -> T {
    let began = Instant::now();
    let done = work();
    let took = began.elapsed();
    assert!(took >= time / 2, "it waited {took:?} in place of {time:?}");
    done
}

/// More than all buffers on the way hold: those of six sockets, and four in the
/// proxies.
const PLENTY: usize = 8 << 20;

/// Others may listen on the same port, as in a restart without a gap.
fn listen() -> Socket {
    Owner::APP.assume();
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a new socket");
    listener.set_reuse_port(true).expect("an open socket");
    let address = SocketAddr::from(([0, 0, 0, 0], PORT));
    listener.bind(&address.into()).expect("a free port");
    listener.listen(16).expect("a bound socket");
    listener
}

/// As the owner of the listener: an accepted socket of another one keeps the next listener
/// from the port (`inet_csk_bind_conflict`).
fn accept(listener: &Socket) -> (Socket, SockAddr) {
    Owner::APP.assume();
    listener.accept().expect("the proxy has connected")
}

fn call(to: SocketAddr, nonblocking: bool) -> Socket {
    Owner::APP.assume();
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a new socket");
    socket.set_nonblocking(nonblocking).expect("an open socket");
    match socket.connect(&to.into()) {
        Err(error) if nonblocking && error.kind() != ErrorKind::ConnectionRefused => {}
        result => result.expect("the proxy listens"),
    }
    socket
}
