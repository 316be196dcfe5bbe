//! The maps: which there are, how large, and whose memory they are.
//!
//! The kernel charges what is in a map, also what it keeps with each socket, to the memory
//! cgroup of the process that has made the map (`bpf_map_save_memcg`), whoever opens the
//! connections. So another process makes them, which is in no memory cgroup but the root: then
//! connections cannot use up what the agent's container may take, and the kernel charges nobody
//! for them, as for what connection tracking keeps. That is faster, too: for each element it
//! would go from the account of whoever connects to the agent's, and back.

use std::{fmt, path::Path, process::Command, str::FromStr};

use anyhow::{Context as _, Result, bail};
use aya::EbpfLoader;
use shunt_abi::KernelOffsets;

use super::{loader, node_object};
use crate::{bpffs::remove_file, cgroup};

/// Every map of the objects, pinned so that the copies for the pods find those of
/// the node.
pub(super) const MAPS: &[&str] = &[
    "ASKED",
    "AYA_LOGS",
    "CIDRS",
    "COUNTERS",
    "DECIDED",
    "ENDS",
    "EVENTS",
    "FLOWS",
    "FLOW_SLOTS",
    "FORWARDED",
    "INTERFACES",
    "LISTENERS",
    "LOOKING",
    "ORIGINAL_DST",
    "PODS",
    "PORTS",
    "QUESTIONS",
    "RECEIVERS",
    "REUSES",
    "ROUTES",
    "SENDERS",
    "SERVED",
    "SPLICED",
    "SPLICE_STOP",
    "SPLICE_WANTED",
];

/// The maps of them that may still be needed when their agent has ended.
pub(super) const KEPT_MAPS: &[&str] = &["RECEIVERS", "SPLICED", "SPLICE_STOP"];

/// The maps that have a place for every spliced connection.
const SPLICE_TABLES: &[&str] = &["ENDS", "RECEIVERS", "SPLICED"];

/// The subcommand that makes maps, and its flags.
pub const MAKE_MAPS: &str = "make-maps";
/// The flag of the directory in which they are pinned.
pub const AT: &str = "at";
/// The flag of another size, for each.
pub const MAP_LIMIT: &str = "map-limit";

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

impl fmt::Display for MapLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.map, self.entries)
    }
}

/// Where nothing is spliced the tables for it take no memory.
pub(super) fn without_splicing() -> impl Iterator<Item = MapLimit> {
    let least = |map: &&'static str| MapLimit { map, entries: 1 };
    SPLICE_TABLES.iter().map(least)
}

/// Has the loader make the maps in these sizes.
pub(super) fn limit(loader: &mut EbpfLoader<'static>, limits: &[MapLimit]) {
    for limit in limits {
        loader.map_max_entries(limit.map, limit.entries);
    }
}

/// Has the loader find or pin every map in a directory.
pub(super) fn pin(loader: &mut EbpfLoader<'static>, dir: &Path) {
    for name in MAPS {
        loader.map_pin_path(name, dir.join(name));
    }
}

/// Makes the maps in a directory of a bpffs in which none is, in the memory of nobody. It
/// leaves this process' memory cgroup for good.
///
/// # Errors
///
/// When it may not, or when the kernel refuses a map.
pub fn make(dir: &Path, limits: &[MapLimit]) -> Result<()> {
    cgroup::leave_memory()?;
    let mut loader = loader(KernelOffsets::default());
    limit(&mut loader, limits);
    pin(&mut loader, dir);
    node_object(&mut loader).map(drop)
}

/// Has `program`, which is `shunt`, make the maps in a directory in which none is. Where it
/// cannot none is there, and the loader makes them as ever; that is said, and why.
pub(super) fn have_made(program: &Path, dir: &Path, limits: &[MapLimit]) {
    if let Err(error) = have_all_made(program, dir, limits) {
        tracing::warn!(
            "what connections keep in the maps counts as memory of this agent's cgroup, and is \
             bound by its limit: {error:#}"
        );
    }
}

fn have_all_made(program: &Path, dir: &Path, limits: &[MapLimit]) -> Result<()> {
    let mut command = Command::new(program);
    command.arg(MAKE_MAPS).arg(format!("--{AT}")).arg(dir);
    for limit in limits {
        command.arg(format!("--{MAP_LIMIT}")).arg(limit.to_string());
    }
    let done = command
        .output()
        .with_context(|| format!("cannot start {}", program.display()))?;
    if done.status.success() {
        return Ok(());
    }
    for name in MAPS {
        remove_file(&dir.join(name))?;
    }
    let said = String::from_utf8_lossy(&done.stderr);
    let said = said.trim();
    bail!("{}", said.strip_prefix("error: ").unwrap_or(said))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_written_as_it_is_read() {
        let limit: MapLimit = "FLOWS=7".parse().expect("a limit");
        assert_eq!(limit.to_string(), "FLOWS=7");
        let bad = ["FLOWS", "FLOWS=", "FLOWS=-1", "ENTRIES=7"];
        assert!(bad.iter().all(|text| text.parse::<MapLimit>().is_err()));
        let least: Vec<String> = without_splicing().map(|limit| limit.to_string()).collect();
        assert_eq!(least, ["ENDS=1", "RECEIVERS=1", "SPLICED=1"]);
    }
}
