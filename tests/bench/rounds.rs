//! The measurements that are the same for every way, in interleaved rounds.

use std::{
    fmt, mem,
    time::{Duration, Instant},
};

use shunt_tests::interrupt::Interrupt;

use crate::{
    Interrupted, Part,
    client::Client,
    figures::{
        APART_64, APART_64K, APART_500K, BULK, CONNECT_CALL, CONNECT_P50, CONNECT_P99,
        CONNECT_P999, CYCLES, CYCLES_CPU, MEMORY, MEMORY_QUEUED, MEMORY_SLAB, REQUEST_4K,
        REQUEST_4K_P99, REQUEST_64, REQUEST_64_P99, REQUEST_64K, REQUEST_64K_P99, REQUEST_500K,
        REQUEST_500K_P99, REQUEST_CPU,
    },
    go_on,
    load::{Done, Job, Latency},
    memory::{Held, sockets, wait_for_end},
    report::{Figure, Report},
    role::Placement::{self, Apart, Together},
    times::{Times, micro},
    world::{Kind, Site},
};

/// How long and how often.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    /// How many times the slow things are measured, such as memory.
    pub(crate) rounds: usize,
    /// How many times everything else is.
    pub(crate) turns: usize,
    /// In how many parts of these turns it is said which call of a hundred or a thousand is the
    /// slowest: that of one turn would be its slowest call.
    pub(crate) tails: usize,
    /// How long requests are made, each time.
    pub(crate) requests: Duration,
    /// The same for bytes and connections.
    pub(crate) flood: Duration,
    /// The same for connections at a constant rate, but in so many pieces, which take turns with
    /// those of the other ways: what is to be told apart is smaller than what a machine that is
    /// shared with others differs by from one tenth of a second to the next.
    pub(crate) connects: (u32, Duration),
    /// That rate, in one second.
    pub(crate) rate: u32,
    /// How many connections are held open.
    pub(crate) held: usize,
    /// No turn begins later than this after the first.
    pub(crate) limit: Duration,
}

impl Effort {
    /// For a look.
    pub(crate) const QUICK: Self = Self {
        rounds: 5,
        turns: 30,
        tails: 1,
        requests: Duration::from_millis(30),
        flood: Duration::from_millis(50),
        connects: (4, Duration::from_millis(20)),
        rate: 1000,
        held: 3000,
        limit: Duration::from_secs(60),
    };
    /// For numbers that are kept.
    pub(crate) const FULL: Self = Self {
        rounds: 5,
        turns: 40,
        tails: 5,
        requests: Duration::from_millis(40),
        flood: Duration::from_millis(80),
        connects: (15, Duration::from_millis(20)),
        rate: 1000,
        held: 5000,
        limit: Duration::from_secs(3600),
    };

    /// Connections at a constant rate where there are no pieces.
    pub(crate) fn connects_at_once(&self) -> Duration {
        let (pieces, piece) = self.connects;
        piece * pieces
    }
}

impl fmt::Display for Effort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            rounds,
            turns,
            tails,
            requests,
            flood,
            connects: (pieces, piece),
            rate,
            held,
            limit,
        } = self;
        write!(
            f,
            "{turns} turns (fewer where they take more than {limit:?}), in each of which every \
             way is measured after the other: requests for {requests:?}, bytes and connections \
             for {flood:?}, {rate} connections a second for {piece:?}, {pieces} times before the \
             next step, every way after the other. Of p99 and p99.9 there are {tails}. Memory: \
             {rounds} rounds, with {held} connections held open, through Envoys {}.",
            Kind::Envoy.takes_of(*held)
        )
    }
}

/// How many connections `Cycles` keeps under way.
pub(crate) const AT_ONCE: usize = 4;

/// What a client does in each of its turns.
#[derive(Clone, Copy, Debug)]
enum Work {
    Requests(usize, Placement, Figure),
    Bulk,
    Connects,
    Cycles,
}

impl Work {
    fn placement(self) -> Placement {
        match self {
            Self::Requests(_, placement, _) => placement,
            Self::Bulk | Self::Connects | Self::Cycles => Apart,
        }
    }

    /// In how many pieces a turn is done.
    fn pieces(self, effort: &Effort) -> usize {
        match self {
            Self::Requests(..) | Self::Bulk | Self::Cycles => 1,
            Self::Connects => effort.connects.0 as usize,
        }
    }
}

