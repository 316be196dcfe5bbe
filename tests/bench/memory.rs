//! What the kernel holds for connections.

use std::{fs, thread, time::Duration};

use shunt_tests::deadline::wait_until;

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

/// Not those of connections that are over (TIME-WAIT): they end when others are measured.
const OVER: &str = "tw_sock_";

/// Between two looks: longer than the agent takes to splice what may be.
const PAUSE: Duration = Duration::from_millis(250);

/// How often it is looked at; then it counts as it is.
const LOOKS: usize = 40;

/// By how much two looks may differ where nothing moves any more, in bytes.
const STILL: u64 = 64 * 1024;

impl Held {
    /// Of the whole machine, when nothing moves any more: what programs let go of is free
    /// only when others are through (RCU), and connections are spliced a while after they
    /// were opened.
    ///
    /// # Panics
    ///
    /// As [`now`](Self::now).
    pub(crate) fn settled() -> Self {
        let mut last = Self::now();
        for _ in 0..LOOKS {
            thread::sleep(PAUSE);
            let now = Self::now();
            let moved = now.slab.abs_diff(last.slab) + now.queued.abs_diff(last.queued);
            if moved <= STILL {
                return now;
            }
            last = now;
        }
        last
    }

    /// How much more is charged to sockets than before. What each processor has taken or given
    /// back since it told last, up to a MiB either way, is not in the kernel's sum
    /// (`SK_MEMORY_PCPU_RESERVE`): what two sums differ by within that is nothing.
    pub(crate) fn queued_since(&self, before: &Self) -> i64 {
        if self.queued.abs_diff(before.queued) <= untold() {
            return 0;
        }
        self.queued.cast_signed() - before.queued.cast_signed()
    }

    /// Of the whole machine, now.
    ///
    /// # Panics
    ///
    /// When the kernel does not tell; this needs root.
    pub(crate) fn now() -> Self {
        give_back(&read("/proc/slabinfo"));
        Self {
            slab: slab(&read("/proc/slabinfo")),
            queued: queued(&read("/proc/net/sockstat")),
        }
    }
}

/// What two of the kernel's sums may differ by, in bytes.
fn untold() -> u64 {
    const EITHER_WAY: u64 = 2 << 20;
    let processors = thread::available_parallelism().map_or(1, |count| count.get() as u64);
    processors * EITHER_WAY
}

/// How many TCP sockets there are, in all namespaces.
///
/// # Panics
///
/// When the kernel does not tell.
pub(crate) fn sockets() -> u64 {
    number_after(&read("/proc/net/sockstat"), " alloc ")
}

/// Waits until no more sockets than `open` are.
///
/// # Panics
///
/// When that does not come.
pub(crate) fn wait_for_end(open: u64) {
    wait_until("the end of all connections", || match sockets() {
        still if still <= open => Ok(()),
        still => Err(format!("{still} sockets, {open} before")),
    });
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("cannot read {path}: {error}"))
}

/// Has the kernel free what was let go of. Until then it counts much of that as in use:
/// what waits for readers to be gone (`kfree_rcu`), and what a processor keeps for itself.
fn give_back(slabinfo: &str) {
    let write = |path: &str, text: &str| {
        fs::write(path, text).unwrap_or_else(|error| panic!("cannot write to {path}: {error}"));
    };
    write("/proc/sys/vm/drop_caches", "2");
    for name in counted(slabinfo).filter_map(|line| line.split_whitespace().next()) {
        write(&format!("/sys/kernel/slab/{name}/shrink"), "1");
    }
}

/// The lines of the caches that count.
fn counted(slabinfo: &str) -> impl Iterator<Item = &str> {
    let counts =
        |line: &&str| !line.starts_with(OVER) && CACHES.iter().any(|part| line.contains(part));
    slabinfo.lines().skip(2).filter(counts)
}

/// The objects in use of each cache times their size.
fn slab(slabinfo: &str) -> u64 {
    counted(slabinfo)
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
    number_after(sockstat, " mem ") * 4096
}

/// A number in the line of TCP, behind this word; 0 where there is none.
fn number_after(sockstat: &str, word: &str) -> u64 {
    let line = sockstat.lines().find_map(|line| line.strip_prefix("TCP:"));
    line.and_then(|line| line.split_once(word))
        .and_then(|(_, rest)| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_in_use_count_with_their_size() {
        let text = "slabinfo - version: 2.1\n\
            # name <active_objs> <num_objs> <objsize> <objperslab> <pagesperslab>\n\
            TCP 10 13 2432 13 8 : tunables 0 0 0\n\
            tw_sock_TCP 7 16 264 16 1 : tunables 0 0 0\n\
            nf_conntrack 3 16 256 16 1 : tunables 0 0 0\n\
            dentry 1000 2000 192 21 1 : tunables 0 0 0\n";
        assert_eq!(slab(text), 10 * 2432 + 3 * 256);
    }

    #[test]
    fn what_processors_keep_for_themselves_is_not_queued() {
        let with = |queued| Held { slab: 0, queued };
        let (less, more) = (with(5 << 20), with((5 << 20) + untold()));
        assert_eq!((more.queued_since(&less), less.queued_since(&more)), (0, 0));
        let much = with(more.queued + 4096);
        let expected = i64::try_from(much.queued - less.queued).expect("small");
        assert_eq!(much.queued_since(&less), expected);
    }

    #[test]
    fn queued_bytes_are_counted_in_pages() {
        let text =
            "sockets: used 5\nTCP: inuse 4 orphan 0 tw 0 alloc 6 mem 3\nUDP: inuse 0 mem 9\n";
        assert_eq!(queued(text), 3 * 4096);
        assert_eq!(number_after(text, " alloc "), 6);
        assert_eq!(number_after(text, " none "), 0);
    }
}
