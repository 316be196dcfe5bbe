//! Takes over what a former agent has left in force, without a moment in which it is
//! not.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, anyhow};
use shunt_abi::NetnsCookie;

use super::{EnrolRequest, Node, Pod, Version, follow::same_netns, saved::Saved};
use crate::{
    datapath::PodProgram,
    netns::Netns,
    network::{Network, Nsid, RouteTable},
    settings::Families,
    userns::IdMaps,
};

/// A namespace that a former agent has enrolled and that this one cannot look at. What
/// is in force there stays.
pub(super) struct Kept {
    /// How it was enrolled, if that is understood.
    pub(super) request: Option<EnrolRequest>,
}

/// A namespace that a former agent has enrolled, with its settings in force by the maps
/// of this one.
struct Written {
    netns: Netns,
    request: EnrolRequest,
    version: Version,
    network: Network,
    nsid: Nsid,
}

impl Node {
    /// Puts the programs in force, in the places of those of a former agent.
    ///
    /// First the maps are complete; then comes what follows connections, then each
    /// namespace's own program, whose listeners have to be known before; and what
    /// begins connections comes last, so that nothing is begun that nobody follows.
    ///
    /// # Errors
    ///
    /// When the kernel refuses the programs.
    pub(super) fn take_over(&mut self) -> Result<()> {
        self.list_sets = self.pods.newest_version();
        let first = self.list_sets + 1;
        let saved = match &self.store {
            Some(store) => store.load()?,
            None => Vec::new(),
        };
        let written: Vec<Written> = saved
            .into_iter()
            .filter_map(|saved| self.write_again(saved))
            .collect();
        self.datapath.hang(false)?;
        let found = match written.is_empty() && self.kept.is_empty() {
            true => Ok(()),
            false => self.datapath.scan_listeners(),
        };
        if let Err(error) = &found {
            tracing::warn!("{error:#}");
        }
        for pod in written {
            let cookie = pod.netns.cookie();
            let request = pod.request.clone();
            let attached = match &found {
                Ok(()) => self.attach_again(pod),
                Err(error) => Err(anyhow!("{error:#}")),
            };
            if let Err(error) = attached {
                self.keep(cookie, Some(request), &error);
            }
        }
        self.datapath.hang(true)?;
        self.datapath.settle();
        if self.datapath.stays() {
            self.sweep();
            self.timer.sweep_later(first);
        }
        if self.datapath.has_former() {
            self.timer.retire_later();
        }
        Ok(())
    }

    /// Writes the settings of a namespace anew, under a new number. `None` when it is
    /// gone, or stays as it is.
    fn write_again(&mut self, saved: Saved) -> Option<Written> {
        let cookie = saved.cookie;
        let inode = self.datapath.pinned_netns(cookie).unwrap_or_else(|error| {
            tracing::warn!(cookie, "cannot look at a pinned program: {error:#}");
            None
        });
        let request = match saved.request {
            Ok(request) => request,
            Err(error) if inode.is_some() => {
                self.keep(cookie, None, &error);
                return None;
            }
            Err(_) => {
                self.unsave(cookie);
                return None;
            }
        };
        match (find(&request.netns, cookie, inode), inode) {
            (Some(netns), _) => match self.write_from(&netns, &request) {
                Ok(written) => Some(written),
                Err(error) => {
                    self.write_blind(cookie, &request);
                    self.keep(cookie, Some(request), &error);
                    None
                }
            },
            (None, Some(_)) => {
                self.write_blind(cookie, &request);
                let why = anyhow!("it is not at {} any more", request.netns.display());
                self.keep(cookie, Some(request), &why);
                None
            }
            (None, None) => {
                tracing::info!(netns = %request.netns.display(), cookie, "the namespace is gone");
                self.unsave(cookie);
                None
            }
        }
    }

    fn write_from(&mut self, netns: &Netns, request: &EnrolRequest) -> Result<Written> {
        let request = EnrolRequest {
            netns: netns.path().to_owned(),
            ..request.clone()
        };
        let cookie = netns.cookie();
        let nsid = self.nsids.of(netns)?;
        let ids = IdMaps::of(netns)?;
        let network = Network::read_with_proxy_source(netns, &request.settings)?;
        let version = self.next_version(&request, &network, &ids);
        let in_force = self
            .write(cookie, &version, &RouteTable::new(), &network.routes)
            .and_then(|()| self.pods.put_in_force(cookie, &version.compiled.pod));
        self.remove_unless(&version, in_force)?;
        Ok(Written {
            netns: Netns::open(&request.netns)?,
            request,
            version,
            network,
            nsid,
        })
    }

    /// Settings for a namespace that cannot be looked at, when the maps have none yet:
    /// without routes, so that what is captured is refused and nothing goes out past
    /// the proxy.
    fn write_blind(&mut self, cookie: NetnsCookie, request: &EnrolRequest) {
        const ANY: Families = Families { v4: true, v6: true };
        if self.datapath.takes_over_settings() {
            return;
        }
        let network = Network::default();
        let mut version = self.next_version(request, &network, &IdMaps::same());
        version.compiled.pod = version.compiled.with_families(ANY);
        let done = self
            .write(cookie, &version, &RouteTable::new(), &network.routes)
            .and_then(|()| self.pods.put_in_force(cookie, &version.compiled.pod));
        if let Err(error) = done {
            tracing::error!(cookie, "redirection is not in force any more: {error:#}");
        }
    }

