//! The enrolled namespaces of the node, owned by one thread.
//!
//! Requests come in through a [`NodeHandle`] and are answered one after the
//! other, so nothing here needs a lock, and what the maps hold is what this
//! thread wrote.

mod adopt;
mod follow;
mod handle;
mod saved;
mod status;
mod totals;

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};
use shunt_abi::{NetnsCookie, PodSettings};
use tokio::sync::mpsc;

#[cfg(test)]
pub(crate) use self::handle::handle_for_tests;
use self::{
    adopt::Kept,
    handle::{Command, Timer},
    totals::Tally,
};
pub use self::{
    handle::{NodeHandle, WeakNode},
    saved::{DEFAULT_STATE_DIR, Store, remove_saved, saved_namespaces},
    status::{Enrolled, PodStatus, Status},
    totals::{MapFill, Totals},
};
use crate::{
    datapath::{Datapath, PodProgram, Pods},
    netns::Netns,
    network::{self, MarkedInterfaces, Network, Nsid, Nsids, RouteTable},
    pods::PodRef,
    settings::{Compiled, Enrolment, Settings, compile},
    userns::IdMaps,
};

/// What it takes to enrol a namespace.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EnrolRequest {
    /// Where the namespace is, such as `/run/netns/NAME`.
    #[serde(deserialize_with = "crate::netns::absolute_path")]
    pub netns: PathBuf,
    /// The nameservers of the pod's resolv.conf.
    pub resolvers: Vec<IpAddr>,
    /// The settings.
    pub settings: Settings,
    /// The pod whose namespace it is, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<PodRef>,
}

/// A version of a pod's settings, as the maps hold it. All of it has a number of
/// its own there, so that settings and what they refer to change at once.
struct Version {
    compiled: Compiled,
    interfaces: MarkedInterfaces,
}

/// A pod in force.
struct Pod {
    path: PathBuf,
    settings: Settings,
    resolvers: Vec<IpAddr>,
    pod: Option<PodRef>,
    version: Version,
    routes: RouteTable,
    /// What the kernel calls its namespace when it tells of changes.
    nsid: Nsid,
    /// It could not be looked at when it changed, and that has been said.
    complained: bool,
    /// It will be looked at again.
    looks_again: bool,
    /// Attached to the namespace while this is kept.
    program: PodProgram,
}

struct Node {
    pods: Pods,
    datapath: Datapath,
    nsids: Nsids,
    enrolled: BTreeMap<NetnsCookie, Pod>,
    /// Those of a former agent that cannot be looked at.
    kept: BTreeMap<NetnsCookie, Kept>,
    /// Where enrolments are saved that are to stay in force.
    store: Option<Store>,
    /// How many versions of settings there have been: the number of the newest.
    list_sets: u32,
    tally: Tally,
    timer: Timer,
    /// Listeners could not be looked for, and that has been said.
    listeners_missed: bool,
}

impl Node {
    fn new(mut datapath: Datapath, store: Option<Store>, timer: Timer) -> Result<Self> {
        Ok(Self {
            pods: datapath.pods()?,
            datapath,
            nsids: Nsids::open()?,
            enrolled: BTreeMap::new(),
            kept: BTreeMap::new(),
            store,
            list_sets: 0,
            tally: Tally::default(),
            timer,
            listeners_missed: false,
        })
    }

