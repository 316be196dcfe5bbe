//! The maps of the pods: the agent is their only writer.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    maps::{
        HashMap, Map, MapData, PerCpuHashMap, PerCpuValues,
        lpm_trie::{Key, LpmTrie},
    },
    util::nr_cpus,
};
use ipnet::IpNet;
use shunt_abi::{
    Addr, CidrKey, Counters, ErrorCode, Fallback, Interface, InterfaceKey, NetnsCookie,
    PodSettings, PortChunk, PortChunkKey, Route, RouteKey, SpliceCounters,
};
use shunt_decide::Rule;

use super::readers::Readers;
use crate::{
    network::{MarkedInterfaces, RouteTable, route_key},
    settings::Compiled,
};

/// The maps of the pods.
pub struct Pods {
    settings: HashMap<MapData, NetnsCookie, PodSettings>,
    ports: HashMap<MapData, PortChunkKey, PortChunk>,
    cidrs: LpmTrie<MapData, CidrKey, u32>,
    routes: LpmTrie<MapData, RouteKey, Route>,
    interfaces: HashMap<MapData, InterfaceKey, Interface>,
    counters: PerCpuHashMap<MapData, NetnsCookie, Counters>,
    readers: Readers,
    /// How many entries each map takes.
    limits: BTreeMap<&'static str, u32>,
}

/// What the programs counted for a pod: names of rules and of errors, with how
/// many connections each decided or met.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct CounterReport {
    /// By rule, those at zero left out.
    pub rules: BTreeMap<String, u64>,
    /// By error, those at zero left out.
    pub errors: BTreeMap<String, u64>,
    /// What the pod's sockets sent that can be spliced.
    #[serde(default)]
    pub splice: SpliceReport,
}

/// What the sockets of a pod sent, since each of them can be spliced.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SpliceReport {
    /// Messages that were given to the other end directly, in whole or in part.
    pub messages: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Messages that went by TCP, by the reason, those at zero left out.
    pub fallbacks: BTreeMap<String, u64>,
}

