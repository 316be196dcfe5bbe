//! Everything that is measured, by name.

use crate::report::{Figure, figure};

pub(crate) const REQUEST_64: Figure = figure("request 64 B, p50", "µs", 1);
pub(crate) const REQUEST_64_P99: Figure = figure("request 64 B, p99", "µs", 1);
pub(crate) const REQUEST_4K: Figure = figure("request 4 KiB, p50", "µs", 1);
pub(crate) const REQUEST_4K_P99: Figure = figure("request 4 KiB, p99", "µs", 1);
pub(crate) const REQUEST_64K: Figure = figure("request 64 KiB, p50", "µs", 1);
pub(crate) const REQUEST_64K_P99: Figure = figure("request 64 KiB, p99", "µs", 1);
pub(crate) const REQUEST_500K: Figure = figure("request 500 kB, p50", "µs", 1);
pub(crate) const REQUEST_500K_P99: Figure = figure("request 500 kB, p99", "µs", 1);
/// The same where each pod has a processor of its own.
pub(crate) const APART_64: Figure = figure("request 64 B, pods apart, p50", "µs", 1);
pub(crate) const APART_64K: Figure = figure("request 64 KiB, pods apart, p50", "µs", 1);
pub(crate) const APART_500K: Figure = figure("request 500 kB, pods apart, p50", "µs", 1);
/// Of client, proxies and server together.
pub(crate) const REQUEST_CPU: Figure = figure("CPU time per request of 64 B", "µs", 1);
pub(crate) const BULK: Figure = figure("bulk", "Gbit/s", 2);
pub(crate) const CYCLES: Figure = figure("connections", "1/s", 0);
/// Of client, proxies and server together.
pub(crate) const CYCLES_CPU: Figure = figure("CPU time per connection", "µs", 1);
/// From when it was planned to begin.
pub(crate) const CONNECT_P50: Figure = figure("connect, p50", "µs", 1);
pub(crate) const CONNECT_P99: Figure = figure("connect, p99", "µs", 1);
pub(crate) const CONNECT_P999: Figure = figure("connect, p99.9", "µs", 1);
/// From when it did begin.
pub(crate) const CONNECT_CALL: Figure = figure("connect(), p50 of the call", "µs", 2);
/// Of all sockets of a connection through three hops.
pub(crate) const MEMORY: Figure = figure("kernel memory per open connection", "KiB", 2);
pub(crate) const MEMORY_SLAB: Figure = figure("of it in slab caches", "KiB", 2);
/// `mem` of sockstat.
pub(crate) const MEMORY_QUEUED: Figure = figure("of it queued by TCP (sockstat)", "KiB", 2);
pub(crate) const OUTSIDE: Figure = figure("connect() outside the mesh, p50 of the call", "µs", 2);
pub(crate) const ENROL: Figure = figure("enrolling", "ms", 2);
pub(crate) const OPEN_CALL: Figure = figure("connect(), p50 of the call", "µs", 2);
pub(crate) const OPEN_CPU: Figure = figure("CPU time per connection", "µs", 1);
