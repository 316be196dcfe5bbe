//! The programs and maps in the kernel: the only part that talks to aya.

mod features;
mod forward;
mod hooks;
mod iterate;
mod kernel_types;
mod layout;
mod link;
mod links;
pub mod maps;
mod neighbours;
mod offsets;
mod pods;
mod readers;
mod splice;

use std::{
    collections::BTreeSet,
    fs::File,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, anyhow, bail};
use aya::{
    Btf, Ebpf, EbpfLoader,
    maps::{MapData, RingBuf},
    programs::{Iter, Program, SkLookup},
};
use aya_log::EbpfLogger;
use shunt_abi::{Event, KernelOffsets, NetnsCookie, SpliceMode};

use self::forward::Forwarding;
pub use self::{
    features::{Feature, features},
    maps::MapLimit,
    neighbours::{Neighbour, lookups, neighbours, splicers},
    pods::{CounterReport, Pods},
    splice::{SpliceStatus, Trial, Tried, try_out},
};
use self::{
    hooks::HOOKS,
    kernel_types::KernelTypes,
    layout::TakenOver,
    link::{Link, Target},
    links::{Links, Place},
    maps::{KEPT_MAPS, MAPS},
    splice::Splicing,
};
use crate::{
    bpffs::{PinDir, remove_dir},
    netns::Netns,
    network::{self, MarkedInterfaces},
    observe::logs::{self, DecisionLog},
    settings::Splice,
};

/// The programs of the node.
static NODE_OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/shunt-node"));
/// The program of one pod.
static POD_OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/shunt-pod"));

/// The program that visits listeners.
const LISTENER_PROGRAM: &str = "shunt_listeners";

/// `BPF_SK_LOOKUP`
const SK_LOOKUP: u32 = 36;

/// A program or a map, as `bpftool` shows it.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct KernelObject {
    /// Its name.
    pub name: String,
    /// The kernel's id of it.
    pub id: u32,
    /// What it is attached to, for a program.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub attached_to: Option<String>,
}

/// Whether the kernel says where the fields are that the programs read.
///
/// # Errors
///
/// With the first that is missing.
pub fn offsets_are_known() -> Result<()> {
    offsets::of_kernel(&KernelTypes::read()?).map(drop)
}

/// What becomes of everything when the agent ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Afterwards {
    /// It goes.
    Nothing,
    /// It stays in force, until the next agent takes it over.
    Stays,
}

impl Afterwards {
    /// What the agent says of it when it ends.
    pub const fn said(self) -> &'static str {
        match self {
            Self::Nothing => "detaching",
            Self::Stays => "redirection stays in force",
        }
    }
}

/// The loaded programs of the node. Dropping it detaches them, unless they are to
/// stay.
pub struct Datapath {
    node: Ebpf,
    links: Links,
    /// Those of the node.
    hung: Vec<Link>,
    /// What a former agent left that is gone on with.
    taken_over: Option<TakenOver>,
    root: File,
    /// Loads the copies for the pods. Kept, because a new loader reads all of
    /// the kernel's BTF, which takes longer than everything else together.
    loader: EbpfLoader<'static>,
    cgroup: PathBuf,
    splicing: Option<Splicing>,
    splice_mode: SpliceMode,
    splice_status: SpliceStatus,
    // After the programs: their pins go last.
    pins: PinDir,
}

