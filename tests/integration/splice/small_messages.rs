//! Small messages that wait for a reader: each takes far more of the kernel's memory than
//! its bytes, and nobody's buffer pays for that.

use super::pair::{Hop, Lab, fill, memory, pattern, receive};

/// What the kernel takes for each, in bytes.
const OVERHEAD: u64 = 1024;

#[test]
fn a_reader_that_sleeps_is_given_as_many_as_its_buffer_pays_for() {
    let bytes = pattern(64 << 10);
    for hop in Hop::BOTH {
        let lab = Lab::on(hop);
        for piece in [2, 16, 100] {
            is_given_few(&lab, &bytes, piece);
        }
    }
}

fn is_given_few(lab: &Lab, bytes: &[u8], piece: usize) {
    let pair = lab.spliced();
    let before = lab.spliced_messages();
    let (_, buffer) = memory(&pair.server);
    let sent = fill(&pair.client, bytes, piece);
    let given = lab.spliced_messages() - before;
    // Half of the buffer, and the first, which found nothing that waits.
    let most = u64::from(buffer) / 2 / OVERHEAD + 1;
    assert!(
        (1..=most).contains(&given),
        "{given} messages of {piece} bytes wait for a buffer of {buffer}"
    );
    assert!(lab.fallbacks("receiver_full") > 0, "{}", lab.counters());
    assert!(receive(&pair.server, sent) == bytes[..sent], "{piece}");
}
