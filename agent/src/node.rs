//! The enrolled namespaces of the node, owned by one thread.
//!
//! Requests come in through a [`NodeHandle`] and are answered one after the
//! other, so nothing here needs a lock, and what the maps hold is what this
//! thread wrote.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use shunt_abi::NetnsCookie;
use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot},
};

use crate::{
    datapath::{CounterReport, Datapath, KernelObject, PodProgram, Pods, SpliceStatus},
    netns::Netns,
    network::{Changes, Network, Nsid, Nsids, Topology},
    settings::{Compiled, Enrolment, Settings, compile},
    userns::IdMaps,
};

/// How long lists that are no longer in force stay: a program that read the old
/// settings just before still looks into them, and runs for microseconds.
const GRACE: Duration = Duration::from_secs(1);

/// What it takes to enrol a namespace.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EnrolRequest {
    /// Where the namespace is, such as `/run/netns/NAME`.
    pub netns: PathBuf,
    /// The nameservers of the pod's resolv.conf.
    pub resolvers: Vec<IpAddr>,
    /// The settings.
    pub settings: Settings,
}

/// What the agent says of itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// The agent's version.
    pub version: String,
    /// The attached programs.
    pub programs: Vec<KernelObject>,
    /// The maps.
    pub maps: Vec<KernelObject>,
    /// How splicing is set, and why.
    pub splice: SpliceStatus,
    /// The enrolled namespaces.
    pub pods: Vec<PodStatus>,
}

/// What the agent says of a pod.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PodStatus {
    /// Where its namespace was found.
    pub netns: PathBuf,
    /// The kernel's name of the namespace.
    pub cookie: NetnsCookie,
    /// Its settings.
    pub settings: Settings,
    /// The resolvers whose DNS is captured, when it is.
    pub resolvers: Vec<IpAddr>,
    /// What the programs counted.
    pub counters: CounterReport,
}

/// A request to the thread that owns the node, with where to answer.
enum Command {
    Enrol(Box<EnrolRequest>, oneshot::Sender<Result<()>>),
    Unenrol(PathBuf, oneshot::Sender<Result<()>>),
    Status(oneshot::Sender<Result<Status>>),
    /// Programs missed listeners in these namespaces.
    FindListeners(Vec<NetnsCookie>),
    /// Programs asked for connections to be spliced; the answer says how long it
    /// took.
    Splice(oneshot::Sender<Result<Duration>>),
    /// Something has changed in some namespaces.
    FollowNetworks(Changes),
    /// Lists that were replaced, after their grace.
    RemoveLists(Box<Compiled>),
}

/// The way to the thread that owns the node.
#[derive(Clone)]
pub struct NodeHandle {
    commands: mpsc::Sender<Command>,
}

impl NodeHandle {
    /// Starts the thread. It ends, and detaches everything, when the last
    /// handle is dropped.
    ///
    /// # Errors
    ///
    /// When the datapath's maps are not to be had, or no thread or socket is.
    pub fn start(mut datapath: Datapath) -> Result<(Self, thread::JoinHandle<()>)> {
        let (commands, inbox) = mpsc::channel(64);
        let mut node = Node {
            pods: datapath.pods()?,
            datapath,
            nsids: Nsids::open()?,
            enrolled: BTreeMap::new(),
            list_sets: 0,
            grace: Grace {
                runtime: Handle::current(),
                commands: commands.downgrade(),
            },
        };
        let thread = thread::Builder::new()
            .name("node".to_owned())
            .spawn(move || node.serve(inbox))
            .context("cannot start a thread")?;
        Ok((Self { commands }, thread))
    }

    /// Enrols a namespace, or replaces the settings of an enrolled one. When it
    /// returns the redirection is in force.
    ///
    /// # Errors
    ///
    /// When it cannot be done; then nothing has changed.
    pub async fn enrol(&self, request: EnrolRequest) -> Result<()> {
        self.ask(|answer| Command::Enrol(Box::new(request), answer))
            .await
    }

    /// Ends the redirection of a namespace.
    ///
    /// # Errors
    ///
    /// When it is not enrolled.
    pub async fn unenrol(&self, netns: PathBuf) -> Result<()> {
        self.ask(|answer| Command::Unenrol(netns, answer)).await
    }

    /// What the agent has to say.
    ///
    /// # Errors
    ///
    /// When the kernel does not answer.
    pub async fn status(&self) -> Result<Status> {
        self.ask(Command::Status).await
    }

    /// Has the listeners of these namespaces looked for.
    pub async fn find_listeners(&self, pods: Vec<NetnsCookie>) {
        // It fails only when the thread has ended, and then nobody needs them.
        let _ = self.commands.send(Command::FindListeners(pods)).await;
    }