impl Datapath {
    /// Loads the programs that are for the cgroup v2 directory `cgroup`; the maps are
    /// pinned below `bpffs`, and those of a former agent that left everything in force
    /// are taken over where they are made alike. Splices as far as it is asked for and
    /// this kernel does it safely. Nothing is in force before [`hang`](Self::hang).
    ///
    /// What is new of the maps of connections is made by the program `maker`, which is `shunt`,
    /// so that they are nobody's memory; without one they are that of this process' cgroup.
    ///
    /// # Errors
    ///
    /// When the kernel lacks something, or refuses; then nothing is left but what was
    /// in force before.
    pub fn load(
        cgroup: &Path,
        bpffs: &Path,
        limits: &[MapLimit],
        splice: Splice,
        afterwards: Afterwards,
        maker: Option<&Path>,
    ) -> Result<Self> {
        let types = KernelTypes::read()?;
        let offsets = offsets::of_kernel(&types)?;
        let splice_offsets = splice::of_kernel(&types);
        let btf = Btf::from_sys_fs().context("cannot read the kernel's BTF")?;
        let (splice_mode, splice_status) = splice::settle(splice, &splice_offsets, &btf);
        let splice_offsets = splice_offsets.unwrap_or_default();
        let root = File::open(cgroup)
            .with_context(|| format!("cannot open the cgroup {}", cgroup.display()))?;
        let stays = afterwards == Afterwards::Stays;
        let pins = PinDir::open(bpffs, MAPS, KEPT_MAPS, stays)?;
        splice::drain_left(&pins, splice_offsets);
        let mut loader = loader(offsets);
        splice::prepare(&mut loader, splice_mode, splice_offsets);
        let mut limits = limits.to_vec();
        if splice_mode == SpliceMode::Off {
            limits.splice(..0, maps::without_splicing());
        }
        maps::limit(&mut loader, &limits);
        let make_in = |dir: &Path| {
            if let Some(program) = maker {
                maps::say_whose(maps::have_made(program, dir, &limits));
            }
        };
        let taken_over = if pins.is_in_force() {
            Some(take_over(&mut loader, &pins, make_in)?)
        } else {
            make_in(pins.path());
            None
        };
        maps::pin(&mut loader, pins.path());
        let node = node_object(&mut loader)?;
        // The others have nothing to relocate.
        loader.btf(None);
        let splicing = match splice_mode {
            SpliceMode::Off => None,
            SpliceMode::Between | SpliceMode::Proxy | SpliceMode::All => {
                Some(Splicing::load(&mut loader, &btf)?)
            }
        };
        let links = match afterwards {
            Afterwards::Stays => Links::pinned(pins.path())?,
            Afterwards::Nothing => Links::held(),
        };
        let mut datapath = Self {
            node,
            links,
            hung: Vec::new(),
            taken_over,
            root,
            loader,
            cgroup: cgroup.to_owned(),
            splicing,
            splice_mode,
            splice_status,
            pins,
        };
        datapath.load_programs(&btf)?;
        Ok(datapath)
    }

    /// Has the kernel verify every program, before the first is in force.
    fn load_programs(&mut self, btf: &Btf) -> Result<()> {
        for hook in &HOOKS {
            load_hooked(self.program(hook.program)?)
                .with_context(|| format!("the verifier does not take {}", hook.program))?;
        }
        let visitor: &mut Iter = typed(self.program(LISTENER_PROGRAM)?)?;
        visitor
            .load("task_file", btf)
            .context("the kernel does not take the iterator over listeners")?;
        if self.taken_over.is_some() {
            // Of no namespace: the programs of the pods are still those of before.
            lookup(&mut self.pod_object(&0)?)?;
        }
        Ok(())
    }

