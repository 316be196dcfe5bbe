//! A receiver that stops reading holds a bounded amount, and goes on without a
//! stall and without a loss.

use std::thread;

use super::{
    INTO_PROXY,
    pair::{Lab, Pair, fill, memory, pattern, receive, send},
};

/// More than any buffer holds.
const MUCH: usize = 64 << 20;

/// Sends until nobody takes any more, and looks at what is held.
fn overfill(pair: &Pair, bytes: &[u8], piece: usize) -> usize {
    let sent = fill(&pair.application, bytes, piece);
    assert!(sent < MUCH, "everything was taken, and nobody reads");
    let (queued, buffer) = memory(&pair.proxy);
    assert!(
        queued <= buffer + buffer / 2,
        "{queued} bytes wait in a buffer of {buffer}"
    );
    sent
}

#[test]
fn it_holds_no_more_than_its_buffer_and_reads_on_without_loss() {
    let lab = Lab::new(INTO_PROXY);
    let bytes = pattern(MUCH);
    // A message as large as the kernel takes at once, and smaller ones.
    for piece in [MUCH, 600_000, 65_536, 4096, 100] {
        let pair = lab.spliced();
        let sent = overfill(&pair, &bytes, piece);
        assert!(receive(&pair.proxy, sent) == bytes[..sent], "{piece}");
        assert!(lab.fallbacks("receiver_full") > 0, "{}", lab.counters());
        // Then it is spliced again.
        lab.splice(&pair);
        assert_eq!(lab.dropped(), 0, "{piece}");
    }
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
            pair_answers(&pair);
        }
        assert!(sent < MUCH);
        let (queued, buffer) = memory(&pair.proxy);
        assert!(
            queued <= buffer + buffer / 2,
            "{queued} bytes wait in a buffer of {buffer}"
        );
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
