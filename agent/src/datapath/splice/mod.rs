//! Splicing: the programs that do it, loaded where this kernel does it safely.

mod left;
mod offsets;
mod selftest;
mod senders;

use std::{
    os::fd::AsFd as _,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow};
use aya::{
    Btf, Ebpf, EbpfLoader,
    maps::{Array, Map, MapData, SockHash},
    programs::{Iter, SkMsg},
};
use serde::{Deserialize, Serialize};
use shunt_abi::{EndKey, SpliceMode, SpliceOffsets, Unfinished};

pub use self::selftest::{Trial, Tried, try_out};
use self::senders::{Senders, has_unread};
pub(super) use self::{
    left::{drain_before_removal, drain_left},
    offsets::of_kernel,
};
use super::{KernelObject, iterate, typed};
use crate::settings::Splice;

/// The programs that splice.
static SPLICE_OBJECT: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/shunt-splice"));

/// The program that passes messages on.
const MESSAGE_PROGRAM: &str = "shunt_message";

/// The maps of sockets that something may be spliced into.
const SOCKET_MAPS: &[&str] = &["RECEIVERS", "SPLICED"];

/// How long the agent waits at its end for bytes that were spliced and not read
/// yet.
const PATIENCE: Duration = Duration::from_secs(1);

/// How often it looks at least, however long that takes: at who is in the middle of a call, and
/// at what is unread.
const FEWEST_LOOKS: u32 = 3;

/// How long it pauses between two looks.
const PAUSE: Duration = Duration::from_millis(5);

/// How splicing is set on this node, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpliceStatus {
    /// What was asked for.
    pub asked: Splice,
    /// What is done; never `auto`.
    pub mode: Splice,
    /// Why that.
    pub reason: String,
    /// What was tried on this kernel; empty when nothing was.
    pub trials: Vec<Trial>,
    /// How long that took, in milliseconds.
    #[serde(default)]
    pub took_ms: u64,
}

/// Finds out what this kernel does safely, and settles for the strongest of it
/// that was asked for.
pub(super) fn settle(
    asked: Splice,
    offsets: &Result<SpliceOffsets>,
    btf: &Btf,
) -> (SpliceMode, SpliceStatus) {
    let (mode, reason, trials, took) = if asked == Splice::Off {
        (
            SpliceMode::Off,
            "it was switched off".to_owned(),
            Vec::new(),
            Duration::ZERO,
        )
    } else {
        let tried = Tried::with(offsets, btf);
        let (mode, reason) = tried.settle(asked);
        (mode, reason, tried.trials, tried.took)
    };
    let status = SpliceStatus {
        asked,
        mode: mode.into(),
        reason,
        trials,
        took_ms: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
    };
    (mode, status)
}

/// Tells the programs of the node how far they are to go.
pub(super) fn prepare(loader: &mut EbpfLoader<'_>, mode: SpliceMode, offsets: SpliceOffsets) {
    let offsets: &'static SpliceOffsets = Box::leak(Box::new(offsets));
    let mode: &'static u32 = Box::leak(Box::new(mode as u32));
    loader.override_global("SPLICE_OFFSETS", offsets, false);
    loader.override_global("SPLICE_MODE", mode, false);
}

/// The programs, loaded and attached. Dropping them without [`stop`](Self::stop)
/// loses what was spliced and not read yet.
pub(super) struct Splicing {
    object: Ebpf,
}

impl Splicing {
    /// Loads the programs, with the maps and the offsets that `loader` knows, and
    /// attaches them. Nothing is spliced before a socket is put into the map.
    ///
    /// # Errors
    ///
    /// When the kernel lacks something, or refuses.
    pub(super) fn load(loader: &mut EbpfLoader<'_>, btf: &Btf) -> Result<Self> {
        let object = loader
            .load(SPLICE_OBJECT)
            .context("the kernel does not take the maps of splicing")?;
        Self::attached(object, btf)
    }

    /// Attaches the programs of an object that has its maps.
    ///
    /// # Errors
    ///
    /// When the kernel lacks something, or refuses.
    fn attached(object: Ebpf, btf: &Btf) -> Result<Self> {
        let mut splicing = Self { object };
        splicing.attach(btf)?;
        Ok(splicing)
    }