    /// Has the connections spliced that the programs asked for; says how long it
    /// took.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub async fn splice(&self) -> Result<Duration> {
        self.ask(Command::Splice).await
    }

    /// Has the agent look at what has changed in the pods' networks.
    pub async fn follow_networks(&self, changes: Changes) {
        // As above.
        let _ = self.commands.send(Command::FollowNetworks(changes)).await;
    }

    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T>>) -> Command,
    ) -> Result<T> {
        let (answer, wait) = oneshot::channel();
        self.commands
            .send(command(answer))
            .await
            .map_err(|_ended| anyhow!("the agent is shutting down"))?;
        wait.await
            .map_err(|_ended| anyhow!("the agent is shutting down"))?
    }
}

/// Sends a command back to the thread after [`GRACE`].
struct Grace {
    runtime: Handle,
    commands: mpsc::WeakSender<Command>,
}

impl Grace {
    fn remove_later(&self, lists: Compiled) {
        let commands = self.commands.clone();
        self.runtime.spawn(async move {
            tokio::time::sleep(GRACE).await;
            if let Some(commands) = commands.upgrade() {
                let _ = commands.send(Command::RemoveLists(Box::new(lists))).await;
            }
        });
    }
}

/// A pod in force.
struct Pod {
    path: PathBuf,
    settings: Settings,
    resolvers: Vec<IpAddr>,
    compiled: Compiled,
    topology: Topology,
    /// What the kernel calls its namespace when it tells of changes.
    nsid: Nsid,
    /// It could not be looked at when it changed, and that has been said.
    lost: bool,
    /// Attached to the namespace while this is kept.
    program: PodProgram,
}

struct Node {
    pods: Pods,
    datapath: Datapath,
    nsids: Nsids,
    enrolled: BTreeMap<NetnsCookie, Pod>,
    /// How many versions of lists there have been: the number of the newest.
    list_sets: u32,
    grace: Grace,
}

impl Node {
    fn serve(&mut self, mut inbox: mpsc::Receiver<Command>) {
        while let Some(command) = inbox.blocking_recv() {
            // An answer that nobody waits for any more is nobody's loss.
            match command {
                Command::Enrol(request, answer) => {
                    let _ = answer.send(self.enrol(*request));
                }
                Command::Unenrol(netns, answer) => {
                    let _ = answer.send(self.unenrol(&netns));
                }
                Command::Status(answer) => {
                    let _ = answer.send(self.status());
                }
                Command::Splice(answer) => {
                    let _ = answer.send(self.splice());
                }
                Command::FindListeners(pods) => self.find_listeners(&pods),
                Command::FollowNetworks(changes) => self.follow_networks(&changes),
                Command::RemoveLists(lists) => self.pods.remove_lists(&lists),
            }
        }
        if let Err(error) = self.datapath.stop_splicing() {
            tracing::warn!("bytes that were spliced and not read yet may be lost: {error:#}");
        }
    }

    fn splice(&mut self) -> Result<Duration> {
        let start = Instant::now();
        self.datapath.splice_wanted()?;
        Ok(start.elapsed())
    }

    fn enrol(&mut self, request: EnrolRequest) -> Result<()> {
        let netns = Netns::open(&request.netns)?;
        let cookie = netns.cookie();
        refuse_nodes_own(&netns)?;
        // From here on changes are reported; then it can be looked at.
        let nsid = self.nsids.of(&netns)?;
        let network = Network::read_with_proxy_source(&netns, &request.settings)?;
        let ids = IdMaps::of(&netns)?;
        self.forget_former(nsid, cookie);
        let topology = network.topology(&request.settings);
        self.list_sets += 1;
        let compiled = compile(
            &request.settings,
            &Enrolment {
                list_set: self.list_sets,
                resolvers: &request.resolvers,
                families: network.families(&request.settings),
                ids: &ids,
                splice: self.datapath.splice_mode(),
            },
        );
        let mut before = self.enrolled.remove(&cookie);
        let nothing = Topology::default();
        let old = before.as_ref().map_or(&nothing, |pod| &pod.topology);
        let written = self
            .prepare(cookie, &compiled, old, &topology)
            .and_then(|()| self.pods.put_in_force(cookie, &compiled.pod));
        let was_in_force = written.is_ok();
        let done = written.and_then(|()| self.reach_inbound(&netns, &topology, before.as_mut()));
        match done {
            Ok(program) => {
                let program = match before {
                    Some(pod) => {
                        self.grace.remove_later(pod.compiled);
                        pod.program
                    }
                    None => program.context("a new pod has a new program")?,
                };
                tracing::info!(netns = %request.netns.display(), cookie, "enrolled");
                self.enrolled.insert(
                    cookie,
                    Pod {
                        path: request.netns,
                        settings: request.settings,
                        resolvers: request.resolvers,
                        compiled,
                        topology,
                        nsid,
                        lost: false,
                        program,
                    },
                );
                Ok(())
            }
            Err(error) => {
                self.undo(cookie, &topology, before);
                if was_in_force {
                    self.grace.remove_later(compiled);
                } else {
                    self.pods.remove_lists(&compiled);
                }
                Err(error)
            }
        }
    }

