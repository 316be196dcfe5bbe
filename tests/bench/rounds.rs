//! The measurements that are the same for every way, in interleaved rounds.

use std::{
    fmt,
    time::{Duration, Instant},
};

use shunt_tests::interrupt::Interrupt;

use crate::{
    Interrupted, Part,
    figures::{
        BULK, CONNECT_CALL, CONNECT_P50, CONNECT_P99, CONNECT_P999, CYCLES, CYCLES_CPU, MEMORY,
        REQUEST_4K, REQUEST_64, REQUEST_64_P99, REQUEST_64K, REQUEST_500K, REQUEST_CPU,
    },
    go_on,
    load::{Done, Job, Latency},
    memory::Held,
    report::{Figure, Report},
    world::Site,
};

/// How long and how often.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    /// How many times everything is measured.
    pub(crate) rounds: usize,
    /// How long requests are made, each time.
    pub(crate) requests: Duration,
    /// The same for bytes and connections.
    pub(crate) flood: Duration,
    /// The same for connections at a constant rate.
    pub(crate) connects: Duration,
    /// That rate, in one second.
    pub(crate) rate: u32,
    /// How many connections are held open.
    pub(crate) held: usize,
    /// No round begins that would probably end later than this.
    pub(crate) limit: Duration,
}

impl Effort {
    /// For a look.
    pub(crate) const QUICK: Self = Self {
        rounds: 5,
        requests: Duration::from_millis(250),
        flood: Duration::from_millis(400),
        connects: Duration::from_millis(400),
        rate: 1000,
        held: 3000,
        limit: Duration::from_secs(150),
    };
    /// For numbers that are kept.
    pub(crate) const FULL: Self = Self {
        rounds: 11,
        requests: Duration::from_millis(500),
        flood: Duration::from_secs(1),
        connects: Duration::from_secs(2),
        rate: 1000,
        held: 8000,
        limit: Duration::from_secs(3600),
    };
}

impl fmt::Display for Effort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            rounds,
            requests,
            flood,
            connects,
            rate,
            held,
            limit,
        } = self;
        write!(
            f,
            "{rounds} rounds (fewer where they take more than {limit:?}), in each of which every way is measured after the other: requests for \
             {requests:?}, bytes and connections for {flood:?}, {rate} connections a second for \
             {connects:?}, {held} connections held open."
        )
    }
}

/// How many connections `Cycles` keeps under way.
pub(crate) const AT_ONCE: usize = 4;

/// One measurement of one site.
#[derive(Clone, Copy, Debug)]
enum Step {
    Memory,
    Request(usize, Figure),
    Bulk,
    Cycles,
    Connects,
}

/// In this order: memory first, before anything that ends slowly was begun.
const STEPS: &[(Part, Step)] = &[
    (Part::Memory, Step::Memory),
    (Part::Requests, Step::Request(64, REQUEST_64)),
    (Part::Requests, Step::Request(4096, REQUEST_4K)),
    (Part::Requests, Step::Request(65_536, REQUEST_64K)),
    (Part::Requests, Step::Request(500_000, REQUEST_500K)),
    (Part::Bulk, Step::Bulk),
    (Part::Connect, Step::Connects),
    (Part::Connections, Step::Cycles),
];

/// Measures all `sites`, one after the other in each step, each round beginning
/// with another one.
pub(crate) fn measure(
    sites: &[Site],
    effort: &Effort,
    wanted: impl Fn(Part) -> bool,
    interrupt: &Interrupt,
    report: &mut Report,
) -> Result<(), Interrupted> {
    let has_use = |part| part != Part::Memory || sites.iter().all(Site::shows_its_memory);
    let steps = STEPS
        .iter()
        .filter(|(part, _)| wanted(*part) && has_use(*part));
    // All rounds of the memory come first.
    let (memory, others): (Vec<_>, Vec<_>) = steps.partition(|(part, _)| *part == Part::Memory);
    let start = Instant::now();
    for steps in [memory, others] {
        let first = Instant::now();
        for round in 0..effort.rounds {
            let each = first.elapsed() / u32::try_from(round.max(1)).unwrap_or(u32::MAX);
            if round > 0 && start.elapsed() + each > effort.limit {
                break;
            }
            for (_, step) in &steps {
                for turn in 0..sites.len() {
                    go_on(interrupt)?;
                    step.run(&sites[(round + turn) % sites.len()], effort, report);
                }
            }
        }
    }
    Ok(())
}

/// Nanoseconds in microseconds.
#[expect(clippy::cast_precision_loss, reason = "no count here has 53 bits")]
pub(crate) fn micro(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e3
}

/// CPU time of one of `count` calls, in microseconds.
#[expect(clippy::cast_precision_loss, reason = "no count here has 53 bits")]
pub(crate) fn each(others: Duration, client: u64, count: u64) -> f64 {
    (others.as_secs_f64() * 1e6 + micro(client)) / count as f64
}

/// In one second.
#[expect(clippy::cast_precision_loss, reason = "no count here has 53 bits")]
pub(crate) fn rate(done: Done) -> f64 {
    done.count as f64 / (micro(done.took) / 1e6)
}

impl Step {
    fn run(self, site: &Site, effort: &Effort, report: &mut Report) {
        let to = site.target();
        let setting = site.kind().name();
        let mut add = |figure, value| report.add(setting, figure, site.name(), value);
        match self {
            Self::Memory => add(MEMORY, memory(site, effort.held)),
            Self::Request(size, figure) => {
                let time = effort.requests;
                let (took, cpu): (Latency, _) = site.measure(&Job::Requests { to, size, time });
                add(figure, micro(took.p50));
                if figure == REQUEST_64 {
                    add(REQUEST_64_P99, micro(took.p99));
                    add(REQUEST_CPU, each(cpu, took.cpu, took.count));
                }
            }
            Self::Bulk => {
                let time = effort.flood;
                let (done, _): (Done, _) = site.measure(&Job::Bulk { to, time });
                add(BULK, rate(done) * 8.0 / 1e9);
            }
            Self::Cycles => {
                let (time, threads) = (effort.flood, AT_ONCE);
                let (done, cpu): (Done, _) = site.measure(&Job::Cycles { to, threads, time });
                add(CYCLES, rate(done));
                add(CYCLES_CPU, each(cpu, done.cpu, done.count));
            }
            Self::Connects => {
                let (time, rate) = (effort.connects, effort.rate);
                let (took, _): (Latency, _) = site.measure(&Job::Connects { to, rate, time });
                add(CONNECT_P50, micro(took.p50));
                add(CONNECT_P99, micro(took.p99));
                add(CONNECT_P999, micro(took.p999));
                add(CONNECT_CALL, micro(took.call));
            }
        }
    }
}

/// What the kernel holds for one of `count` connections, in KiB.
#[expect(clippy::cast_precision_loss, reason = "no count here has 53 bits")]
fn memory(site: &Site, count: usize) -> f64 {
    site.forget_tracked();
    let before = Held::now();
    let held = site.hold(count);
    let after = Held::now();
    drop(held);
    let bytes = |held: Held| (held.slab + held.queued) as f64;
    (bytes(after) - bytes(before)) / 1024.0 / count as f64
}
