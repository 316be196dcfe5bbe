use std::collections::{BTreeMap, HashMap, HashSet};

use shunt_abi::{Addr, CidrKey, CidrList, LIST_KEY_BITS, PortChunk, PortChunkKey, PortList};
use shunt_decide::Lists;

use super::Compiled;

/// The lists of a pod, looked up on the host by the very entries that the
/// kernel gets: what `shunt explain` and the tests ask.
#[derive(Clone, Debug)]
pub struct HostLists {
    list_set: u32,
    ports: HashMap<PortChunkKey, PortChunk>,
    /// By prefix length, because there are few of them and many keys.
    cidrs: BTreeMap<u32, HashSet<CidrKey>>,
}

impl From<&Compiled> for HostLists {
    fn from(compiled: &Compiled) -> Self {
        let mut cidrs: BTreeMap<u32, HashSet<CidrKey>> = BTreeMap::new();
        for &(length, key) in &compiled.cidrs {
            cidrs.entry(length).or_default().insert(key);
        }
        Self {
            list_set: compiled.pod.list_set,
            ports: compiled.ports.iter().copied().collect(),
            cidrs,
        }
    }
}

impl Lists for HostLists {
    fn port(&self, list: PortList, port: u16) -> bool {
        self.ports
            .get(&PortChunkKey::of(self.list_set, list, port))
            .is_some_and(|chunk| chunk.contains(port))
    }

    fn cidr(&self, list: CidrList, addr: &Addr) -> bool {
        self.cidrs.iter().any(|(&length, keys)| {
            keys.contains(&CidrKey {
                list_set: self.list_set,
                list: list as u32,
                addr: first_bits(addr, length - LIST_KEY_BITS),
            })
        })
    }
}

/// `addr` with all but its first `length` bits cleared.
fn first_bits(addr: &Addr, length: u32) -> Addr {
    let mut masked = *addr;
    for (word, before) in masked.words.iter_mut().zip((0..).step_by(32)) {
        let kept = length.saturating_sub(before).min(32);
        let mask = u32::MAX.checked_shl(32 - kept).unwrap_or(0);
        *word &= mask.to_be();
    }
    masked
}
