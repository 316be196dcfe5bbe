//! A receiver that stops reading holds a bounded amount, and goes on without a
//! stall and without a loss.

use std::{sync::LazyLock, thread, time::Duration};

use shunt_tests::{deadline::wait_until, syscall::send_queue};
use socket2::SockRef;

use super::pair::{Hop, Lab, Pair, fill, memory, pattern, receive, receive_and_time, send};

/// More than any buffer holds.
const MUCH: usize = 64 << 20;

/// As many bytes, made once: that takes longer than most of what is done with them.
static BYTES: LazyLock<Vec<u8>> = LazyLock::new(|| pattern(MUCH));

/// How often it is looked at what is held while the reader sleeps.
const SAMPLES: usize = 100;

/// Sends until nobody takes any more, again and again, and looks at what is held.
fn overfill(pair: &Pair, bytes: &[u8], piece: usize) -> usize {
    let mut sent = 0;
    for _ in 0..SAMPLES {
        sent += fill(&pair.client, &bytes[sent..], piece);
        assert!(sent < MUCH, "everything was taken, and nobody reads");
        assert_bounded(pair);
    }
    sent
}

/// Sends until TCP has nothing under way and waits for the reader, or has dropped something;
/// how much it has taken.
fn fills_up(lab: &Lab, pair: &Pair, piece: usize) -> usize {
    let mut sent = 0;
    wait_until("TCP to wait for the reader", || {
        sent += fill(&pair.client, &BYTES[sent..], piece);
        assert_bounded(pair);
        let (queued, unsent) = send_queue(&pair.client);
        if (queued == unsent && unsent > 0) || !lab.dropped().is_empty() {
            Ok(())
        } else {
            Err(format!(
                "{queued} bytes are queued, and {unsent} of them were not sent"
            ))
        }
    });
    sent
}

/// What waits for the reader is as much as its buffer may hold by TCP, where the last
/// segments may end above it (`tcp_try_rmem_schedule`): seen up to 1.12 of it, on 6.12.
#[track_caller]
fn assert_bounded(pair: &Pair) {
    let (queued, buffer) = memory(&pair.server);
    assert!(
        queued <= buffer + buffer / 4,
        "{queued} bytes wait in a buffer of {buffer}"
    );
}

/// TCP has dropped nothing for want of room. Between two pods alone: over loopback, with
/// segments of 64 KiB, it does so at times when nothing is spliced, too (6.18.15, in each of
/// three tries of a reader that sends and does not read; 7.2.13, in one of three).
#[track_caller]
fn assert_nothing_dropped(lab: &Lab, piece: usize) {
    if lab.hop() == Hop::Between {
        assert_eq!(lab.dropped(), [], "with messages of {piece}");
    }
}

/// The memory that TCP takes on the whole node, in bytes.
fn memory_of_node() -> usize {
    let text = std::fs::read_to_string("/proc/net/sockstat").expect("it is there");
    let pages = text
        .lines()
        .filter(|line| line.starts_with("TCP:"))
        .find_map(|line| line.split_once(" mem ")?.1.trim().parse::<usize>().ok());
    // Larger pages than those of x86 would be counted short.
    pages.expect("it counts TCP's memory") * 4096
}

/// A message as large as the kernel takes at once, and smaller ones.
const PIECES: [usize; 5] = [MUCH, 600_000, 65_536, 4096, 100];

/// What was seen of a reader that slept.
struct Slept {
    /// How much memory was taken meanwhile, in bytes.
    taken: usize,
    /// The longest that it waited for bytes that had been sent, when it read again.
    longest_wait: Duration,
}

/// Sends pieces of this size to a reader that sleeps, until nobody takes any more, and then
/// has it read.
fn sleeps_and_reads_on(lab: &Lab, piece: usize) -> Slept {
    let bytes = &*BYTES;
    let pair = lab.spliced();
    let before = (memory_of_node(), lab.spliced_bytes());
    let fits = has_room_for(&pair, piece);
    let sent = overfill(&pair, bytes, piece);
    let taken = memory_of_node().saturating_sub(before.0);
    let spliced = lab.spliced_bytes() - before.1;
    assert!(spliced > 0 || !fits, "{}", lab.counters());
    let (read, longest_wait) = receive_and_time(&pair.server, sent);
    assert!(read == bytes[..sent], "{piece}");
    assert!(lab.fallbacks("receiver_full") > 0, "{}", lab.counters());
    // Then it is spliced again.
    lab.splice(&pair);
    Slept {
        taken,
        longest_wait,
    }
}

/// Whether a message of this size can be spliced on a connection that is new: half of the
/// reader's buffer is offered to TCP, which may take two thirds with it.
fn has_room_for(pair: &Pair, piece: usize) -> bool {
    piece <= memory(&pair.server).1 as usize / 4
}

#[test]
fn it_holds_no_more_than_its_buffer_and_reads_on_without_loss() {
    for hop in Hop::BOTH {
        let lab = Lab::on(hop);
        let taken = PIECES.map(|piece| sleeps_and_reads_on(&lab, piece).taken);
        // Others use the node as well: one sample that has none of them in it will do.
        let least = taken.into_iter().min().expect("there are some");
        assert!(least < MUCH / 4, "{least} bytes for a reader that sleeps");
    }
}

#[test]
fn it_reads_on_without_a_stall() {
    for hop in Hop::BOTH {
        let lab = Lab::on(hop);
        for piece in PIECES {
            assert_prompt(piece, || sleeps_and_reads_on(&lab, piece).longest_wait);
            assert_nothing_dropped(&lab, piece);
        }
    }
}

