//! The programs and maps in the kernel: the only part that talks to aya.

mod features;
mod forward;
mod neighbours;
mod offsets;
mod pods;
mod readers;
mod splice;

use std::{
    fs::File,
    io::Read as _,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
    str::FromStr,
};

use anyhow::{Context as _, Result, anyhow, bail};
use aya::{
    Btf, Ebpf, EbpfLoader,
    maps::{MapData, RingBuf},
    programs::{CgroupAttachMode, Iter, Program, SkLookup, sk_lookup::SkLookupLink},
};
use aya_log::EbpfLogger;
use shunt_abi::{Event, KernelOffsets, NetnsCookie, SpliceMode};

use self::forward::Forwarding;
pub use self::{
    features::{Feature, features},
    neighbours::{Neighbour, neighbours, splicers},
    pods::{CounterReport, Pods},
    splice::{SpliceStatus, Trial, Tried, try_out},
};
use self::{offsets::KernelTypes, splice::Splicing};
use crate::{
    bpffs::PinDir,
    netns::Netns,
    network::{self, MarkedInterfaces},
    observe::logs::{self, DecisionLog},
    settings::Splice,
};

/// The programs of the node.
static NODE_OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/shunt-node"));
/// The program of one pod.
static POD_OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/shunt-pod"));

/// Every map of the objects, pinned so that the copies for the pods find those of
/// the node.
const MAPS: &[&str] = &[
    "ASKED",
    "AYA_LOGS",
    "CIDRS",
    "COUNTERS",
    "DECIDED",
    "ENDS",
    "EVENTS",
    "FLOWS",
    "FORWARDED",
    "INTERFACES",
    "LISTENERS",
    "LOOKING",
    "ORIGINAL_DST",
    "PODS",
    "PORTS",
    "QUESTIONS",
    "RECEIVERS",
    "ROUTES",
    "SENDERS",
    "SERVED",
    "SPLICED",
    "SPLICE_STOP",
    "SPLICE_WANTED",
];

/// The maps of them that may still be needed when their agent has ended.
const KEPT_MAPS: &[&str] = &["RECEIVERS", "SPLICED", "SPLICE_STOP"];

/// The maps that have a place for every spliced connection.
const SPLICE_TABLES: &[&str] = &["ENDS", "RECEIVERS", "SPLICED"];

/// The programs that hang on the cgroup root.
const CGROUP_PROGRAMS: &[&str] = &[
    "shunt_connect4",
    "shunt_connect6",
    "shunt_sendmsg4",
    "shunt_sendmsg6",
    "shunt_recvmsg4",
    "shunt_recvmsg6",
    "shunt_peername4",
    "shunt_peername6",
    "shunt_getsockopt",
    "shunt_sock_ops",
];

/// The program that visits listeners.
const LISTENER_PROGRAM: &str = "shunt_listeners";

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

/// Another size for a map than the one it is declared with. Small ones show
/// what happens when a map is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapLimit {
    map: &'static str,
    entries: u32,
}

impl FromStr for MapLimit {
    type Err = anyhow::Error;

    /// Reads `NAME=ENTRIES`.
    fn from_str(text: &str) -> Result<Self> {
        let (name, entries) = text
            .split_once('=')
            .with_context(|| format!("{text:?} is not NAME=ENTRIES"))?;
        let map = MAPS
            .iter()
            .find(|map| **map == name)
            .with_context(|| format!("{name:?} is no map; the maps are {}", MAPS.join(", ")))?;
        let entries = entries
            .parse()
            .with_context(|| format!("{entries:?} is no number of entries"))?;
        Ok(Self { map, entries })
    }
}

/// Whether the kernel says where the fields are that the programs read.
///
/// # Errors
///
/// With the first that is missing.
pub fn offsets_are_known() -> Result<()> {
    offsets::of_kernel(&KernelTypes::read()?).map(drop)
}

/// The loaded programs of the node. Dropping it detaches them.
pub struct Datapath {
    node: Ebpf,
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
    /// Loads the programs and attaches them to the cgroup v2 directory `cgroup`;
    /// the maps are pinned below `bpffs`. Splices as far as it is asked for and
    /// this kernel does it safely.
    ///
    /// # Errors
    ///
    /// When the kernel lacks something, or refuses; then nothing is left.
    pub fn load(cgroup: &Path, bpffs: &Path, limits: &[MapLimit], splice: Splice) -> Result<Self> {
        let types = KernelTypes::read()?;
        let offsets = offsets::of_kernel(&types)?;
        let splice_offsets = splice::of_kernel(&types);
        let btf = Btf::from_sys_fs().context("cannot read the kernel's BTF")?;
        let (splice_mode, splice_status) = splice::settle(splice, &splice_offsets, &btf);
        let splice_offsets = splice_offsets.unwrap_or_default();
        let root = File::open(cgroup)
            .with_context(|| format!("cannot open the cgroup {}", cgroup.display()))?;
        let pins = PinDir::open(bpffs, MAPS, KEPT_MAPS)?;
        splice::drain_left(&pins, splice_offsets);
        let mut loader = loader(&pins, offsets);
        splice::prepare(&mut loader, splice_mode, splice_offsets);
        for limit in limits {
            loader.map_max_entries(limit.map, limit.entries);
        }
        let node = loader
            .load(NODE_OBJECT)
            .context("the kernel does not take the maps of the node's programs")?;
        // The others have nothing to relocate.
        loader.btf(None);
        let splicing = match splice_mode {
            SpliceMode::Off => None,
            SpliceMode::Between | SpliceMode::Proxy | SpliceMode::All => {
                Some(Splicing::load(&mut loader, &btf)?)
            }
        };
        let mut datapath = Self {
            node,
            loader,
            cgroup: cgroup.to_owned(),
            splicing,
            splice_mode,
            splice_status,
            pins,
        };
        for name in CGROUP_PROGRAMS {
            datapath
                .attach(name, &root)
                .with_context(|| format!("cannot attach {name} to {}", cgroup.display()))?;
        }
        let visitor: &mut Iter = typed(datapath.program(LISTENER_PROGRAM)?)?;
        visitor
            .load("tcp", &btf)
            .context("the kernel does not take the iterator over listeners")?;
        Ok(datapath)
    }

