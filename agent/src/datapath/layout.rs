//! Which maps of a former agent the programs of this one go on with.
//!
//! Programs that hang on different hooks meet in the maps, so maps that belong
//! together are taken over together or not at all. A map is taken over when it is
//! made as this agent would make it. One whose meaning changes and whose sizes do not
//! needs another name.

use std::{collections::BTreeSet, fs, path::Path};

use anyhow::{Context as _, Result};
use aya::{
    maps::{MapInfo, MapType},
    programs::loaded_programs,
};

use super::links;

/// Maps that are taken over together.
struct Group {
    maps: &'static [&'static str],
    /// One of them, which the programs that hang on the cgroup use: if they use
    /// another of that name, an agent was killed after it had made new ones and
    /// before its programs were in force.
    anchor: Option<&'static str>,
}

/// Settings: filled anew from what is saved.
const SETTINGS: Group = Group {
    maps: &["PODS", "PORTS", "CIDRS", "ROUTES", "INTERFACES"],
    anchor: Some("PODS"),
};

/// What connections leave at one hook for another.
const CONNECTIONS: Group = Group {
    maps: &[
        "ASKED",
        "FLOWS",
        "FLOW_SLOTS",
        "FORWARDED",
        "LISTENERS",
        "ORIGINAL_DST",
        "QUESTIONS",
        "SERVED",
    ],
    anchor: Some("FLOW_SLOTS"),
};

/// What bind() leaves for listen() and connect().
const BINDING: Group = Group {
    maps: &["REUSES"],
    anchor: Some("REUSES"),
};

/// What was counted.
const COUNTERS: Group = Group {
    maps: &["COUNTERS"],
    anchor: Some("COUNTERS"),
};

/// What the programs ask of the agent.
const EVENTS: Group = Group {
    maps: &["EVENTS"],
    anchor: None,
};

/// What is to be kept of a former agent's maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TakenOver {
    /// The settings of the pods.
    pub(super) settings: bool,
    /// What connections leave at one hook for another.
    pub(super) connections: bool,
}

/// How a map is made.
#[derive(Debug, PartialEq)]
struct Shape {
    kind: Option<MapType>,
    key: u32,
    value: u32,
    entries: u32,
    flags: u32,
}

impl Shape {
    fn of(info: &MapInfo) -> Self {
        Self {
            kind: info.map_type().ok(),
            key: info.key_size(),
            value: info.value_size(),
            entries: info.max_entries(),
            flags: info.map_flags(),
        }
    }
}

/// Puts the maps that this agent has made in `made` in the places below `root` of
/// those that are not taken over, each in one step. The programs that hang on the
/// cgroup go on with theirs.
///
/// # Errors
///
/// When a map cannot be looked at, or not be moved.
pub(super) fn settle(root: &Path, made: &Path, all: &[&str]) -> Result<TakenOver> {
    let in_use = maps_in_use(root)?;
    let keeps = |group: &Group| takes_over(group, root, made, &in_use);
    let groups = [SETTINGS, CONNECTIONS, BINDING, COUNTERS, EVENTS];
    let mut kept: BTreeSet<&str> = BTreeSet::new();
    for group in groups.iter().filter(|group| keeps(group)) {
        kept.extend(group.maps);
    }
    for name in all.iter().filter(|name| !kept.contains(*name)) {
        fs::rename(made.join(name), root.join(name))
            .with_context(|| format!("cannot replace the pinned map {name}"))?;
    }
    Ok(TakenOver {
        settings: kept.contains("PODS"),
        connections: kept.contains("ASKED"),
    })
}

fn takes_over(group: &Group, root: &Path, made: &Path, in_use: &BTreeSet<u32>) -> bool {
    let is_same = |name: &str| {
        let pinned = MapInfo::from_pin(root.join(name));
        let new = MapInfo::from_pin(made.join(name));
        matches!((pinned, new), (Ok(pinned), Ok(new)) if Shape::of(&pinned) == Shape::of(&new))
    };
    let is_used = |name: &str| {
        MapInfo::from_pin(root.join(name)).is_ok_and(|info| in_use.contains(&info.id()))
    };
    group.maps.iter().all(|name| is_same(name)) && group.anchor.is_none_or(is_used)
}

/// The ids of the maps of the programs that are pinned.
fn maps_in_use(root: &Path) -> Result<BTreeSet<u32>> {
    let programs = links::programs(root)?;
    let mut maps = BTreeSet::new();
    for info in loaded_programs().filter_map(Result::ok) {
        if programs.contains(&info.id()) {
            let ids = info
                .map_ids()
                .context("the kernel does not tell a program's maps")?;
            maps.extend(ids.unwrap_or_default());
        }
    }
    Ok(maps)
}
