//! What the kernel holds of an agent, asked with `bpftool`.

use std::{collections::BTreeMap, path::Path, process::Command};

use serde_json::Value;
use shunt_abi::FlowSlot;

use crate::{agent, command::output_of};

/// How many entries each map of the agent has, by the map's name.
///
/// Socket storage is left out: the kernel cannot list it, and an entry goes
/// with its socket. So are ring buffers, which have no entries, and the tables of
/// splicing ([`spliceable`]): those come and go with open connections.
///
/// # Panics
///
/// When `status` reports no maps, or `bpftool` fails.
pub fn entries_by_map(status: &Value) -> BTreeMap<String, usize> {
    let entries: BTreeMap<_, _> = objects(status, "maps")
        .into_iter()
        .filter(|(name, _)| !OF_CONNECTIONS.contains(&name.as_str()))
        .filter_map(|(name, id)| {
            let held = if name == SLOTS {
                slots_in_use(id).len()
            } else {
                entries(id)?
            };
            Some((name, held))
        })
        .collect();
    assert!(!entries.is_empty(), "status tells of no maps: {status}");
    entries
}

/// How many redirected connections are between their first packet and the proxy, by these
/// entries.
///
/// # Panics
///
/// When they lack the maps for them.
pub fn under_way(entries: &BTreeMap<String, usize>) -> usize {
    entries["FLOWS"] + entries[SLOTS]
}

/// The tables of splicing: each open connection may have entries.
const OF_CONNECTIONS: [&str; 3] = ["ENDS", "RECEIVERS", "SPLICED"];

/// How many entries the tables of splicing have.
///
/// # Panics
///
/// When `status` reports no maps, or `bpftool` fails.
pub fn spliceable(status: &Value) -> usize {
    let maps = objects(status, "maps");
    let of_connections = OF_CONNECTIONS.iter().filter_map(|name| maps.get(*name));
    of_connections.filter_map(|id| entries(*id)).sum()
}

/// The ids of the agent's programs, by name.
///
/// # Panics
///
/// When `status` does not have the shape of one.
pub fn programs(status: &Value) -> BTreeMap<String, u64> {
    objects(status, "programs")
}

/// How many of its programs an agent has attached to the cgroup at `path`, as it says.
///
/// # Panics
///
/// When `status` does not have the shape of one.
pub fn said_to_be_attached(status: &Value, path: &Path) -> usize {
    let path = path.to_str();
    let programs = listed(status, "programs").iter();
    programs
        .filter(|program| program["attached_to"].as_str() == path)
        .count()
}

/// Whether the kernel still holds a program.
///
/// # Panics
///
/// When `bpftool` cannot be started.
pub fn program_exists(id: u64) -> bool {
    agent::run(Command::new("bpftool").args(["prog", "show", "id", &id.to_string()]))
        .status
        .success()
}

/// How many programs are attached to the cgroup at `path`.
///
/// # Panics
///
/// When `bpftool` fails.
pub fn attached_to_cgroup(path: &Path) -> usize {
    let mut command = Command::new("bpftool");
    list(command.args(["-j", "cgroup", "show"]).arg(path)).len()
}

/// `None` where a map cannot be listed.
fn entries(id: u64) -> Option<usize> {
    let map = json(Command::new("bpftool").args(["-j", "map", "show", "id", &id.to_string()]));
    let kind = map["type"].as_str().unwrap_or_default();
    (!matches!(kind, "sk_storage" | "ringbuf")).then(|| dump(id).len())
}

/// The map of slots for connections on their way, which has its elements from the start.
const SLOTS: &str = "FLOW_SLOTS";

/// Those of them that are not free.
fn slots_in_use(id: u64) -> Vec<Value> {
    let is_used = |slot: &Value| {
        let state: [u8; 8] = std::array::from_fn(|at| {
            let byte = slot["value"][at].as_str().unwrap_or_default();
            let byte = u8::from_str_radix(byte.trim_start_matches("0x"), 16);
            byte.unwrap_or_else(|error| panic!("{error}: {slot}"))
        });
        !FlowSlot::is_free(u64::from_ne_bytes(state))
    };
    dump(id).into_iter().filter(is_used).collect()
}

/// A slot as it was when a connection had it.
pub struct UsedSlot {
    map: u64,
    element: Value,
}

impl UsedSlot {
    /// That of the only connection that has one.
    ///
    /// # Panics
    ///
    /// When there is not one, or `bpftool` fails.
    pub fn only(status: &Value) -> Self {
        let map = objects(status, "maps")[SLOTS];
        let mut used = slots_in_use(map);
        assert_eq!(used.len(), 1, "{used:?}");
        let element = used.remove(0);
        Self { map, element }
    }

    /// Makes it as it was again.
    ///
    /// # Panics
    ///
    /// When `bpftool` fails.
    pub fn put_back(&self) {
        let mut command = Command::new("bpftool");
        command.args(["map", "update", "id", &self.map.to_string()]);
        for part in ["key", "value"] {
            command.args([part, "hex"]);
            let bytes = self.element[part].as_array().into_iter().flatten();
            command.args(bytes.filter_map(Value::as_str));
        }
        output_of(&mut command);
    }
}

fn dump(id: u64) -> Vec<Value> {
    list(Command::new("bpftool").args(["-j", "map", "dump", "id", &id.to_string()]))
}

fn listed<'status>(status: &'status Value, what: &str) -> &'status [Value] {
    let list = status[what].as_array();
    list.unwrap_or_else(|| panic!("status has no list of {what}: {status}"))
}

fn objects(status: &Value, what: &str) -> BTreeMap<String, u64> {
    listed(status, what)
        .iter()
        .map(|object| {
            let (name, id) = (object["name"].as_str(), object["id"].as_u64());
            let name = name.unwrap_or_else(|| panic!("no name: {object}"));
            (
                name.to_owned(),
                id.unwrap_or_else(|| panic!("no id: {object}")),
            )
        })
        .collect()
}

fn list(command: &mut Command) -> Vec<Value> {
    let json = json(command);
    // Nothing at all is written for a cgroup without programs.
    if json.is_null() {
        return Vec::new();
    }
    let list = json.as_array();
    list.unwrap_or_else(|| panic!("bpftool wrote no list: {json}"))
        .clone()
}

fn json(command: &mut Command) -> Value {
    let text = output_of(command);
    if text.trim().is_empty() {
        return Value::Null;
    }
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("bpftool wrote no JSON: {e}\n{text}"))
}
