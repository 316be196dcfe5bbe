//! A receiver that stops reading holds a bounded amount, and goes on without a
//! stall and without a loss.

use std::thread;

use super::{
    INTO_PROXY,
    pair::{Lab, Pair, fill, memory, pattern, receive, send},
};

/// More than any buffer holds.
const MUCH: usize = 64 << 20;

/// How often it is looked at what is held while the reader sleeps.
const SAMPLES: usize = 100;

/// Sends until nobody takes any more, again and again, and looks at what is held.
fn overfill(pair: &Pair, bytes: &[u8], piece: usize) -> usize {
    let mut sent = 0;
    for _ in 0..SAMPLES {
        sent += fill(&pair.application, &bytes[sent..], piece);
        assert!(sent < MUCH, "everything was taken, and nobody reads");
        assert_bounded(pair);
    }
    sent
}

/// What waits for the reader is as much as its buffer may hold by TCP, with half of it
/// for the message that has gone above.
#[track_caller]
fn assert_bounded(pair: &Pair) {
    let (queued, buffer) = memory(&pair.proxy);
    assert!(
        queued <= buffer + buffer / 2,
        "{queued} bytes wait in a buffer of {buffer}"
    );
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

#[test]
fn it_holds_no_more_than_its_buffer_and_reads_on_without_loss() {
    let lab = Lab::new(INTO_PROXY);
    let bytes = pattern(MUCH);
    let mut least = usize::MAX;
    // A message as large as the kernel takes at once, and smaller ones.
    for piece in [MUCH, 600_000, 65_536, 4096, 100] {
        let pair = lab.spliced();
        let before = memory_of_node();
        let sent = overfill(&pair, &bytes, piece);
        least = least.min(memory_of_node().saturating_sub(before));
        assert!(receive(&pair.proxy, sent) == bytes[..sent], "{piece}");
        assert!(lab.fallbacks("receiver_full") > 0, "{}", lab.counters());
        // Then it is spliced again.
        lab.splice(&pair);
        assert_eq!(lab.dropped(), 0, "{piece}");
    }
    // Others use the node as well: one sample that has none of them in it will do.
    assert!(least < MUCH / 4, "{least} bytes for a reader that sleeps");
}

#[test]
fn it_may_keep_sending_meanwhile() {
    let lab = Lab::new(INTO_PROXY);
    let pair = lab.spliced();
    let bytes = pattern(MUCH);
    for _ in 0..3 {
        let mut sent = 0;
        // Each answer tells the other end how little room there is.
        for _ in 0..100 {
            sent += fill(&pair.application, &bytes[sent..], 10_000);
            assert!(sent < MUCH, "everything was taken, and nobody reads");
            assert_bounded(&pair);
            pair_answers(&pair);
            assert_bounded(&pair);
        }
        thread::scope(|scope| {
            let rest = scope.spawn(|| receive(&pair.proxy, bytes.len()) == bytes);
            pair_answers(&pair);
            send(&pair.application, &bytes[sent..]);
            assert!(rest.join().expect("a reader"));
        });
        assert_eq!(lab.dropped(), 0);
    }
}

fn pair_answers(pair: &Pair) {
    send(&pair.proxy, b"I still read nothing");
    receive(&pair.application, 20);
}