    /// Writes all that settings refer to, before they are in force.
    fn prepare(
        &mut self,
        pod: NetnsCookie,
        compiled: &Compiled,
        old: &Topology,
        new: &Topology,
    ) -> Result<()> {
        self.pods.write_lists(compiled)?;
        self.pods.write_topology(pod, old, new)?;
        self.pods.start_counters(pod)
    }

    /// Redirects inbound connections, when outbound ones are: the listeners that
    /// are already there first, so that a proxy in service misses no connection
    /// of a pod that is new. What is forwarded comes last.
    fn reach_inbound(
        &mut self,
        netns: &Netns,
        topology: &Topology,
        before: Option<&mut Pod>,
    ) -> Result<Option<PodProgram>> {
        self.datapath.scan_listeners(netns)?;
        if let Some(pod) = before {
            let program = &mut pod.program;
            self.datapath.follow_interfaces(netns, program, topology)?;
            return Ok(None);
        }
        let mut program = self.datapath.attach_pod(netns)?;
        self.datapath
            .follow_interfaces(netns, &mut program, topology)?;
        Ok(Some(program))
    }

    /// After a failure: as it was before the request.
    fn undo(&mut self, cookie: NetnsCookie, topology: &Topology, before: Option<Pod>) {
        match before {
            Some(pod) => {
                let restored = self
                    .pods
                    .write_topology(cookie, topology, &pod.topology)
                    .and_then(|()| self.pods.put_in_force(cookie, &pod.compiled.pod));
                if let Err(error) = restored {
                    tracing::error!(cookie, "cannot restore the settings: {error:#}");
                }
                self.enrolled.insert(cookie, pod);
            }
            None => self.clear(cookie, topology),
        }
    }

    /// Removes everything but the lists from the maps.
    fn clear(&mut self, cookie: NetnsCookie, topology: &Topology) {
        self.pods.take_out_of_force(cookie);
        self.pods.remove_topology(cookie, topology);
        self.pods.remove_counters(cookie);
    }

    /// Ends the redirection of a pod, if it is enrolled.
    fn forget(&mut self, cookie: NetnsCookie) -> Option<PathBuf> {
        let pod = self.enrolled.remove(&cookie)?;
        self.clear(cookie, &pod.topology);
        self.grace.remove_later(pod.compiled);
        Some(pod.path)
    }

    fn unenrol(&mut self, path: &Path) -> Result<()> {
        let cookie = self.cookie_at(path)?;
        self.forget(cookie);
        tracing::info!(netns = %path.display(), cookie, "unenrolled");
        Ok(())
    }

    /// The enrolled namespace at `path`, or else the one that was enrolled from
    /// there, when that place is empty or another's by now.
    fn cookie_at(&self, path: &Path) -> Result<NetnsCookie> {
        let there = Netns::open(path).map(|netns| netns.cookie());
        if let Ok(cookie) = &there
            && self.enrolled.contains_key(cookie)
        {
            return Ok(*cookie);
        }
        let former = self.enrolled.iter().find(|(_, pod)| pod.path == path);
        match (former, there) {
            (Some((cookie, _)), _) => Ok(*cookie),
            (None, Ok(_)) => bail!(
                "{} is not enrolled; `shunt status` lists what is",
                path.display()
            ),
            (None, Err(error)) => Err(error),
        }
    }

    /// Forgets the namespace that had this id before: the kernel gives an id to
    /// another only when the former is gone.
    fn forget_former(&mut self, nsid: Nsid, now: NetnsCookie) {
        let former = |(cookie, pod): &(&NetnsCookie, &Pod)| pod.nsid == nsid && **cookie != now;
        let gone = self.enrolled.iter().find(former).map(|(cookie, _)| *cookie);
        if let Some(cookie) = gone {
            self.forget_gone(cookie);
        }
    }

    fn forget_gone(&mut self, cookie: NetnsCookie) {
        if let Some(path) = self.forget(cookie) {
            tracing::info!(netns = %path.display(), cookie, "the namespace is gone");
        }
    }