    /// Hangs the programs of the node on the cgroup, in the places of those of a
    /// former agent: those with which connections begin, or all the others, which
    /// have to be there first.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn hang(&mut self, entries: bool) -> Result<()> {
        for hook in HOOKS.iter().filter(|hook| hook.is_entry == entries) {
            let program = self
                .node
                .program(hook.program)
                .with_context(|| format!("the program {} is gone", hook.program))?;
            let place = Place {
                name: hook.program.to_owned(),
                target: Target::Cgroup(&self.root),
                attach_type: hook.number,
                is_entry: hook.is_entry,
            };
            let link = self.links.hang(&place, program.fd()?.as_fd());
            self.hung.push(link.with_context(|| {
                format!(
                    "cannot attach {} to {}",
                    hook.program,
                    self.cgroup.display()
                )
            })?);
        }
        Ok(())
    }

    /// What a former agent left that this one goes on with; `None` when nothing was
    /// in force.
    pub(crate) fn takes_over_settings(&self) -> bool {
        self.taken_over.is_some_and(|taken| taken.settings)
    }

    /// Everything is in force: it stays, if it is to.
    pub(crate) fn settle(&mut self) {
        if self.links.stay() {
            self.pins.stay();
        }
    }

    /// Whether what is in force stays when the agent ends.
    pub(crate) const fn stays(&self) -> bool {
        self.links.stay()
    }

    /// The inode of the namespace whose inbound program a former agent has pinned,
    /// while that namespace lives.
    ///
    /// # Errors
    ///
    /// When the kernel does not say.
    pub(crate) fn pinned_netns(&self, cookie: NetnsCookie) -> Result<Option<u32>> {
        self.links.netns_inode(cookie)
    }

    /// Leaves the inbound program of a namespace as a former agent left it. `false`
    /// when the namespace is gone.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub(crate) fn keep(&self, cookie: NetnsCookie) -> Result<bool> {
        self.links.keep(cookie)
    }

    /// Takes away what a former agent has pinned for other namespaces than these.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub(crate) fn sweep(&self, namespaces: &BTreeSet<NetnsCookie>) -> Result<()> {
        let of_node = HOOKS.iter().map(|hook| hook.program).collect();
        self.links.sweep(&of_node, namespaces)
    }

    /// Whether programs of a former agent still follow the connections that it began.
    pub(crate) fn has_former(&self) -> bool {
        self.links.has_former()
    }

    /// Takes those programs away.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub(crate) fn retire_former(&self) -> Result<()> {
        self.links.retire()
    }

    fn program(&mut self, name: &str) -> Result<&mut Program> {
        self.node
            .program_mut(name)
            .ok_or_else(|| anyhow!("the embedded object lacks the program {name}"))
    }

    /// The maps that the agent writes and reads.
    ///
    /// # Errors
    ///
    /// When called twice: there is one writer.
    pub fn pods(&mut self) -> Result<Pods> {
        Pods::take(&mut self.node)
    }

    /// The programs' requests to look for listeners.
    ///
    /// # Errors
    ///
    /// When called twice: there is one reader.
    pub fn events(&mut self) -> Result<Events> {
        self.requests("EVENTS")
    }

    /// The programs' requests to splice connections.
    ///
    /// # Errors
    ///
    /// When called twice: there is one reader.
    pub fn splice_requests(&mut self) -> Result<Events> {
        self.requests("SPLICE_WANTED")
    }

    /// What the programs log: their decisions, where that is asked for.
    ///
    /// # Errors
    ///
    /// When called twice: there is one reader.
    pub fn log(&mut self) -> Result<EbpfLogger<DecisionLog>> {
        EbpfLogger::init_with_logger(&mut self.node, DecisionLog)
            .context("the map of the programs' log was taken already")
    }

    fn requests(&mut self, name: &str) -> Result<Events> {
        let map = self
            .node
            .take_map(name)
            .with_context(|| format!("the map {name} was taken already"))?;
        Ok(Events {
            ring: RingBuf::try_from(map).with_context(|| format!("{name} is no ring buffer"))?,
        })
    }

    /// How far this node splices.
    pub const fn splice_mode(&self) -> SpliceMode {
        self.splice_mode
    }

    /// How splicing is set, and why.
    pub const fn splice_status(&self) -> &SpliceStatus {
        &self.splice_status
    }

    /// Splices the connections that the programs asked for.
    ///
    /// # Errors
    ///
    /// When the kernel refuses the iterator.
    pub fn splice_wanted(&mut self) -> Result<()> {
        match &mut self.splicing {
            Some(splicing) => splicing.admit(),
            None => Ok(()),
        }
    }

    /// Ends splicing without losing a byte: what was spliced and not read yet is
    /// waited for, and what is not read then is left to the next agent.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn stop_splicing(&mut self) -> Result<()> {
        let Some(splicing) = &mut self.splicing else {
            return Ok(());
        };
        if self.links.stay() {
            // It goes on without the agent, and the next one takes care of it.
            return Ok(());
        }
        let stopped = splicing.stop();
        if !matches!(stopped, Ok(true)) {
            tracing::info!(
                "somebody has not read everything that was spliced, or is in the middle of a call; \
                 it stays pinned at {} until the next agent finds it read",
                self.pins.path().display()
            );
            self.pins.leave(KEPT_MAPS)?;
        }
        stopped.map(drop)
    }

    /// Attaches a copy of the inbound program to a namespace; dropping it
    /// detaches it. It does nothing before the namespace has settings.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn attach_pod(&mut self, netns: &Netns) -> Result<PodProgram> {
        // The loader keeps what it is given: eight bytes for each pod.
        let cookie: &'static NetnsCookie = Box::leak(Box::new(netns.cookie()));
        let mut object = self.pod_object(cookie)?;
        let program = lookup(&mut object)?;
        let place = Place {
            name: links::lookup_name(netns.cookie()),
            target: Target::Netns(netns.as_fd()),
            attach_type: SK_LOOKUP,
            is_entry: false,
        };
        // The link keeps the program, and the program its maps: the object's
        // descriptors, a dozen for each pod, are not needed any longer.
        let link = self.links.hang(&place, program.fd()?.as_fd());
        let link = link.with_context(|| {
            format!(
                "cannot attach the inbound program to {}",
                netns.path().display()
            )
        })?;
        Ok(PodProgram {
            id: program.info().context("cannot look at the program")?.id(),
            cookie,
            forwarding: Forwarding::default(),
            link,
        })
    }

    /// Attaches copies of the forwarding programs to the interfaces of a
    /// namespace that are virtual, and detaches them from those that are not any
    /// more.
    ///
    /// # Errors
    ///
    /// When the kernel refuses; then those that were attached before stay.
    pub fn follow_interfaces(
        &mut self,
        netns: &Netns,
        pod: &mut PodProgram,
        interfaces: &MarkedInterfaces,
    ) -> Result<()> {
        let wanted = network::virtual_ones(interfaces);
        if pod.forwarding.lacks(&wanted) {
            let mut object = self.pod_object(pod.cookie)?;
            pod.forwarding
                .attach(&mut object, netns, &wanted, &self.links)?;
        }
        pod.forwarding.retain(&wanted);
        Ok(())
    }

    /// The programs of a pod, none of them in the kernel yet.
    fn pod_object(&mut self, cookie: &'static NetnsCookie) -> Result<Ebpf> {
        self.loader
            .override_global("NETNS", cookie, true)
            .load(POD_OBJECT)
            .context("the kernel does not take the maps of the pod's programs")
    }

    /// Finds listeners that are in no slot yet, in every namespace whose settings are in
    /// force. They have to be open in a process that the agent can see.
    ///
    /// # Errors
    ///
    /// When the kernel refuses the iterator.
    pub fn scan_listeners(&mut self) -> Result<()> {
        let visitor: &mut Iter = typed(self.program(LISTENER_PROGRAM)?)?;
        iterate::all(visitor).context("cannot look for listeners")
    }

    /// The node's programs and what they are attached to.
    ///
    /// # Errors
    ///
    /// When the kernel does not answer.
    pub fn programs(&self) -> Result<Vec<KernelObject>> {
        let mut programs = self.cgroup_programs()?;
        if let Some(splicing) = &self.splicing {
            programs.push(splicing.describe()?);
        }
        Ok(programs)
    }

    fn cgroup_programs(&self) -> Result<Vec<KernelObject>> {
        HOOKS
            .iter()
            .map(|hook| {
                let name = hook.program;
                let program = self
                    .node
                    .program(name)
                    .with_context(|| format!("the program {name} is gone"))?;
                Ok(KernelObject {
                    name: name.to_owned(),
                    id: program.info()?.id(),
                    attached_to: Some(self.cgroup.display().to_string()),
                })
            })
            .collect()
    }

    /// The maps.
    ///
    /// # Errors
    ///
    /// When the kernel does not answer.
    pub fn maps(&self) -> Result<Vec<KernelObject>> {
        MAPS.iter()
            .map(|name| {
                let map = MapData::from_pin(self.pins.pin(name))
                    .with_context(|| format!("cannot open the pinned map {name}"))?;
                Ok(KernelObject {
                    name: (*name).to_owned(),
                    id: map.info()?.id(),
                    attached_to: None,
                })
            })
            .collect()
    }
}

