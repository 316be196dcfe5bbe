//! Connections that come and go, and some that stay, while agents do.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use shunt_tests::{
    Families, Netns, Node, Owner, Pod, Probe, Responder, connect_all, deadline::wait_until,
    mesh::ISTIO_DEFAULTS, node::Stack, probe_all,
};

use crate::lab::PORT;

/// How the pod is enrolled.
pub(super) const SETTINGS: [&str; ISTIO_DEFAULTS.len() + 1] = {
    let mut all = ["--dual-stack=true"; ISTIO_DEFAULTS.len() + 1];
    let mut i = 0;
    while i < ISTIO_DEFAULTS.len() {
        all[i] = ISTIO_DEFAULTS[i];
        i += 1;
    }
    all
};

/// A pod of both families with a proxy, and a host outside that would answer whatever is
/// not redirected.
pub(super) struct World {
    _outside: Responder,
    _application: Responder,
    _proxy: Responder,
    pub(super) pod: Pod,
    pub(super) node: Node,
}

impl World {
    pub(super) fn new() -> Arc<Self> {
        let node = Node::new();
        let pod = node.pod_with("pod", Stack::Dual);
        for netns in [node.netns(), pod.netns()] {
            // A port is used again after a second, not over loopback alone.
            netns.sysctl("net.ipv4.tcp_tw_reuse", "1");
        }
        let both = Families::Split;
        Arc::new(Self {
            _outside: Responder::start_for(both, node.netns(), Owner::APP, &[PORT]),
            _application: Responder::start_for(both, pod.netns(), Owner::APP, &[PORT]),
            _proxy: Responder::start_for(both, pod.netns(), Owner::PROXY, &[15001, 15006]),
            pod,
            node,
        })
    }
}

/// A kind of connection, and where it has to end up.
struct Way {
    world: Arc<World>,
    from: fn(&World) -> &Netns,
    probe: Probe,
    to: &'static str,
}

/// How many connections are tried at once.
const BATCH: usize = 16;

/// How often, at most: the ports of one address have to suffice, of which each rests
/// for a second after a connection. All ways together make three thousand connections a
/// second, where the machine keeps up.
const PACE: Duration = Duration::from_millis(25);

/// How much longer the pause after a batch is than the batch took, at least: where a machine
/// is slow, as one that is emulated, the next agent has to come up beside the load.
const REST: u32 = 3;

/// How many connections have to come between two upheavals.
const ENOUGH: u64 = 500;

/// How many connections stay.
const LASTING: usize = 40;

/// The load: threads that connect again and again, and compare everything.
pub(super) struct Load {
    ended: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    /// What was seen first that should not be.
    wrong: Arc<Mutex<Option<String>>>,
    threads: Vec<JoinHandle<()>>,
    lasting: Mutex<Vec<TcpStream>>,
    began: Instant,
}

impl Load {
    pub(super) fn start(world: &Arc<World>) -> Self {
        let (ended, done, wrong) = <(Arc<_>, Arc<_>, Arc<_>)>::default();
        let calls = vec![Probe::new(Owner::APP, outside()); LASTING];
        let lasting = connect_all(world.pod.netns(), &calls);
        let lasting = lasting
            .into_iter()
            .map(|(answer, stream)| stream.unwrap_or_else(|| panic!("not connected: {answer:?}")));
        let threads = ways(world).into_iter().map(|way| {
            let (ended, done, wrong) = (Arc::clone(&ended), Arc::clone(&done), Arc::clone(&wrong));
            thread::spawn(move || way.repeat(&ended, &done, &wrong))
        });
        Self {
            threads: threads.collect(),
            lasting: Mutex::new(lasting.collect()),
            began: Instant::now(),
            ended,
            done,
            wrong,
        }
    }