    fn serve(&mut self, mut inbox: mpsc::Receiver<Command>) {
        while let Some(command) = inbox.blocking_recv() {
            // An answer that nobody waits for any more is nobody's loss.
            match command {
                Command::Enrol(request, answer) => {
                    let done = self.enrol(*request);
                    self.tally.enrolment(&done);
                    let _ = answer.send(done);
                }
                Command::Unenrol(netns, answer) => {
                    let _ = answer.send(self.unenrol(&netns));
                }
                Command::UnenrolPod(uid, answer) => {
                    let _ = answer.send(Ok(self.unenrol_pod(&uid)));
                }
                Command::Enrolled(answer) => {
                    let _ = answer.send(Ok(self.enrolled().collect()));
                }
                Command::Status(answer) => {
                    let _ = answer.send(self.status());
                }
                Command::Totals(answer) => {
                    let _ = answer.send(Ok(self.totals()));
                }
                Command::Splice(answer) => {
                    let _ = answer.send(self.splice());
                }
                Command::FindListeners(pods, answer) => {
                    let _ = answer.send(Ok(self.find_listeners(&pods)));
                }
                Command::FollowNetworks(changes) => self.follow_networks(&changes),
                Command::LookAgain(cookie) => self.look_again(cookie),
                Command::Remove(version) => self.remove(&version),
                Command::LookAtKept(cookie) => self.look_at_kept(cookie),
                Command::Sweep(first) => self.pods.remove_versions_before(first),
                Command::Retire => self.retire(),
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

    /// Enrols a namespace. It is saved before anything is in force, for an agent that
    /// may have to go on with it.
    fn enrol(&mut self, request: EnrolRequest) -> Result<()> {
        let netns = Netns::open(&request.netns)?;
        let cookie = netns.cookie();
        refuse_nodes_own(&netns)?;
        let former = self.request(cookie);
        if let Some(store) = &self.store {
            store.save(cookie, &request)?;
        }
        let done = if self.kept.contains_key(&cookie) {
            self.adopt(&netns, &request)
        } else {
            self.put_in_force(&netns, request)
        };
        if done.is_err() {
            match (&self.store, former) {
                (Some(store), Some(former)) => store.save(cookie, &former)?,
                (Some(_), None) => self.unsave(cookie),
                (None, _) => {}
            }
        }
        done
    }

    /// How a namespace is enrolled.
    fn request(&self, cookie: NetnsCookie) -> Option<EnrolRequest> {
        if let Some(kept) = self.kept.get(&cookie) {
            return kept.request.clone();
        }
        self.enrolled.get(&cookie).map(|pod| EnrolRequest {
            netns: pod.path.clone(),
            resolvers: pod.resolvers.clone(),
            settings: pod.settings.clone(),
            pod: pod.pod.clone(),
        })
    }

    fn put_in_force(&mut self, netns: &Netns, request: EnrolRequest) -> Result<()> {
        let cookie = netns.cookie();
        // From here on changes are reported; then it can be looked at.
        let nsid = self.nsids.of(netns)?;
        let ids = IdMaps::of(netns)?;
        let network = Network::read_with_proxy_source(netns, &request.settings)?;
        self.forget_former(nsid, cookie);
        let version = self.next_version(&request, &network, &ids);
        let done = match self.enrolled.remove(&cookie) {
            None => self.begin(netns, &version, &network.routes),
            Some(pod) => self.replace(netns, pod, &version, &network.routes),
        };
        let program = match done {
            Ok(program) => program,
            Err(error) => {
                if network.gave_proxy_source {
                    network::take_proxy_source(netns);
                }
                // It may have been in force for a moment.
                self.timer.remove_later(version);
                return Err(error);
            }
        };
        tracing::info!(netns = %request.netns.display(), cookie, "enrolled");
        self.note(cookie, request, version, network.routes, nsid, program);
        Ok(())
    }

    /// Takes the programs of former agents away, whose connections have been accepted
    /// by now.
    fn retire(&self) {
        match self.datapath.retire_former() {
            Ok(()) => tracing::info!("the programs of the former agent are gone"),
            Err(error) => tracing::warn!("programs of a former agent are left: {error:#}"),
        }
    }

    /// Settings as the maps will hold them, under a new number.
    fn next_version(&mut self, request: &EnrolRequest, network: &Network, ids: &IdMaps) -> Version {
        self.list_sets += 1;
        let compiled = compile(
            &request.settings,
            &Enrolment {
                list_set: self.list_sets,
                resolvers: &request.resolvers,
                families: network.families(&request.settings),
                ids,
                splice: self.datapath.splice_mode(),
            },
        );
        Version {
            compiled,
            interfaces: network.marked(&request.settings),
        }
    }

    /// Puts the settings of a new pod in force. When they are, outbound connections
    /// are redirected; then inbound ones, the listeners that are already there
    /// first, so that a proxy in service misses none. What is forwarded comes last.
    fn begin(
        &mut self,
        netns: &Netns,
        version: &Version,
        routes: &RouteTable,
    ) -> Result<PodProgram> {
        let cookie = netns.cookie();
        // Nothing, unless another agent has counted it.
        self.tally.comes(&self.pods.counted(cookie));
        let in_force = self
            .write(cookie, version, &RouteTable::new(), routes)
            .and_then(|()| self.pods.put_in_force(cookie, &version.compiled.pod));
        let done = self
            .remove_unless(version, in_force)
            .and_then(|()| self.datapath.scan_listeners())
            .and_then(|()| self.datapath.attach_pod(netns))
            .and_then(|mut program| {
                let followed =
                    self.datapath
                        .follow_interfaces(netns, &mut program, &version.interfaces);
                match followed {
                    Ok(()) => Ok(program),
                    Err(error) => {
                        program.detach();
                        Err(error)
                    }
                }
            });
        if done.is_err() {
            self.clear(cookie, routes);
        }
        done
    }

    /// Replaces the settings of a pod, which keeps its programs.
    fn replace(
        &mut self,
        netns: &Netns,
        mut pod: Pod,
        version: &Version,
        routes: &RouteTable,
    ) -> Result<PodProgram> {
        let cookie = netns.cookie();
        let (old, new) = (pod.version.compiled.pod, version.compiled.pod);
        let in_force = self
            .write(cookie, version, &pod.routes, routes)
            .and_then(|()| self.change_over(cookie, &old, &new));
        let done = self.remove_unless(version, in_force).and_then(|()| {
            self.datapath
                .follow_interfaces(netns, &mut pod.program, &version.interfaces)
        });
        match done {
            Ok(()) => {
                self.timer.remove_later(pod.version);
                Ok(pod.program)
            }
            Err(error) => {
                self.restore(cookie, pod, routes);
                Err(error)
            }
        }
    }

    /// Writes all that settings refer to, before they are in force.
    fn write(
        &mut self,
        cookie: NetnsCookie,
        version: &Version,
        old_routes: &RouteTable,
        routes: &RouteTable,
    ) -> Result<()> {
        let list_set = version.compiled.pod.list_set;
        self.pods.write_lists(&version.compiled)?;
        self.pods
            .write_interfaces(list_set, &MarkedInterfaces::default(), &version.interfaces)?;
        self.pods.write_routes(cookie, old_routes, routes)?;
        self.pods.start_counters(cookie)
    }

    /// Removes a version that did not come into force: nobody has looked into it.
    fn remove_unless(&mut self, version: &Version, in_force: Result<()>) -> Result<()> {
        if in_force.is_err() {
            self.remove(version);
        }
        in_force
    }

    /// From one version to the next without a gap. Where the proxy's ports change,
    /// its listeners on the new ones have to be known before the first connection
    /// is sent there, and connections to the old ones may still be under way.
    fn change_over(
        &mut self,
        cookie: NetnsCookie,
        old: &PodSettings,
        new: &PodSettings,
    ) -> Result<()> {
        if old.proxy_ports() == new.proxy_ports() {
            return self.pods.put_in_force(cookie, new);
        }
        self.pods.put_in_force(cookie, &old.with_ports_of(new))?;
        self.datapath.scan_listeners()?;
        self.pods.put_in_force(cookie, &new.with_ports_of(old))
    }

    /// After a failure: as it was before the request.
    fn restore(&mut self, cookie: NetnsCookie, pod: Pod, routes: &RouteTable) {
        let settings = self.pods.put_in_force(cookie, &pod.version.compiled.pod);
        let routes = self.pods.write_routes(cookie, routes, &pod.routes);
        for error in [settings, routes].into_iter().filter_map(Result::err) {
            tracing::error!(cookie, "cannot restore what was before: {error:#}");
        }
        self.enrolled.insert(cookie, pod);
    }

    /// Removes a version that is no longer in force.
    fn remove(&mut self, version: &Version) {
        self.pods.remove_lists(&version.compiled);
        self.pods
            .remove_interfaces(version.compiled.pod.list_set, &version.interfaces);
    }

    /// Removes from the maps what a pod has beside its version.
    fn clear(&mut self, cookie: NetnsCookie, routes: &RouteTable) {
        self.pods.take_out_of_force(cookie);
        self.pods.remove_routes(cookie, routes);
        self.tally.goes(&self.pods.counted(cookie));
        self.pods.remove_counters(cookie);
    }

    /// Ends the redirection of a pod, if it is enrolled.
    fn forget(&mut self, cookie: NetnsCookie) -> Option<PathBuf> {
        let pod = self.enrolled.remove(&cookie)?;
        self.clear(cookie, &pod.routes);
        pod.program.detach();
        self.timer.remove_later(pod.version);
        self.unsave(cookie);
        Some(pod.path)
    }

    fn unenrol(&mut self, path: &Path) -> Result<()> {
        let cookie = self.cookie_at(path)?;
        if self.forget(cookie).is_none() {
            self.drop_kept(cookie);
        }
        tracing::info!(netns = %path.display(), cookie, "unenrolled");
        Ok(())
    }

    fn unenrol_pod(&mut self, uid: &str) -> usize {
        let is_of_pod = |pod: &Pod| pod.pod.as_ref().is_some_and(|pod| pod.uid == uid);
        let cookies: Vec<NetnsCookie> = self
            .enrolled
            .iter()
            .filter(|(_, pod)| is_of_pod(pod))
            .map(|(cookie, _)| *cookie)
            .collect();
        for &cookie in &cookies {
            if let Some(path) = self.forget(cookie) {
                tracing::info!(netns = %path.display(), cookie, "unenrolled");
            }
        }
        cookies.len()
    }

    fn enrolled(&self) -> impl Iterator<Item = Enrolled> {
        self.enrolled.iter().map(|(cookie, pod)| Enrolled {
            netns: pod.path.clone(),
            cookie: *cookie,
            settings: pod.settings.clone(),
            resolvers: pod.resolvers.clone(),
            pod: pod.pod.clone(),
        })
    }

    /// The enrolled namespace at `path`, or else the one that was enrolled from
    /// there, when that place is empty or another's by now.
    fn cookie_at(&self, path: &Path) -> Result<NetnsCookie> {
        let there = Netns::open(path).map(|netns| netns.cookie());
        if let Ok(cookie) = &there
            && (self.enrolled.contains_key(cookie) || self.kept.contains_key(cookie))
        {
            return Ok(*cookie);
        }
        let former = self.enrolled.iter().find(|(_, pod)| pod.path == path);
        let was_there = |kept: &Kept| matches!(&kept.request, Some(from) if from.netns == path);
        let kept = self.kept.iter().find(|(_, kept)| was_there(kept));
        let former = former.map(|(cookie, _)| *cookie);
        match (former.or(kept.map(|(cookie, _)| *cookie)), there) {
            (Some(cookie), _) => Ok(cookie),
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
                pod: pod.pod.clone(),
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