impl Pods {
    pub(super) fn take(object: &mut Ebpf) -> Result<Self> {
        let mut limits = BTreeMap::new();
        let mut take = |name: &'static str| -> Result<Map> {
            let map = object
                .take_map(name)
                .with_context(|| format!("the map {name} was taken already"))?;
            if let Map::HashMap(data) | Map::PerCpuHashMap(data) | Map::LpmTrie(data) = &map {
                limits.insert(name, data.info()?.max_entries());
            }
            Ok(map)
        };
        Ok(Self {
            settings: HashMap::try_from(take("PODS")?)?,
            ports: HashMap::try_from(take("PORTS")?)?,
            cidrs: LpmTrie::try_from(take("CIDRS")?)?,
            routes: LpmTrie::try_from(take("ROUTES")?)?,
            interfaces: HashMap::try_from(take("INTERFACES")?)?,
            counters: PerCpuHashMap::try_from(take("COUNTERS")?)?,
            readers: Readers::new()?,
            limits,
        })
    }

    /// Why a map takes no more, and what to do.
    fn full(&self, map: &'static str, what: &str, remedy: &str) -> String {
        let limit = self.limit(map);
        format!(
            "no room for {what}: the map {map} takes {limit} entries for all pods of the node; \
             {remedy}, or unenroll pods that are gone"
        )
    }

    /// Puts settings in force. Their lists have to be there.
    ///
    /// # Errors
    ///
    /// When the map is full.
    pub fn put_in_force(&mut self, pod: NetnsCookie, settings: &PodSettings) -> Result<()> {
        self.readers.wait_for_readers();
        if self.settings.get(&pod, 0).is_ok() {
            self.readers.note_freed();
        }
        self.settings
            .insert(pod, settings, 0)
            .with_context(|| self.full("PODS", "another pod", "put it on another node"))
    }

    /// Ends the redirection of a pod.
    pub fn take_out_of_force(&mut self, pod: NetnsCookie) {
        // It fails only when there is none.
        let _ = self.settings.remove(&pod);
        self.readers.note_freed();
    }

    /// Writes the lists of a version of settings.
    ///
    /// # Errors
    ///
    /// When a map is full; what was written then has to be removed.
    pub fn write_lists(&mut self, compiled: &Compiled) -> Result<()> {
        for (key, chunk) in &compiled.ports {
            self.ports.insert(key, chunk, 0).with_context(|| {
                self.full(
                    "PORTS",
                    "the port lists of this pod",
                    "write ports as fewer, denser lists",
                )
            })?;
        }
        for (bits, key) in &compiled.cidrs {
            self.cidrs
                .insert(&Key::new(*bits, *key), 1, 0)
                .with_context(|| {
                    self.full(
                        "CIDRS",
                        "the address ranges of this pod",
                        "merge neighbouring ranges of -i and -x",
                    )
                })?;
        }
        Ok(())
    }

    /// Removes the lists of a version that is no longer in force.
    pub fn remove_lists(&mut self, compiled: &Compiled) {
        for (key, _) in &compiled.ports {
            let _ = self.ports.remove(key);
        }
        for (bits, key) in &compiled.cidrs {
            let _ = self.cidrs.remove(&Key::new(*bits, *key));
        }
    }

    /// Replaces the routes of a pod; `old` is what was written before.
    ///
    /// # Errors
    ///
    /// When the map is full. Then the old are there as before.
    pub fn write_routes(
        &mut self,
        pod: NetnsCookie,
        old: &RouteTable,
        new: &RouteTable,
    ) -> Result<()> {
        replace(&mut Routes { map: self, pod }, old, new)
    }

    /// Removes the routes of a pod.
    pub fn remove_routes(&mut self, pod: NetnsCookie, routes: &RouteTable) {
        remove_missing(&mut Routes { map: self, pod }, routes, &RouteTable::new());
    }

    /// Replaces the interfaces of a version of settings; `old` is what was written
    /// before.
    ///
    /// # Errors
    ///
    /// When the map is full. Then the old are there as before.
    pub fn write_interfaces(
        &mut self,
        list_set: u32,
        old: &MarkedInterfaces,
        new: &MarkedInterfaces,
    ) -> Result<()> {
        replace(
            &mut Interfaces {
                map: self,
                list_set,
            },
            old,
            new,
        )
    }

    /// Removes the interfaces of a version that is no longer in force.
    pub fn remove_interfaces(&mut self, list_set: u32, interfaces: &MarkedInterfaces) {
        let mut table = Interfaces {
            map: self,
            list_set,
        };
        remove_missing(&mut table, interfaces, &MarkedInterfaces::new());
    }

    /// The newest version of settings of which anything is in the maps; 0 when there
    /// is none.
    pub fn newest_version(&self) -> u32 {
        let settings = self.settings.iter().filter_map(Result::ok);
        let ports = self.ports.keys().filter_map(Result::ok);
        let cidrs = self.cidrs.keys().filter_map(Result::ok);
        let interfaces = self.interfaces.keys().filter_map(Result::ok);
        let versions = settings
            .map(|(_, settings)| settings.list_set)
            .chain(ports.map(|key| key.list_set))
            .chain(cidrs.map(|key| key.data().list_set))
            .chain(interfaces.map(|key| key.list_set));
        versions.max().unwrap_or(0)
    }

    /// Removes what belongs to pods that are neither enrolled, with these routes, nor
    /// `kept` as they are.
    pub fn retain(
        &mut self,
        enrolled: &BTreeMap<NetnsCookie, &RouteTable>,
        kept: &BTreeSet<NetnsCookie>,
    ) {
        let is_known = |pod: &NetnsCookie| enrolled.contains_key(pod) || kept.contains(pod);
        let unknown = |keys: &mut dyn Iterator<Item = NetnsCookie>| -> Vec<NetnsCookie> {
            keys.filter(|pod| !is_known(pod)).collect()
        };
        for pod in unknown(&mut self.settings.keys().filter_map(Result::ok)) {
            self.take_out_of_force(pod);
        }
        for pod in unknown(&mut self.counters.keys().filter_map(Result::ok)) {
            self.remove_counters(pod);
        }
        let wanted: HashSet<(u32, RouteKey)> = enrolled
            .iter()
            .flat_map(|(pod, routes)| routes.keys().map(|prefix| route_key(*pod, prefix)))
            .collect();
        let kept: HashSet<[u32; 2]> = kept
            .iter()
            .map(|pod| RouteKey::new(*pod, Addr::default()).cookie)
            .collect();
        let routes = self.routes.keys().filter_map(Result::ok);
        let stale: Vec<_> = routes
            .filter(|key| {
                let route = key.data();
                !wanted.contains(&(key.prefix_len(), route)) && !kept.contains(&route.cookie)
            })
            .collect();
        for key in stale {
            let _ = self.routes.remove(&key);
        }
    }

    /// Removes the lists and interfaces of versions before this one that are not in
    /// force.
    pub fn remove_versions_before(&mut self, first: u32) {
        let settings = self.settings.iter().filter_map(Result::ok);
        let in_force: HashSet<u32> = settings.map(|(_, settings)| settings.list_set).collect();
        let is_stale = |version: u32| version < first && !in_force.contains(&version);
        let ports = self.ports.keys().filter_map(Result::ok);
        for key in ports
            .filter(|key| is_stale(key.list_set))
            .collect::<Vec<_>>()
        {
            let _ = self.ports.remove(&key);
        }
        let cidrs = self.cidrs.keys().filter_map(Result::ok);
        let stale: Vec<_> = cidrs.filter(|key| is_stale(key.data().list_set)).collect();
        for key in stale {
            let _ = self.cidrs.remove(&key);
        }
        let interfaces = self.interfaces.keys().filter_map(Result::ok);
        let stale: Vec<_> = interfaces.filter(|key| is_stale(key.list_set)).collect();
        for key in stale {
            let _ = self.interfaces.remove(&key);
        }
        self.readers.note_freed();
    }

    /// Makes room for the counters of a pod, unless it has them.
    ///
    /// # Errors
    ///
    /// When the map is full.
    pub fn start_counters(&mut self, pod: NetnsCookie) -> Result<()> {
        if self.counters.get(&pod, 0).is_ok() {
            return Ok(());
        }
        let processors = nr_cpus().map_err(|(path, error)| {
            anyhow::anyhow!("cannot count the processors by {path}: {error}")
        })?;
        let zero = PerCpuValues::try_from(vec![Counters::ZERO; processors])
            .context("cannot make counters")?;
        self.counters.insert(pod, zero, 0).with_context(|| {
            self.full(
                "COUNTERS",
                "the counters of another pod",
                "put it on another node",
            )
        })
    }

    /// Removes the counters of a pod.
    pub fn remove_counters(&mut self, pod: NetnsCookie) {
        let _ = self.counters.remove(&pod);
    }

    /// What was counted for a pod.
    pub fn counters(&self, pod: NetnsCookie) -> CounterReport {
        report(&self.counted(pod))
    }

    /// The same by codes; zero where nothing is counted.
    pub fn counted(&self, pod: NetnsCookie) -> Counters {
        self.counters
            .get(&pod, 0)
            .map_or(Counters::ZERO, |slots| sum(slots.iter()))
    }

    /// How many entries a map takes.
    pub fn limit(&self, map: &str) -> u32 {
        self.limits.get(map).copied().unwrap_or_default()
    }
}