    /// Waits for connections that begin from now on, and sees that nothing was wrong up
    /// to now, with those that stay either.
    #[track_caller]
    pub(super) fn goes_on(&self) {
        let before = self.done.load(Ordering::Relaxed);
        wait_until("more connections", || {
            let now = self.done.load(Ordering::Relaxed);
            let is_over = now > before + ENOUGH || self.wrong().is_some();
            is_over.then_some(()).ok_or_else(|| now.to_string())
        });
        assert_eq!(self.wrong(), None);
        let mut lasting = self.lasting.lock().unwrap_or_else(PoisonError::into_inner);
        for stream in lasting.iter_mut() {
            stream.write_all(b"still there?").expect("it is open");
            let mut echo = [0; 12];
            stream.read_exact(&mut echo).expect("it is open");
            assert_eq!(&echo, b"still there?");
        }
    }

    fn wrong(&self) -> Option<String> {
        let wrong = self.wrong.lock().unwrap_or_else(PoisonError::into_inner);
        wrong.clone()
    }

    /// The connections that stay still seem to go where they were asked to.
    #[track_caller]
    pub(super) fn assert_peers(&self) {
        let lasting = self.lasting.lock().unwrap_or_else(PoisonError::into_inner);
        for stream in lasting.iter() {
            assert_eq!(stream.peer_addr().expect("it is open"), outside());
        }
    }

    #[track_caller]
    pub(super) fn end(self) {
        self.ended.store(true, Ordering::Relaxed);
        let took = self.began.elapsed().as_secs_f64();
        let wrong = Arc::clone(&self.wrong);
        let done = Arc::clone(&self.done);
        for thread in self.threads {
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        }
        let wrong = wrong.lock().unwrap_or_else(PoisonError::into_inner);
        assert_eq!(*wrong, None);
        let done = done.load(Ordering::Relaxed);
        #[expect(clippy::print_stderr, reason = "how much the test was worth")]
        {
            eprintln!("{done} connections, {:.0} each second", done as f64 / took);
        }
    }
}

fn outside() -> SocketAddr {
    (Node::OUTSIDE, PORT).into()
}

/// Every way on which connections are redirected.
fn ways(world: &Arc<World>) -> Vec<Way> {
    const INSIDE: fn(&World) -> &Netns = |world| world.pod.netns();
    const BEYOND: fn(&World) -> &Netns = |world| world.node.netns();
    let [own, own6] = world.pod.addresses() else {
        panic!("the pod has an address of each family");
    };
    let way = |from, owner, to, proxy| Way {
        world: Arc::clone(world),
        from,
        probe: Probe::new(owner, to),
        to: proxy,
    };
    vec![
        way(INSIDE, Owner::APP, (Node::OUTSIDE, PORT), "pod:15001"),
        way(INSIDE, Owner::APP, (Node::OUTSIDE6, PORT), "pod:15001"),
        way(INSIDE, Owner::PROXY, (*own, PORT), "pod:15006"),
        way(INSIDE, Owner::PROXY, (*own6, PORT), "pod:15006"),
        way(BEYOND, Owner::APP, (*own, PORT), "pod:15006"),
        way(BEYOND, Owner::APP, (*own6, PORT), "pod:15006"),
    ]
}

impl Way {
    fn repeat(&self, ended: &AtomicBool, done: &AtomicU64, wrong: &Mutex<Option<String>>) {
        let calls = [self.probe; BATCH];
        while !ended.load(Ordering::Relaxed) {
            let began = Instant::now();
            for answer in probe_all((self.from)(&self.world), &calls) {
                let seen = answer.outcome.to_string();
                let is_right = seen == self.to
                    && answer.greeting().original_dst == Ok(self.probe.destination)
                    && answer.peername == Some(self.probe.destination);
                if is_right {
                    done.fetch_add(1, Ordering::Relaxed);
                } else {
                    let mut wrong = wrong.lock().unwrap_or_else(PoisonError::into_inner);
                    wrong.get_or_insert(format!("{}: {answer:?}", self.probe));
                    return;
                }
            }
            let took = began.elapsed();
            thread::sleep(PACE.saturating_sub(took).max(took * REST));
        }
    }
}