/// In this order.
const WORKS: &[(Part, Work)] = &[
    (Part::Requests, Work::Requests(64, Together, REQUEST_64)),
    (Part::Requests, Work::Requests(4096, Together, REQUEST_4K)),
    (
        Part::Requests,
        Work::Requests(65_536, Together, REQUEST_64K),
    ),
    (
        Part::Requests,
        Work::Requests(500_000, Together, REQUEST_500K),
    ),
    (Part::Requests, Work::Requests(64, Apart, APART_64)),
    (Part::Requests, Work::Requests(65_536, Apart, APART_64K)),
    (Part::Requests, Work::Requests(500_000, Apart, APART_500K)),
    (Part::Bulk, Work::Bulk),
    (Part::Connect, Work::Connects),
    (Part::Connections, Work::Cycles),
];

/// Measures all `sites`, one after the other in each step, each turn beginning
/// with another one. Memory first, before anything that ends slowly was begun.
pub(crate) fn measure(
    sites: &[Site],
    effort: &Effort,
    wanted: impl Fn(Part) -> bool,
    interrupt: &Interrupt,
    report: &mut Report,
) -> Result<(), Interrupted> {
    if wanted(Part::Memory) {
        let mut sites: Vec<&Site> = sites.iter().collect();
        for _ in 0..effort.rounds {
            for site in &sites {
                go_on(interrupt)?;
                let [slab, queued] = memory(site, site.kind().takes_of(effort.held));
                for (figure, held) in [
                    (MEMORY, slab + queued),
                    (MEMORY_SLAB, slab),
                    (MEMORY_QUEUED, queued),
                ] {
                    report.add(site.kind().name(), figure, site.name(), held);
                }
            }
            sites.rotate_left(1);
        }
    }
    let works = WORKS.iter().filter(|(part, _)| wanted(*part));
    let mut steps: Vec<Vec<Series<'_>>> = works
        .map(|(_, work)| {
            let start = |site| Series::start(site, *work, effort);
            sites.iter().map(start).collect()
        })
        .collect();
    let start = Instant::now();
    let part = effort.turns / effort.tails;
    let mut done = 0;
    while done < effort.turns && start.elapsed() <= effort.limit {
        for series in &mut steps {
            turn(done, series, effort, interrupt, report)?;
            series.rotate_left(1);
        }
        done += 1;
        // Fewer turns than a part has, at the limit, are one only if there is no other.
        if done.is_multiple_of(part) {
            end_part(&mut steps, report);
        }
    }
    if done < part {
        end_part(&mut steps, report);
    }
    Ok(())
}

/// In this order, and in every other round the other way round: so none always comes after the
/// same other one.
pub(crate) fn to_and_fro<T>(round: usize, items: impl Iterator<Item = T>) -> Vec<T> {
    let mut order: Vec<T> = items.collect();
    if round % 2 == 1 {
        order.reverse();
    }
    order
}

/// A turn of connections at a constant rate: as many pieces of each of `items` as there are to
/// be, in rounds that go to and fro.
pub(crate) fn take_turns<T>(
    turn: usize,
    effort: &Effort,
    items: &mut [T],
    interrupt: &Interrupt,
    piece: impl FnMut(&mut T),
) -> Result<(), Interrupted> {
    in_pieces(turn, effort.connects.0 as usize, items, interrupt, piece)
}

/// The same of anything.
fn in_pieces<T>(
    turn: usize,
    pieces: usize,
    items: &mut [T],
    interrupt: &Interrupt,
    mut piece: impl FnMut(&mut T),
) -> Result<(), Interrupted> {
    for number in (turn..).take(pieces) {
        for item in to_and_fro(number, items.iter_mut()) {
            go_on(interrupt)?;
            piece(item);
        }
    }
    Ok(())
}