/// The part of a map that belongs to one pod.
trait Table<K, V> {
    fn insert(&mut self, key: &K, value: &V) -> Result<()>;
    fn remove(&mut self, key: &K);
}

struct Routes<'a> {
    map: &'a mut Pods,
    pod: NetnsCookie,
}

impl Table<IpNet, Route> for Routes<'_> {
    fn insert(&mut self, prefix: &IpNet, route: &Route) -> Result<()> {
        let (bits, key) = route_key(self.pod, prefix);
        self.map
            .routes
            .insert(&Key::new(bits, key), route, 0)
            .with_context(|| {
                self.map.full(
                    "ROUTES",
                    "the routes of this pod",
                    "give its namespace fewer routes",
                )
            })
    }

    fn remove(&mut self, prefix: &IpNet) {
        let (bits, key) = route_key(self.pod, prefix);
        let _ = self.map.routes.remove(&Key::new(bits, key));
    }
}

struct Interfaces<'a> {
    map: &'a mut Pods,
    list_set: u32,
}

impl Table<u32, Interface> for Interfaces<'_> {
    fn insert(&mut self, index: &u32, interface: &Interface) -> Result<()> {
        let key = InterfaceKey::new(self.list_set, *index);
        self.map.readers.wait_for_readers();
        self.map
            .interfaces
            .insert(key, interface, 0)
            .with_context(|| {
                self.map.full(
                    "INTERFACES",
                    "the interfaces of this pod",
                    "name fewer of them in -c and -k",
                )
            })?;
        self.map.readers.note_freed();
        Ok(())
    }

    fn remove(&mut self, index: &u32) {
        let key = InterfaceKey::new(self.list_set, *index);
        let _ = self.map.interfaces.remove(&key);
        self.map.readers.note_freed();
    }
}

