//! The parts of an agent that serve the plugin, in this process: data path, node and
//! control socket. Only what tells pods apart is a table.

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    thread::{self, JoinHandle},
};

use anyhow::{Result, anyhow};
use shunt::{
    cni::server::{CniServer, WantedPods},
    control::Server,
    datapath::{Afterwards, Datapath},
    node::NodeHandle,
    observe::Metrics,
    pods::{PodRef, Wanted},
    settings::{Field, Inputs, Origin, Settings, Splice, Written},
};
use shunt_tests::{Cgroup, Netns, agent::Place};
use tokio::sync::oneshot;

use super::runtime::Sandbox;

/// What is known of the pods.
#[derive(Default)]
struct Table {
    wanted: Mutex<BTreeMap<PodRef, Wanted>>,
    away: Mutex<Option<String>>,
}

type Asked<'a> = Pin<Box<dyn Future<Output = Result<Option<Wanted>>> + Send + 'a>>;

impl WantedPods for Table {
    fn wanted<'a>(&'a self, pod: &'a PodRef) -> Asked<'a> {
        Box::pin(async move {
            match &*lock(&self.away) {
                Some(why) => Err(anyhow!(why.clone())),
                None => Ok(lock(&self.wanted).get(pod).cloned()),
            }
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An agent that looks pods up in a table. On drop it ends as `shunt run` does.
pub(super) struct PodsAgent {
    table: Arc<Table>,
    place: Place,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl PodsAgent {
    /// Starts one for the sockets of `cgroup`; it serves when this returns.
    pub(super) fn start(cgroup: &Cgroup) -> Self {
        let place = Place::new(cgroup);
        let table = Arc::new(Table::default());
        let (stop, stopped) = oneshot::channel();
        let (ready, wait) = mpsc::channel();
        let (socket, bpffs) = (place.socket(), place.bpffs());
        let (cgroup, pods) = (cgroup.path().to_owned(), Arc::clone(&table));
        let serve = async move {
            let server = Server::bind(&socket).expect("nobody else is there");
            let datapath =
                Datapath::load(&cgroup, &bpffs, &[], Splice::Off, Afterwards::Nothing, None);
            let datapath = datapath.expect("it loads");
            let started = NodeHandle::start(datapath, None).await;
            let (node, thread) = started.expect("it starts");
            let cni = CniServer::new(node.clone(), pods, Metrics::new());
            let serving = tokio::spawn(async move { server.serve(node, Some(cni)).await });
            ready.send(()).expect("somebody waits");
            // The sender's end counts as well.
            let _ = stopped.await;
            serving.abort();
            let _ = serving.await;
            thread
        };
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            let node = runtime.block_on(serve);
            drop(runtime);
            node.join().expect("the node's thread ends well");
        });
        wait.recv().expect("the agent starts");
        Self {
            table,
            place,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    /// A pod of this name, whose network is `netns`, as the runtime of this node has it.
    pub(super) fn sandbox(&self, netns: &Netns, name: &str) -> Sandbox {
        Sandbox::new(netns, name).at_socket(self.place.socket())
    }

    /// The pod is of a mesh.
    pub(super) fn wants(&self, sandbox: &Sandbox) {
        let pod = sandbox.pod();
        let written = Written {
            field: Field::Mesh,
            origin: Origin::Flag,
            text: "istio".to_owned(),
        };
        let wanted = Wanted {
            pod: pod.clone(),
            settings: Settings::parse(&Inputs::from_iter([written])).expect("a mesh"),
            resolvers: Vec::new(),
        };
        lock(&self.table.wanted).insert(pod, wanted);
    }

    /// From now on nothing is known of any pod.
    pub(super) fn cannot_tell(&self, why: &str) {
        *lock(&self.table.away) = Some(why.to_owned());
    }
}

impl Drop for PodsAgent {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
            && !thread::panicking()
        {
            panic!("the agent did not end well");
        }
    }
}