/// Says what can only be said of many turns.
fn end_part(steps: &mut [Vec<Series<'_>>], report: &mut Report) {
    for series in steps.iter_mut().flatten() {
        series.end_part(report);
    }
}

/// One turn of each of the ways, in their pieces.
fn turn(
    number: usize,
    series: &mut [Series<'_>],
    effort: &Effort,
    interrupt: &Interrupt,
    report: &mut Report,
) -> Result<(), Interrupted> {
    let pieces = series.iter().map(|one| one.work.pieces(effort)).max();
    let pieces = pieces.unwrap_or(0);
    in_pieces(number, pieces, series, interrupt, |one| {
        one.piece(effort, report)
    })?;
    for one in series {
        one.end_turn(report);
    }
    Ok(())
}

/// CPU time of one of `count` calls, in microseconds.
#[expect(clippy::cast_precision_loss, reason = "no count here has 53 bits")]
pub(crate) fn each(others: Duration, client: u64, count: u64) -> f64 {
    (others.as_secs_f64() * 1e6 + micro(client)) / count as f64
}

/// In one second.
#[expect(clippy::cast_precision_loss, reason = "no count here has 53 bits")]
fn rate(done: Done) -> f64 {
    done.count as f64 / (micro(done.took) / 1e6)
}

/// The turns of one client of one site.
struct Series<'site> {
    site: &'site Site,
    work: Work,
    client: Client,
    /// Of a part of the turns ([`Effort::tails`]).
    times: Times,
    /// Of this turn's pieces, where there are some: from when each call was planned, and of the
    /// call alone.
    pieces: Option<(Times, Times)>,
}

impl<'site> Series<'site> {
    fn start(site: &'site Site, work: Work, effort: &Effort) -> Self {
        let to = site.target();
        let (threads, rate) = (AT_ONCE, effort.rate);
        let client = site.client(match work {
            Work::Requests(size, ..) => Job::Requests { to, size },
            Work::Bulk => Job::Bulk { to },
            Work::Connects => Job::Connects { to, rate },
            Work::Cycles => Job::Cycles { to, threads },
        });
        Self {
            site,
            work,
            client,
            times: Times::new(),
            pieces: None,
        }
    }

    fn piece(&mut self, effort: &Effort, report: &mut Report) {
        let (setting, name) = (self.site.kind().name(), self.site.name());
        let mut add = |figure, value| report.add(setting, figure, name, value);
        self.site.place(self.work.placement());
        let before = self.site.cpu();
        let others = || self.site.cpu().saturating_sub(before);
        match self.work {
            Work::Requests(_, _, figure) => {
                let took: Latency = self.client.work(effort.requests);
                add(figure, took.times.micro(0.5));
                if figure == REQUEST_64 {
                    add(REQUEST_CPU, each(others(), took.cpu, took.count));
                }
                self.times.add(&took.times);
            }
            Work::Bulk => add(BULK, rate(self.client.work(effort.flood)) * 8.0 / 1e9),
            Work::Cycles => {
                let done: Done = self.client.work(effort.flood);
                add(CYCLES, rate(done));
                add(CYCLES_CPU, each(others(), done.cpu, done.count));
            }
            Work::Connects => {
                let took: Latency = self.client.work(effort.connects.1);
                let none = || (Times::new(), Times::new());
                let (times, calls) = self.pieces.get_or_insert_with(none);
                times.add(&took.times);
                calls.add(&took.calls);
            }
        }
    }

    /// What is said of all pieces of a turn together.
    fn end_turn(&mut self, report: &mut Report) {
        let (setting, name) = (self.site.kind().name(), self.site.name());
        if let Some((times, calls)) = self.pieces.take() {
            report.add(setting, CONNECT_P50, name, times.micro(0.5));
            report.add(setting, CONNECT_CALL, name, calls.micro(0.5));
            self.times.add(&times);
        }
    }

    /// What can only be said of many turns.
    fn end_part(&mut self, report: &mut Report) {
        let tails: &[(Figure, f64)] = match self.work {
            Work::Requests(_, _, REQUEST_64) => &[(REQUEST_64_P99, 0.99)],
            Work::Requests(_, _, REQUEST_4K) => &[(REQUEST_4K_P99, 0.99)],
            Work::Requests(_, _, REQUEST_64K) => &[(REQUEST_64K_P99, 0.99)],
            Work::Requests(_, _, REQUEST_500K) => &[(REQUEST_500K_P99, 0.99)],
            Work::Connects => &[(CONNECT_P99, 0.99), (CONNECT_P999, 0.999)],
            Work::Requests(..) | Work::Bulk | Work::Cycles => &[],
        };
        let times = mem::replace(&mut self.times, Times::new());
        let (setting, name) = (self.site.kind().name(), self.site.name());
        for &(figure, quantile) in tails {
            report.add(setting, figure, name, times.micro(quantile));
        }
    }
}

/// What the kernel holds for one of `count` connections, in slab caches and queued by TCP,
/// in KiB.
#[expect(clippy::cast_precision_loss, reason = "no count here has 53 bits")]
fn memory(site: &Site, count: usize) -> [f64; 2] {
    let (before, sockets_before) = (Held::settled(), sockets());
    let held = site.hold(count);
    let after = Held::settled();
    drop(held);
    wait_for_end(sockets_before);
    // What is still tracked of them would end while another way is measured.
    site.forget_tracked();
    [
        after.slab as f64 - before.slab as f64,
        after.queued_since(&before) as f64,
    ]
    .map(|more| more / 1024.0 / count as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_other_round_goes_the_other_way_round() {
        let orders = [0, 1, 2].map(|round| to_and_fro(round, [1, 2, 3].into_iter()));
        assert_eq!(orders, [[1, 2, 3], [3, 2, 1], [1, 2, 3]]);
    }
}