/// Writes what `new` has that `old` has not, or has otherwise, and removes the
/// rest of `old`. When there is no room, it is all as before.
fn replace<K: Ord, V: PartialEq>(
    table: &mut impl Table<K, V>,
    old: &BTreeMap<K, V>,
    new: &BTreeMap<K, V>,
) -> Result<()> {
    let written = write_changed(table, old, new);
    match written {
        Ok(()) => remove_missing(table, old, new),
        Err(_) => {
            // First the removal: it makes the room that the old needs.
            remove_missing(table, new, old);
            let _ = write_changed(table, new, old);
        }
    }
    written
}

fn write_changed<K: Ord, V: PartialEq>(
    table: &mut impl Table<K, V>,
    old: &BTreeMap<K, V>,
    new: &BTreeMap<K, V>,
) -> Result<()> {
    changed(old, new).try_for_each(|(key, value)| table.insert(key, value))
}

fn remove_missing<K: Ord, V>(
    table: &mut impl Table<K, V>,
    old: &BTreeMap<K, V>,
    new: &BTreeMap<K, V>,
) {
    missing(old, new).for_each(|key| table.remove(key));
}

/// The entries of `new` that `old` has not, or has otherwise.
fn changed<'a, K: Ord, V: PartialEq>(
    old: &'a BTreeMap<K, V>,
    new: &'a BTreeMap<K, V>,
) -> impl Iterator<Item = (&'a K, &'a V)> {
    new.iter()
        .filter(|(key, value)| old.get(key) != Some(value))
}

/// The keys of `old` that `new` has not.
fn missing<'a, K: Ord, V>(
    old: &'a BTreeMap<K, V>,
    new: &'a BTreeMap<K, V>,
) -> impl Iterator<Item = &'a K> {
    old.keys().filter(|key| !new.contains_key(key))
}

/// Adds up the processors' counters.
fn sum<'a>(slots: impl Iterator<Item = &'a Counters>) -> Counters {
    slots.fold(Counters::ZERO, |total, slot| total.plus(slot))
}

fn report(total: &Counters) -> CounterReport {
    let mut report = CounterReport::default();
    for rule in Rule::ALL {
        let count = total.by_rule[*rule as usize];
        if count > 0 {
            // Rules that share a number in the contract share a counter.
            *report.rules.entry(rule.number().to_owned()).or_default() += count;
        }
    }
    for error in ErrorCode::ALL {
        let count = total.by_error[error as usize];
        if count > 0 {
            report.errors.insert(error.name().to_owned(), count);
        }
    }
    report.splice = splice_report(&total.splice);
    report
}

fn splice_report(total: &SpliceCounters) -> SpliceReport {
    let count = |why: &Fallback| (why.name().to_owned(), total.fallbacks[*why as usize]);
    SpliceReport {
        messages: total.messages,
        bytes: total.bytes,
        fallbacks: Fallback::ALL
            .iter()
            .map(count)
            .filter(|(_, count)| *count > 0)
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_difference_is_written() {
        let old = BTreeMap::from([(1, 'a'), (2, 'b'), (3, 'c')]);
        let new = BTreeMap::from([(2, 'b'), (3, 'd'), (4, 'e')]);
        assert_eq!(
            changed(&old, &new).collect::<Vec<_>>(),
            [(&3, &'d'), (&4, &'e')]
        );
        assert_eq!(missing(&old, &new).collect::<Vec<_>>(), [&1]);
    }

    #[test]
    fn counters_of_all_processors_are_added_up_under_their_names() {
        let mut one = Counters::ZERO;
        one.by_rule[Rule::OutIncludedCidr as usize] = 2;
        one.by_error[ErrorCode::ProxyAway as usize] = 1;
        let mut two = Counters::ZERO;
        two.by_rule[Rule::OutIncludedCidr as usize] = 3;
        let report = report(&sum([one, two].iter()));
        assert_eq!(
            report.rules,
            BTreeMap::from([("outbound 11".to_owned(), 5)])
        );
        assert_eq!(
            report.errors,
            BTreeMap::from([("proxy_away".to_owned(), 1)])
        );
    }
}