    /// Looks at the pods of which something has changed, and forgets those that
    /// are gone.
    fn follow_networks(&mut self, changes: &Changes) {
        let concerned: Vec<NetnsCookie> = self
            .enrolled
            .iter()
            .filter(|(_, pod)| changes.concern(pod.nsid))
            .map(|(cookie, _)| *cookie)
            .collect();
        for cookie in concerned {
            self.follow_network(cookie, changes);
        }
    }

    /// Brings what is known of a pod's network up to date.
    fn follow_network(&mut self, cookie: NetnsCookie, changes: &Changes) {
        let Some(pod) = self.enrolled.get(&cookie) else {
            return;
        };
        let (path, nsid) = (pod.path.clone(), pod.nsid);
        let netns = match same_netns(&path, cookie) {
            Ok(netns) => netns,
            // Not there any more, and the kernel says that it has lost its id.
            Err(_) if changes.gone.contains(&nsid) => return self.forget_gone(cookie),
            Err(_) if changes.missed && matches!(self.nsids.exists(nsid), Ok(false)) => {
                return self.forget_gone(cookie);
            }
            Err(error) => return self.keep_lost(cookie, &error),
        };
        if let Err(error) = self.refresh(cookie, &netns) {
            // What was known stays: a connection to an address that is new is
            // redirected as if it were another pod's.
            tracing::error!(cookie, "cannot follow a change of the network: {error:#}");
        }
    }

    /// Writes what has changed of a pod's network since it was last looked at.
    fn refresh(&mut self, cookie: NetnsCookie, netns: &Netns) -> Result<()> {
        let Some(pod) = self.enrolled.get_mut(&cookie) else {
            return Ok(());
        };
        let network = Network::read_with_proxy_source(netns, &pod.settings)?;
        pod.lost = false;
        let topology = network.topology(&pod.settings);
        if topology != pod.topology {
            self.pods.write_topology(cookie, &pod.topology, &topology)?;
            pod.topology = topology;
            tracing::debug!(netns = %pod.path.display(), cookie, "the network has changed");
        }
        self.datapath
            .follow_interfaces(netns, &mut pod.program, &pod.topology)?;
        let settings = pod.compiled.with_families(network.families(&pod.settings));
        if settings != pod.compiled.pod {
            self.pods.put_in_force(cookie, &settings)?;
            pod.compiled.pod = settings;
        }
        Ok(())
    }

    /// Says once of a pod that it lives, and cannot be looked at.
    fn keep_lost(&mut self, cookie: NetnsCookie, why: &anyhow::Error) {
        let Some(pod) = self.enrolled.get_mut(&cookie) else {
            return;
        };
        if !pod.lost {
            pod.lost = true;
            tracing::warn!(
                cookie,
                "cannot follow a change of the network, and goes by what was known before: {why:#}"
            );
        }
    }

    fn find_listeners(&mut self, pods: &[NetnsCookie]) {
        for cookie in pods {
            let Some(path) = self.enrolled.get(cookie).map(|pod| pod.path.clone()) else {
                continue;
            };
            let found =
                same_netns(&path, *cookie).and_then(|netns| self.datapath.scan_listeners(&netns));
            if let Err(error) = found {
                tracing::warn!(cookie, "cannot look for listeners: {error:#}");
            }
        }
    }

    fn status(&self) -> Result<Status> {
        let mut programs = self.datapath.programs()?;
        programs.extend(
            self.enrolled
                .values()
                .flat_map(|pod| pod.program.describe(&pod.path)),
        );
        let pods = self
            .enrolled
            .iter()
            .map(|(cookie, pod)| PodStatus {
                netns: pod.path.clone(),
                cookie: *cookie,
                settings: pod.settings.clone(),
                resolvers: pod.resolvers.clone(),
                counters: self.pods.counters(*cookie),
            })
            .collect();
        Ok(Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            programs,
            maps: self.datapath.maps()?,
            splice: self.datapath.splice_status().clone(),
            pods,
        })
    }
}

/// Opens the namespace at `path`, if it is still that with this cookie.
fn same_netns(path: &Path, cookie: NetnsCookie) -> Result<Netns> {
    let netns = Netns::open(path)?;
    if netns.cookie() != cookie {
        bail!("another namespace is at {} now", path.display());
    }
    Ok(netns)
}

/// Redirecting the node's own namespace would take the node off the network, and
/// every pod that shares it.
fn refuse_nodes_own(netns: &Netns) -> Result<()> {
    for own in ["/proc/self/ns/net", "/proc/1/ns/net"] {
        // Of another process the namespace may be out of sight.
        if Netns::open(Path::new(own)).is_ok_and(|own| own.cookie() == netns.cookie()) {
            bail!(
                "{} is the network namespace of the node itself; a pod on the host network \
                 is not redirected",
                netns.path().display()
            );
        }
    }
    Ok(())
}
