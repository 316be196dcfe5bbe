//! What an agent left behind that ended while somebody had not read everything, or was about to
//! be given something: its maps of spliced sockets keep that. They stay until it is read.

use std::{
    fs,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use aya::{
    Btf, Ebpf, EbpfLoader,
    maps::{Array, Map, MapData, SockHash},
    programs::Iter,
};
use shunt_abi::{EndKey, SpliceMode, SpliceOffsets};

use super::{
    PATIENCE, SOCKET_MAPS, SPLICE_OBJECT, iterate, of_kernel,
    senders::{Senders, has_unread},
};
use crate::{
    bpffs::PinDir,
    datapath::{kernel_types::KernelTypes, typed},
};

/// How long the thread pauses between its first two looks.
const PAUSE: Duration = Duration::from_millis(200);

/// How long it pauses when it has looked often: somebody may never read.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Takes care of the maps that were left: everything that still goes through them
/// is sent by TCP, and they are removed as soon as nothing in them is unread.
pub(in crate::datapath) fn drain_left(pins: &PinDir, offsets: SpliceOffsets) {
    for stop in pins.left("SPLICE_STOP") {
        if let Err(error) = stop_senders(&stop).and_then(|()| remove(&stop)) {
            tracing::warn!("cannot end the splicing of a former agent: {error:#}");
        }
    }
    let mut maps: Vec<PathBuf> = SOCKET_MAPS.iter().flat_map(|map| pins.left(map)).collect();
    maps.retain(|pin| !is_empty(pin) || remove(pin).is_err());
    if maps.is_empty() {
        return;
    }
    // On a thread, because somebody who never reads would keep the agent.
    let started = thread::Builder::new()
        .name("left".to_owned())
        .spawn(move || {
            if let Err(error) = drain(maps, offsets, None) {
                tracing::warn!("cannot look after the sockets of a former agent: {error:#}");
            }
        });
    if let Err(error) = started {
        tracing::warn!("cannot start a thread: {error}");
    }
}

/// Has what still goes through maps that were left sent by TCP, and waits until all is given and
/// read, for a second at most: the maps are about to be removed.
///
/// # Errors
///
/// When the kernel refuses.
pub(in crate::datapath) fn drain_before_removal(pins: &PinDir) -> Result<()> {
    for stop in pins.left("SPLICE_STOP") {
        stop_senders(&stop)?;
    }
    let mut maps: Vec<PathBuf> = SOCKET_MAPS.iter().flat_map(|map| pins.left(map)).collect();
    maps.retain(|pin| !is_empty(pin));
    if maps.is_empty() {
        return Ok(());
    }
    let offsets = of_kernel(&KernelTypes::read()?)?;
    drain(maps, offsets, Some(PATIENCE))
}

fn stop_senders(pin: &Path) -> Result<()> {
    let map = MapData::from_pin(pin).context("cannot open its map")?;
    let mut stop: Array<_, u32> = Array::try_from(Map::Array(map))?;
    stop.set(0, 1, 0).context("cannot write to its map")
}

/// Whether the map has no member.
fn is_empty(pin: &Path) -> bool {
    MapData::from_pin(pin)
        .and_then(|map| SockHash::<_, EndKey>::try_from(Map::SockHash(map)))
        .is_ok_and(|members| members.keys().next().is_none())
}

fn remove(pin: &Path) -> Result<()> {
    fs::remove_file(pin).with_context(|| format!("cannot remove the pin {}", pin.display()))
}

fn drain(mut maps: Vec<PathBuf>, offsets: SpliceOffsets, patience: Option<Duration>) -> Result<()> {
    let mut object = private(offsets)?;
    let iterator: &mut Iter = typed(
        object
            .program_mut("shunt_members")
            .context("the embedded object lacks a program")?,
    )?;
    iterator.load("sockmap", &Btf::from_sys_fs()?)?;
    let until = patience.map(|patience| Instant::now() + patience);
    let mut pause = PAUSE;
    let mut senders = Senders::new();
    while until.is_none_or(|until| Instant::now() < until) {
        // First: what they have given is unread in a look that begins afterwards.
        let are_through = senders.are_through();
        let mut members = Vec::new();
        let mut kept = Vec::new();
        for pin in maps {
            let Ok(map) = MapData::from_pin(&pin) else {
                continue;
            };
            let of_map = iterate::unfinished(iterator, map.fd().as_fd())?;
            if are_through && !has_unread(&of_map) {
                remove(&pin)?;
            } else {
                kept.push(pin);
            }
            members.extend(of_map);
        }
        if kept.is_empty() {
            break;
        }
        maps = kept;
        senders.look(&members);
        thread::sleep(pause);
        pause = LONGEST_PAUSE.min(pause * 2);
    }
    Ok(())
}

/// The programs with maps of their own, for which every socket is one of those that
/// both send and are given something.
pub(super) fn private(offsets: SpliceOffsets) -> Result<Ebpf> {
    let mut loader = EbpfLoader::new();
    let offsets: &'static SpliceOffsets = Box::leak(Box::new(offsets));
    const MODE: u32 = SpliceMode::All as u32;
    loader.override_global("SPLICE_OFFSETS", offsets, true);
    loader.override_global("SPLICE_MODE", &MODE, true);
    loader
        .load(SPLICE_OBJECT)
        .context("the kernel does not take the maps of splicing")
}