/// The one place where a time is asserted: that there is no stall is what splicing has to
/// show, and a stall is a time. What TCP has to send again costs its timeout, 200 ms at
/// least, and does so every time. A busy machine may take the reader its processor away
/// for as long, but not every time.
#[track_caller]
fn assert_prompt(piece: usize, longest_wait: impl Fn() -> Duration) {
    const PROMPT: Duration = Duration::from_millis(50);
    const REPETITIONS: usize = 10;
    let mut seen = Vec::new();
    while seen.len() < REPETITIONS {
        seen.push(longest_wait());
        if seen.last() <= Some(&PROMPT) {
            return;
        }
    }
    panic!("each time it waited more than {PROMPT:?}, with messages of {piece}: {seen:?}");
}

/// A reader that was sent plenty by TCP has offered nearly all of its buffer, and cannot take
/// that back. (Not with messages of a few bytes: of those TCP alone drops one at times.)
#[test]
fn what_it_has_offered_to_tcp_it_has_room_for() {
    for hop in Hop::BOTH {
        let lab = Lab::on(hop);
        for piece in [600_000, 65_536, 4096] {
            let pair = lab.connect();
            for _ in 0..4 {
                lab.splice(&pair);
                let sent = fills_up(&lab, &pair, piece);
                assert!(receive(&pair.server, sent) == BYTES[..sent], "{piece}");
            }
            assert_nothing_dropped(&lab, piece);
        }
    }
}

/// TCP makes the buffer larger for those that find no room, and the window with it.
#[test]
fn large_messages_find_room_after_a_while() {
    for hop in Hop::BOTH {
        let lab = Lab::on(hop);
        for size in [65_536, 500_000] {
            let pair = lab.spliced();
            wait_until("a large message to be spliced", || {
                let before = lab.spliced_bytes();
                thread::scope(|scope| {
                    scope.spawn(|| assert!(receive(&pair.server, size) == BYTES[..size]));
                    send(&pair.client, &BYTES[..size]);
                });
                pair_answers(&pair);
                let spliced = lab.spliced_bytes() - before;
                (spliced >= size as u64).then_some(()).ok_or_else(|| {
                    format!("{size}: {}, {:?}", lab.counters(), memory(&pair.server))
                })
            });
        }
    }
}

/// A buffer that the kernel does not make larger is the bound as well, whatever its size.
#[test]
fn a_buffer_of_its_own_choice_is_the_bound() {
    for hop in Hop::BOTH {
        let lab = Lab::on(hop);
        for size in [32 << 10, 64 << 10, 100 << 10] {
            let listener = SockRef::from(lab.listener());
            listener.set_recv_buffer_size(size).expect("it is open");
            // The kernel takes half of it for its own structures.
            let buffer = 2 * u32::try_from(size).expect("it is small");
            for piece in PIECES {
                overfills_a_buffer(&lab, buffer, piece);
            }
        }
    }
}

fn overfills_a_buffer(lab: &Lab, buffer: u32, piece: usize) {
    let pair = lab.spliced();
    let bytes = &*BYTES;
    let before = lab.spliced_bytes();
    let fits = has_room_for(&pair, piece);
    let sent = overfill(&pair, bytes, piece);
    let spliced = lab.spliced_bytes() - before;
    assert_eq!(
        memory(&pair.server).1,
        buffer,
        "its buffer has another size"
    );
    let half = u64::from(fits)..=u64::from(buffer / 2);
    assert!(
        half.contains(&spliced),
        "{spliced} bytes for a buffer of {buffer}"
    );
    assert!(receive(&pair.server, sent) == bytes[..sent], "{piece}");
    assert_nothing_dropped(lab, piece);
}

#[test]
fn it_may_keep_sending_meanwhile() {
    for hop in Hop::BOTH {
        let lab = Lab::on(hop);
        let pair = lab.spliced();
        let before = lab.spliced_bytes();
        for _ in 0..3 {
            sends_while_it_does_not_read(&pair);
            assert_nothing_dropped(&lab, ANSWERED);
        }
        assert!(lab.spliced_bytes() > before, "{}", lab.counters());
        assert_prompt(ANSWERED, || answers_and_reads_on(&pair));
    }
}

/// How much is sent at once to a reader that answers, in bytes.
const ANSWERED: usize = 10_000;

/// It answers and answers, and reads everything at last.
fn sends_while_it_does_not_read(pair: &Pair) {
    let sent = answers(pair);
    thread::scope(|scope| {
        let rest = scope.spawn(|| receive(&pair.server, MUCH) == *BYTES);
        pair_answers(pair);
        send(&pair.client, &BYTES[sent..]);
        assert!(rest.join().expect("a reader"));
    });
}

/// The same; then it reads what it was sent. The longest that it waited for some of that.
fn answers_and_reads_on(pair: &Pair) -> Duration {
    let sent = answers(pair);
    let (read, longest_wait) = receive_and_time(&pair.server, sent);
    assert!(read == BYTES[..sent]);
    longest_wait
}

/// Each answer tells the other end how little room there is. How much was sent meanwhile.
fn answers(pair: &Pair) -> usize {
    let mut sent = 0;
    for _ in 0..100 {
        sent += fill(&pair.client, &BYTES[sent..], ANSWERED);
        assert!(sent < MUCH, "everything was taken, and nobody reads");
        assert_bounded(pair);
        pair_answers(pair);
        assert_bounded(pair);
    }
    sent
}

fn pair_answers(pair: &Pair) {
    send(&pair.server, b"I still read nothing");
    receive(&pair.client, 20);
}
