//! What the kernel holds for connections.

use std::fs;

/// Bytes in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Held {
    /// In the slab caches from which sockets, tracked connections and storage of
    /// sockets come.
    pub(crate) slab: u64,
    /// Charged to TCP sockets for what they have queued.
    pub(crate) queued: u64,
}

/// Parts of the names of those caches. What a file system or a process needs
/// has others, and moves whenever anybody does anything.
const CACHES: &[&str] = &[
    "TCP",
    "sock",
    "nf_conntrack",
    "bridge",
    "bpf",
    "eventpoll",
    "filp",
    "kmalloc",
    "skbuff",
];

impl Held {
    /// Of the whole machine, now.
    ///
    /// # Panics
    ///
    /// When the kernel does not tell; this needs root.
    pub(crate) fn now() -> Self {
        let read = |path: &str| {
            fs::read_to_string(path).unwrap_or_else(|error| panic!("cannot read {path}: {error}"))
        };
        Self {
            slab: slab(&read("/proc/slabinfo")),
            queued: queued(&read("/proc/net/sockstat")),
        }
    }
}

/// The objects in use of each cache times their size.
fn slab(slabinfo: &str) -> u64 {
    slabinfo
        .lines()
        .filter(|line| CACHES.iter().any(|part| line.contains(part)))
        .filter_map(|line| {
            let mut fields = line.split_whitespace().skip(1);
            let in_use: u64 = fields.next()?.parse().ok()?;
            let size: u64 = fields.nth(1)?.parse().ok()?;
            Some(in_use * size)
        })
        .sum()
}

/// `mem` of TCP, which is in pages of 4 KiB.
fn queued(sockstat: &str) -> u64 {
    sockstat
        .lines()
        .find_map(|line| line.strip_prefix("TCP:"))
        .and_then(|line| line.split_once(" mem "))
        .and_then(|(_, pages)| pages.trim().parse().ok())
        .map_or(0, |pages: u64| pages * 4096)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_in_use_count_with_their_size() {
        let text = "slabinfo - version: 2.1\n\
            # name <active_objs> <num_objs> <objsize> <objperslab> <pagesperslab>\n\
            TCP 10 13 2432 13 8 : tunables 0 0 0\n\
            nf_conntrack 3 16 256 16 1 : tunables 0 0 0\n\
            dentry 1000 2000 192 21 1 : tunables 0 0 0\n";
        assert_eq!(slab(text), 10 * 2432 + 3 * 256);
    }

    #[test]
    fn queued_bytes_are_counted_in_pages() {
        let text =
            "sockets: used 5\nTCP: inuse 4 orphan 0 tw 0 alloc 6 mem 3\nUDP: inuse 0 mem 9\n";
        assert_eq!(queued(text), 3 * 4096);
    }
}