    /// Attaches the programs of a namespace whose settings are in force and whose listeners
    /// have been looked for.
    fn attach_again(&mut self, pod: Written) -> Result<()> {
        let Written {
            netns,
            request,
            version,
            network,
            nsid,
        } = pod;
        let cookie = netns.cookie();
        let mut program = self.datapath.attach_pod(&netns)?;
        self.datapath
            .follow_interfaces(&netns, &mut program, &version.interfaces)?;
        if let Some(store) = &self.store {
            // It may be at another place than it was.
            store.save(cookie, &request)?;
        }
        self.tally.comes(&self.pods.counted(cookie));
        tracing::info!(netns = %request.netns.display(), cookie, "enrolled as before");
        self.note(cookie, request, version, network.routes, nsid, program);
        Ok(())
    }

    /// What the agent remembers of an enrolled namespace.
    pub(super) fn note(
        &mut self,
        cookie: NetnsCookie,
        request: EnrolRequest,
        version: Version,
        routes: RouteTable,
        nsid: Nsid,
        program: PodProgram,
    ) {
        let pod = Pod {
            path: request.netns,
            settings: request.settings,
            resolvers: request.resolvers,
            pod: request.pod,
            version,
            routes,
            nsid,
            complained: false,
            looks_again: false,
            program,
        };
        self.enrolled.insert(cookie, pod);
    }

    /// Leaves a namespace as a former agent left it, and says so.
    fn keep(&mut self, cookie: NetnsCookie, request: Option<EnrolRequest>, why: &anyhow::Error) {
        match self.datapath.keep(cookie) {
            Ok(_) => {}
            Err(error) => tracing::error!(cookie, "cannot keep a pinned program: {error:#}"),
        }
        if self.kept.insert(cookie, Kept { request }).is_none() {
            tracing::warn!(
                cookie,
                "a namespace that a former agent has enrolled cannot be looked at; what is in \
                 force there stays, changes of its network are not followed: {why:#}"
            );
        }
        self.timer.look_at_kept(cookie);
    }

    /// Looks again at a namespace that could not be looked at.
    pub(super) fn look_at_kept(&mut self, cookie: NetnsCookie) {
        let Some(kept) = self.kept.get(&cookie) else {
            return;
        };
        let request = kept.request.clone();
        match (self.datapath.pinned_netns(cookie), request) {
            (Ok(None), _) => {
                tracing::info!(cookie, "the namespace is gone");
                self.drop_kept(cookie);
            }
            (Ok(inode), Some(request)) => {
                let again = find(&request.netns, cookie, inode)
                    .context("it is not found")
                    .and_then(|netns| self.adopt(&netns, &request));
                if let Err(error) = again {
                    self.keep(cookie, Some(request), &error);
                }
            }
            (Ok(_), None) | (Err(_), _) => self.timer.look_at_kept(cookie),
        }
    }

    /// Enrols a namespace that a former agent has enrolled, in which something is in
    /// force.
    pub(super) fn adopt(&mut self, netns: &Netns, request: &EnrolRequest) -> Result<()> {
        let written = self.write_from(netns, request)?;
        self.datapath.scan_listeners()?;
        self.attach_again(written)?;
        self.kept.remove(&netns.cookie());
        self.sweep();
        Ok(())
    }

    /// Forgets those of the kept namespaces that are gone.
    pub(super) fn follow_kept(&mut self) {
        let cookies: Vec<NetnsCookie> = self.kept.keys().copied().collect();
        for cookie in cookies {
            if matches!(self.datapath.pinned_netns(cookie), Ok(None)) {
                tracing::info!(cookie, "the namespace is gone");
                self.drop_kept(cookie);
            }
        }
    }

    /// Ends what is in force in a kept namespace.
    pub(super) fn drop_kept(&mut self, cookie: NetnsCookie) {
        self.kept.remove(&cookie);
        self.sweep();
        self.unsave(cookie);
    }

    pub(super) fn unsave(&self, cookie: NetnsCookie) {
        let removed = self.store.as_ref().map(|store| store.remove(cookie));
        if let Some(Err(error)) = removed {
            tracing::warn!(cookie, "an enrolment that has ended stays saved: {error:#}");
        }
    }

    /// Removes from the maps and from the pins what belongs to no namespace that is
    /// enrolled or kept.
    fn sweep(&mut self) {
        let routes: BTreeMap<NetnsCookie, &RouteTable> = self
            .enrolled
            .iter()
            .map(|(cookie, pod)| (*cookie, &pod.routes))
            .collect();
        let kept: BTreeSet<NetnsCookie> = self.kept.keys().copied().collect();
        self.pods.retain(&routes, &kept);
        let known = routes.keys().chain(&kept).copied().collect();
        if let Err(error) = self.datapath.sweep(&known) {
            tracing::warn!("pins of a former agent are left: {error:#}");
        }
    }
}

/// The namespace with this cookie: where it was, or else, by the number of its file,
/// wherever a process or a mount still names it.
fn find(path: &Path, cookie: NetnsCookie, inode: Option<u32>) -> Option<Netns> {
    if let Ok(netns) = same_netns(path, cookie) {
        return Some(netns);
    }
    let inode = u64::from(inode?);
    names()
        .filter(|path| fs::metadata(path).is_ok_and(|found| found.ino() == inode))
        .find_map(|path| same_netns(&path, cookie).ok())
}

/// Where namespaces are named: by mounts, and by processes.
fn names() -> impl Iterator<Item = PathBuf> {
    let entries = |dir: &str| {
        fs::read_dir(dir)
            .into_iter()
            .flatten()
            .filter_map(Result::ok)
    };
    let mounted = entries("/run/netns").map(|entry| entry.path());
    let processes = entries("/proc")
        .filter(|entry| entry.file_name().to_string_lossy().parse::<u32>().is_ok())
        .map(|entry| entry.path().join("ns/net"));
    mounted.chain(processes)
}