    /// Loads one program of the node and hangs it on the cgroup, as a link:
    /// others may hang theirs beside it, and it goes when the agent goes.
    fn attach(&mut self, name: &str, cgroup: &File) -> Result<()> {
        // A link takes no flags: the kernel reads it as "others may attach too".
        let mode = CgroupAttachMode::Single;
        let program = self.program(name)?;
        if let Program::CgroupSockAddr(program) = program {
            program.load()?;
            program.attach(cgroup, mode)?;
        } else if let Program::CgroupSockopt(program) = program {
            program.load()?;
            program.attach(cgroup, mode)?;
        } else if let Program::SockOps(program) = program {
            program.load()?;
            program.attach(cgroup, mode)?;
        } else {
            bail!(
                "{name} is of type {:?}, which hangs on no cgroup",
                program.prog_type()
            );
        }
        Ok(())
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
        if !splicing.stop()? {
            tracing::info!(
                "somebody has not read everything that was spliced; \
                 it stays pinned at {} until the next agent finds it read",
                self.pins.path().display()
            );
            self.pins.leave(KEPT_MAPS)?;
        }
        Ok(())
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
        let program: &mut SkLookup = typed(
            object
                .program_mut("shunt_lookup")
                .context("the embedded object lacks the program shunt_lookup")?,
        )?;
        program
            .load()
            .context("the verifier does not take the inbound program")?;
        let link = program.attach(netns).with_context(|| {
            format!(
                "cannot attach the inbound program to {}",
                netns.path().display()
            )
        })?;
        let id = program.info().context("cannot look at the program")?.id();
        // The link keeps the program, and the program its maps: the object's
        // descriptors, a dozen for each pod, are not needed any longer.
        let link = program.take_link(link).context("cannot keep the program")?;
        Ok(PodProgram {
            id,
            cookie,
            forwarding: Forwarding::default(),
            _link: link,
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
            pod.forwarding.attach(&mut object, netns, &wanted)?;
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

    /// Finds the listeners of a namespace that called listen() before it was
    /// enrolled, or that had no place.
    ///
    /// # Errors
    ///
    /// When the kernel refuses the iterator.
    pub fn scan_listeners(&mut self, netns: &Netns) -> Result<()> {
        let visitor: &mut Iter = typed(self.program(LISTENER_PROGRAM)?)?;
        let link = visitor.attach().context("cannot start the iterator")?;
        let link = visitor
            .take_link(link)
            .context("cannot keep the iterator")?;
        // An iterator sees the namespace of the thread that opens it.
        netns.within(|| {
            let mut visits = link.into_file().context("cannot open the iterator")?;
            let mut nothing = Vec::new();
            visits
                .read_to_end(&mut nothing)
                .context("the iterator failed")?;
            Ok(())
        })?
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
        CGROUP_PROGRAMS
            .iter()
            .map(|name| {
                let program = self
                    .node
                    .program(name)
                    .with_context(|| format!("the program {name} is gone"))?;
                Ok(KernelObject {
                    name: (*name).to_owned(),
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

/// The programs of one pod. Dropping it detaches them.
pub struct PodProgram {
    id: u32,
    cookie: &'static NetnsCookie,
    forwarding: Forwarding,
    _link: SkLookupLink,
}

impl PodProgram {
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

/// A loader that finds or pins every map, and sets what the programs have to
/// know of this kernel; pods' copies also have to be told their namespace.
fn loader(pins: &PinDir, offsets: KernelOffsets) -> EbpfLoader<'static> {
    let mut loader = EbpfLoader::new();
    for name in MAPS {
        loader.map_pin_path(name, pins.pin(name));
    }
    let offsets: &'static KernelOffsets = Box::leak(Box::new(offsets));
    loader.override_global("OFFSETS", offsets, true);
    loader.override_global("NETNS", &0_u64, true);
    let logs: &'static u32 = if logs::decisions_are_logged() { &1 } else { &0 };
    // Where nothing is decided there is no such constant.
    loader.override_global("LOG_DECISIONS", logs, false);
    loader
}

fn typed<'p, T>(program: &'p mut Program) -> Result<&'p mut T>
where
    &'p mut T: TryFrom<&'p mut Program>,
    <&'p mut T as TryFrom<&'p mut Program>>::Error: std::error::Error + Send + Sync + 'static,
{
    program.try_into().context("a program is of another type")
}