/// The programs of one pod. Dropping it detaches them, unless they are to stay
/// without the agent.
pub struct PodProgram {
    id: u32,
    cookie: &'static NetnsCookie,
    forwarding: Forwarding,
    link: Link,
}

impl PodProgram {
    /// Whether its namespace is gone: the kernel has taken the program off it
    /// (`bpf_netns_link_fill_info`).
    ///
    /// # Errors
    ///
    /// When the kernel does not say.
    pub(crate) fn is_left_over(&self) -> Result<bool> {
        Ok(self.link.place()?.is_none())
    }

    /// Detaches them, whether they are to stay or not.
    pub fn detach(mut self) {
        self.forwarding.retain(&BTreeSet::new());
        if let Err(error) = self.link.detach() {
            tracing::warn!("a program of a pod is left: {error:#}");
        }
    }

    /// The programs, as `bpftool` shows them.
    pub fn describe(&self, netns: &Path) -> Vec<KernelObject> {
        let lookup = KernelObject {
            name: "shunt_lookup".to_owned(),
            id: self.id,
            attached_to: Some(netns.display().to_string()),
        };
        let mut programs = vec![lookup];
        programs.extend(self.forwarding.describe(netns));
        programs
    }
}

/// The stream of the programs' requests.
pub struct Events {
    ring: RingBuf<MapData>,
}

