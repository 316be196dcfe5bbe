//! The maps: which there are, how large, and whose memory they are.
//!
//! The kernel charges what is in a map, also what it keeps with each socket, to the memory
//! cgroup of the process that has made the map (`bpf_map_save_memcg`), whoever opens the
//! connections. So another process makes those in which memory is taken for a connection or a
//! socket, and it is in no memory cgroup but the root: then connections cannot use up what the
//! agent's container may take, and the kernel charges nobody for them, as for what connection
//! tracking keeps. That is faster, too: for each element it would go from the account of whoever
//! connects to the agent's, and back. What the agent writes is its own memory: a pod's lists may
//! be long.

use std::{
    fmt,
    os::unix::process::CommandExt as _,
    path::Path,
    process::{self, Command, Output},
    str::FromStr,
};

use anyhow::{Context as _, Result, anyhow};
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

/// Those of them in which memory is taken for a connection, or a socket.
const OF_CONNECTIONS: &[&str] = &[
    "ASKED",
    "ENDS",
    "FLOWS",
    "FORWARDED",
    "LISTENERS",
    "ORIGINAL_DST",
    "QUESTIONS",
    "RECEIVERS",
    "REUSES",
    "SENDERS",
    "SERVED",
    "SPLICED",
];

/// The maps of them that may still be needed when their agent has ended.
pub(super) const KEPT_MAPS: &[&str] = &["RECEIVERS", "SPLICED", "SPLICE_STOP"];

/// The maps that have a place for every spliced connection.
const SPLICE_TABLES: &[&str] = &["ENDS", "RECEIVERS", "SPLICED"];

/// The subcommand that makes maps.
pub const MAKE_MAPS: &str = "make-maps";
/// Its flag of the directory in which they are pinned.
pub const AT: &str = "at";
/// Its flag of another size, for each.
pub const MAP_LIMIT: &str = "map-limit";
/// Its flag of the agent's number.
pub const AGENT: &str = "agent";

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
    pin_some(loader, dir, MAPS);
}

fn pin_some(loader: &mut EbpfLoader<'static>, dir: &Path, names: &[&'static str]) {
    for name in names {
        loader.map_pin_path(name, dir.join(name));
    }
}

/// Makes the maps of connections in a directory of a bpffs in which none is, in the memory of
/// nobody. It leaves this process' memory cgroup for good.
///
/// # Errors
///
/// When it may not, or when the kernel refuses a map.
pub fn make(dir: &Path, limits: &[MapLimit]) -> Result<()> {
    cgroup::leave_memory()?;
    let mut loader = loader(KernelOffsets::default());
    limit(&mut loader, limits);
    pin_some(&mut loader, dir, OF_CONNECTIONS);
    node_object(&mut loader).map(drop)
}

/// Has `program`, which is `shunt`, make the maps of connections in a directory in which none
/// is.
///
/// # Errors
///
/// When it cannot; then none is there, and the loader makes them as it does the others.
pub(super) fn have_made(program: &Path, dir: &Path, limits: &[MapLimit]) -> Result<()> {
    let mut command = Command::new(program);
    command
        .arg0("shunt")
        // What it writes is why it fails.
        .env("SHUNT_LOG", "off")
        .arg(MAKE_MAPS)
        .arg(format!("--{AGENT}={}", process::id()))
        .arg(format!("--{AT}"))
        .arg(dir)
        .args(limits.iter().map(|limit| format!("--{MAP_LIMIT}={limit}")));
    tracing::debug!(?command, "has the maps of connections made");
    let done = command
        .output()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let Some(why) = why_it_failed(&done) else {
        return Ok(());
    };
    for name in OF_CONNECTIONS {
        remove_file(&dir.join(name)).with_context(|| why.clone())?;
    }
    Err(anyhow!(why))
}

/// Why the process failed that makes maps; `None` when it did not.
fn why_it_failed(done: &Output) -> Option<String> {
    if done.status.success() {
        return None;
    }
    let said = String::from_utf8_lossy(&done.stderr);
    let said = said.trim();
    let why = said.strip_prefix("shunt: ").unwrap_or(said);
    Some(match why {
        "" => format!("the process that makes them ended with {}", done.status),
        why => why.to_owned(),
    })
}

/// Says whose memory it is what connections keep in the maps that were made anew.
pub(super) fn say_whose(made: Result<()>) {
    match made {
        Ok(()) => tracing::debug!("what connections keep in maps that are new is nobody's memory"),
        Err(error) => tracing::warn!(
            "what connections keep in maps that are new is memory of this agent's cgroup, and \
             bound by its limit: {error:#}"
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use super::*;

    #[test]
    fn of_the_maps_those_of_connections_are_some() {
        assert!(OF_CONNECTIONS.iter().all(|name| MAPS.contains(name)));
        assert!(!OF_CONNECTIONS.contains(&"CIDRS"));
    }

    #[test]
    fn a_process_that_says_nothing_has_ended_somehow() {
        let ended = |status, stderr: &str| {
            why_it_failed(&Output {
                status: process::ExitStatus::from_raw(status),
                stdout: Vec::new(),
                stderr: stderr.into(),
            })
        };
        assert_eq!(ended(0, ""), None);
        let said = ended(1 << 8, "shunt: no memory\n");
        assert_eq!(said.as_deref(), Some("no memory"));
        let killed = ended(9, "").expect("it failed");
        assert!(killed.contains("signal: 9"), "{killed}");
    }

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