    fn attach(&mut self, btf: &Btf) -> Result<()> {
        for (name, kind) in [("shunt_files", "task_file"), ("shunt_members", "sockmap")] {
            let iterator: &mut Iter = self.program(name)?;
            iterator
                .load(kind, btf)
                .with_context(|| format!("the verifier does not take the program {name}"))?;
        }
        let members = self.sockets("SPLICED")?;
        let members = members.fd().try_clone().context("cannot open the map")?;
        let message: &mut SkMsg = self.program(MESSAGE_PROGRAM)?;
        message
            .load()
            .context("the verifier does not take the program that splices")?;
        message
            .attach(&members)
            .context("cannot attach the program that splices")?;
        Ok(())
    }

    fn program<'o, T>(&'o mut self, name: &str) -> Result<&'o mut T>
    where
        &'o mut T: TryFrom<&'o mut aya::programs::Program>,
        <&'o mut T as TryFrom<&'o mut aya::programs::Program>>::Error:
            std::error::Error + Send + Sync + 'static,
    {
        typed(
            self.object
                .program_mut(name)
                .ok_or_else(|| anyhow!("the embedded object lacks the program {name}"))?,
        )
    }

    fn sockets(&self, name: &str) -> Result<SockHash<&MapData, EndKey>> {
        let map = self.object.map(name);
        let map = map.with_context(|| format!("the embedded object lacks the map {name}"))?;
        SockHash::try_from(map).with_context(|| format!("{name} is no map of sockets"))
    }

    fn map_mut(&mut self, name: &str) -> Result<&mut Map> {
        self.object
            .map_mut(name)
            .with_context(|| format!("the embedded object lacks the map {name}"))
    }

    /// Puts the sockets that the programs asked for into the map.
    ///
    /// # Errors
    ///
    /// When the kernel refuses the iterator.
    pub(super) fn admit(&mut self) -> Result<()> {
        iterate::all(self.program::<Iter>("shunt_files")?)
    }

    /// From now on everything goes by TCP.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub(super) fn pause(&mut self, pause: bool) -> Result<()> {
        let mut stop: Array<_, u32> = Array::try_from(self.map_mut("SPLICE_STOP")?)?;
        stop.set(0, u32::from(pause), 0)
            .context("cannot write to the map SPLICE_STOP")
    }

    /// The members that have something left to read, or are in the middle of a call.
    ///
    /// # Errors
    ///
    /// When the kernel refuses the iterator.
    pub(super) fn unfinished(&self) -> Result<Vec<Unfinished>> {
        let program: &Iter = self
            .object
            .program("shunt_members")
            .context("the embedded object lacks a program")?
            .try_into()?;
        let mut all = Vec::new();
        for name in SOCKET_MAPS {
            all.extend(iterate::unfinished(
                program,
                self.sockets(name)?.fd().as_fd(),
            )?);
        }
        Ok(all)
    }

    /// Ends splicing: everything goes by TCP, and what was spliced is waited for.
    /// `false` when a socket does not read it, or a sender does not get to giving it.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub(super) fn stop(&mut self) -> Result<bool> {
        if self.has_no_member()? {
            return Ok(true);
        }
        self.pause(true)?;
        let mut senders = Senders::new();
        let until = Instant::now() + PATIENCE;
        let mut looks = 0;
        while looks < FEWEST_LOOKS || Instant::now() < until {
            looks += 1;
            // First: what they have given is unread in a look that begins afterwards.
            let are_through = senders.are_through();
            let members = self.unfinished()?;
            if are_through && !has_unread(&members) {
                return Ok(true);
            }
            senders.look(&members);
            thread::sleep(PAUSE);
        }
        Ok(false)
    }

    fn has_no_member(&self) -> Result<bool> {
        let is_empty = |name: &&str| Ok(self.sockets(name)?.keys().next().is_none());
        let empty: Result<Vec<bool>> = SOCKET_MAPS.iter().map(is_empty).collect();
        Ok(empty?.into_iter().all(|empty| empty))
    }

    /// The program that passes messages on, as `bpftool` shows it.
    ///
    /// # Errors
    ///
    /// When the kernel does not answer.
    pub(super) fn describe(&self) -> Result<KernelObject> {
        let program = self
            .object
            .program(MESSAGE_PROGRAM)
            .with_context(|| format!("the program {MESSAGE_PROGRAM} is gone"))?;
        Ok(KernelObject {
            name: MESSAGE_PROGRAM.to_owned(),
            id: program.info()?.id(),
            attached_to: Some("map SPLICED".to_owned()),
        })
    }
}