impl AsFd for Events {
    /// The descriptor that becomes readable when there is something.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

impl Events {
    /// The namespaces that programs asked about since the last call.
    pub fn drain(&mut self) -> Vec<NetnsCookie> {
        let mut cookies = Vec::new();
        while let Some(item) = self.ring.next() {
            // An Event starts with its cookie.
            const { assert!(std::mem::offset_of!(Event, cookie) == 0) };
            if let Some(cookie) = item.first_chunk::<8>() {
                cookies.push(NetnsCookie::from_ne_bytes(*cookie));
            }
        }
        cookies.sort_unstable();
        cookies.dedup();
        cookies
    }
}

/// A loader that sets what the programs have to know of this kernel; pods' copies
/// also have to be told their namespace.
fn loader(offsets: KernelOffsets) -> EbpfLoader<'static> {
    let mut loader = EbpfLoader::new();
    let offsets: &'static KernelOffsets = Box::leak(Box::new(offsets));
    loader.override_global("OFFSETS", offsets, true);
    loader.override_global("NETNS", &0_u64, true);
    let logs: &'static u32 = if logs::decisions_are_logged() { &1 } else { &0 };
    // Where nothing is decided there is no such constant.
    loader.override_global("LOG_DECISIONS", logs, false);
    loader
}

/// The programs of the node, none of them in the kernel yet, and their maps.
fn node_object(loader: &mut EbpfLoader<'static>) -> Result<Ebpf> {
    loader
        .load(NODE_OBJECT)
        .context("the kernel does not take the maps of the node's programs")
}

/// Goes on with the maps of a former agent, as far as they are made alike, and makes
/// new ones for the rest.
fn take_over(
    loader: &mut EbpfLoader<'static>,
    pins: &PinDir,
    make_in: impl FnOnce(&Path),
) -> Result<TakenOver> {
    let made = pins.aside()?;
    make_in(&made);
    maps::pin(loader, &made);
    node_object(loader)?;
    let taken = layout::settle(pins.path(), &made, MAPS)?;
    remove_dir(&made)?;
    if !taken.connections {
        links::put_aside(pins.path())?;
    }
    tracing::info!(
        settings = taken.settings,
        connections = taken.connections,
        "takes over what a former agent has left in force"
    );
    Ok(taken)
}

/// Loads a program that hangs on a cgroup.
fn load_hooked(program: &mut Program) -> Result<()> {
    if let Program::CgroupSockAddr(program) = program {
        program.load()?;
    } else if let Program::CgroupSockopt(program) = program {
        program.load()?;
    } else if let Program::SockOps(program) = program {
        program.load()?;
    } else {
        bail!(
            "it is of type {:?}, which hangs on no cgroup",
            program.prog_type()
        );
    }
    Ok(())
}

/// The inbound program of a pod's object, loaded.
fn lookup(object: &mut Ebpf) -> Result<&mut SkLookup> {
    let program: &mut SkLookup = typed(
        object
            .program_mut("shunt_lookup")
            .context("the embedded object lacks the program shunt_lookup")?,
    )?;
    program
        .load()
        .context("the verifier does not take the inbound program")?;
    Ok(program)
}

/// Takes away everything that agents have left at `bpffs`, none of which runs any
/// more. What was spliced and not read yet is waited for, up to a second.
///
/// # Errors
///
/// When an agent runs there, or the kernel refuses.
pub fn uninstall(bpffs: &Path) -> Result<()> {
    let Some(pins) = PinDir::take(bpffs, MAPS, KEPT_MAPS)? else {
        return Ok(());
    };
    links::detach_all(pins.path())?;
    pins.leave(KEPT_MAPS)?;
    splice::drain_before_removal(&pins)?;
    pins.uninstall()
}

/// Takes away the programs that hang on interfaces of a namespace without links
/// (before Linux 6.6).
pub fn remove_filters(netns: &Netns) {
    forward::remove_filters(netns);
}

fn typed<'p, T>(program: &'p mut Program) -> Result<&'p mut T>
where
    &'p mut T: TryFrom<&'p mut Program>,
    <&'p mut T as TryFrom<&'p mut Program>>::Error: std::error::Error + Send + Sync + 'static,
{
    program.try_into().context("a program is of another type")
}
