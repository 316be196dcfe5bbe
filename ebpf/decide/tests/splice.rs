//! The decision over one message between two sockets of the node.

use proptest::prelude::*;
use shunt_abi::{Fallback, SpliceMode};
use shunt_decide::{Message, Way, most_offered, offers_too_much, splice};

/// A message of the application's to its proxy that nothing speaks against.
const GOOD: Message = Message {
    mode: SpliceMode::Proxy as u32,
    from_proxy: false,
    into_proxy: true,
    peer_known: true,
    blocking: false,
    zerocopy: false,
    layered: false,
    spliced: 0,
    written: 1000,
    acked: 1000,
    read: 1000,
    queued: 0,
    buffer: 131_072,
    offered: 49_152,
    wide_window: false,
    size: 100,
    missed: 0,
};

#[test]
fn nothing_speaks_against_it() {
    assert_eq!(splice(&GOOD), Way::Splice);
}

#[test]
fn each_condition_sends_it_by_tcp() {
    use Fallback::{
        Blocking, IntoApplication, Layered, NotDrained, NotWanted, PeerUnknown, ReceiverFull,
        SingleByte, WideWindow, Zerocopy,
    };
    let rows = [
        (Message { mode: 0, ..GOOD }, Way::Tcp(NotWanted)),
        (Message { mode: 1, ..GOOD }, Way::Tcp(NotWanted)),
        (
            Message {
                into_proxy: false,
                ..GOOD
            },
            Way::Tcp(IntoApplication),
        ),
        (
            Message {
                peer_known: false,
                ..GOOD
            },
            Way::Tcp(PeerUnknown),
        ),
        (
            Message {
                blocking: true,
                ..GOOD
            },
            Way::TcpForGood(Blocking),
        ),
        (
            Message {
                zerocopy: true,
                ..GOOD
            },
            Way::TcpForGood(Zerocopy),
        ),
        (
            Message {
                layered: true,
                ..GOOD
            },
            Way::Tcp(Layered),
        ),
        (Message { size: 1, ..GOOD }, Way::Tcp(SingleByte)),
        (
            Message {
                wide_window: true,
                ..GOOD
            },
            Way::Tcp(WideWindow),
        ),
        (
            Message {
                written: 1001,
                ..GOOD
            },
            Way::Tcp(NotDrained),
        ),
        (Message { acked: 999, ..GOOD }, Way::Tcp(NotDrained)),
        (Message { read: 999, ..GOOD }, Way::Tcp(NotDrained)),
        (Message { queued: 1, ..GOOD }, Way::Tcp(NotDrained)),
        (
            Message {
                spliced: 1,
                queued: 65_500,
                ..GOOD
            },
            Way::Tcp(ReceiverFull),
        ),
    ];
    for (message, way) in rows {
        assert_eq!(splice(&message), way, "{message:?}");
    }
}

#[test]
fn the_mode_says_between_whom() {
    let rows = [
        (SpliceMode::Off, [false; 4]),
        (SpliceMode::Between, [false, false, false, true]),
        (SpliceMode::Proxy, [false, true, false, true]),
        (SpliceMode::All, [true; 4]),
    ];
    for (mode, expected) in rows {
        let found = [(false, false), (false, true), (true, false), (true, true)].map(
            |(from_proxy, into_proxy)| {
                let message = Message {
                    mode: mode as u32,
                    from_proxy,
                    into_proxy,
                    ..GOOD
                };
                matches!(splice(&message), Way::Splice)
            },
        );
        assert_eq!(found, expected, "{mode:?}");
    }
}

#[test]
fn a_message_is_spliced_where_there_is_room_for_all_of_it() {
    let of = |size| splice(&Message { size, ..GOOD });
    assert_eq!(of(65_536), Way::Splice);
    assert_eq!(of(65_537), Way::Tcp(Fallback::ReceiverFull));
    let behind = |queued| {
        splice(&Message {
            spliced: 1,
            queued,
            ..GOOD
        })
    };
    assert_eq!(behind(65_536 - 1024 - 100), Way::Splice);
    assert_eq!(behind(65_536 - 1024 - 99), Way::Tcp(Fallback::ReceiverFull));
}

#[test]
fn what_was_offered_to_tcp_is_left_to_it() {
    let largest = |offered| {
        (1..=GOOD.buffer)
            .rev()
            .find(|size| {
                let message = Message {
                    size: *size,
                    offered,
                    ..GOOD
                };
                splice(&message) == Way::Splice
            })
            .unwrap_or(0)
    };
    assert_eq!(largest(0), 65_536);
    // Each message of 61 KiB takes two more: 65_536 + 65_536 / 30 are left to TCP.
    assert_eq!(largest(most_offered(GOOD.buffer)), 63_352);
    let small = |queued| Message {
        offered: 65_536,
        spliced: 1,
        queued,
        ..GOOD
    };
    // Small ones take a third.
    let least = 131_072 - 65_536 - 65_536 / 3 - 1024 - 100;
    assert_eq!(splice(&small(least)), Way::Splice);
    assert_eq!(splice(&small(least + 1)), Way::Tcp(Fallback::ReceiverFull));
    // What the last segment leaves.
    assert_eq!(largest(131_072), 16_384);
    assert_eq!(largest(u32::MAX), 16_384);
}

#[test]
fn a_window_is_made_smaller_while_it_is_open() {
    let buffer = 131_072;
    let most = most_offered(buffer);
    assert!(offers_too_much(buffer, 100_000, 126_000));
    assert!(offers_too_much(buffer, 1, most + 1));
    assert!(!offers_too_much(buffer, 65_536, most));
    // It would stay shut.
    assert!(!offers_too_much(buffer, 0, 126_000));
}

#[test]
fn small_messages_that_wait_take_the_room_that_the_kernel_takes_for_them() {
    let many = |spliced, queued| {
        splice(&Message {
            spliced,
            queued,
            ..GOOD
        })
    };
    assert_eq!(many(63, 63), Way::Splice);
    assert_eq!(many(64, 64), Way::Tcp(Fallback::ReceiverFull));
    assert_eq!(many(u32::MAX, 64), Way::Tcp(Fallback::ReceiverFull));
    // None of them waits.
    assert_eq!(many(u32::MAX, 0), Way::Splice);
}

#[test]
fn an_application_that_sends_more_than_is_read_goes_by_tcp_for_a_while() {
    let full = Message {
        spliced: 1,
        queued: 65_536,
        missed: 31,
        ..GOOD
    };
    assert_eq!(splice(&full), Way::Tcp(Fallback::ReceiverFull));
    let often = Message { missed: 32, ..full };
    assert_eq!(splice(&often), Way::TcpForAWhile(Fallback::ReceiverFull));
    let not_drained = Message {
        spliced: 0,
        ..often
    };
    assert_eq!(
        splice(&not_drained),
        Way::TcpForAWhile(Fallback::NotDrained)
    );
    let ready = Message { queued: 0, ..often };
    assert_eq!(splice(&ready), Way::Splice);
}

#[test]
fn who_stays_in_the_map_may_be_spliced_again() {
    let full = Message {
        spliced: 1,
        queued: 65_536,
        missed: 32,
        ..GOOD
    };
    let rows = [
        Message {
            from_proxy: true,
            ..full
        },
        Message {
            mode: SpliceMode::All as u32,
            ..full
        },
    ];
    for message in rows {
        let way = Way::Tcp(Fallback::ReceiverFull);
        assert_eq!(splice(&message), way, "{message:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The two sides of a connection, played through: whatever is sent and read,
    /// and in whatever lengths, it is read in the order in which it was sent, and no
    /// more than half of the buffer is ever held beside what TCP holds.
    #[test]
    fn the_order_is_kept(steps in proptest::collection::vec((any::<bool>(), 1_u32..100_000), 1..40)) {
        let mut play = Play::default();
        for (sends, length) in steps {
            if sends { play.send(length) } else { play.read(length) }
            prop_assert!(play.direct.len() <= 65_536);
        }
        play.read(u32::MAX);
        prop_assert_eq!(play.got, (0..play.next).collect::<Vec<u32>>());
    }
}

/// One direction of a connection. A byte is its number.
#[derive(Default)]
struct Play {
    next: u32,
    written: u32,
    read: u32,
    spliced: u32,
    direct: Vec<u32>,
    tcp: Vec<u32>,
    got: Vec<u32>,
}

impl Play {
    fn send(&mut self, length: u32) {
        let mut left = length;
        while left > 0 {
            if self.direct.is_empty() && self.tcp.is_empty() {
                self.spliced = self.spliced.min(1);
            }
            let message = Message {
                spliced: self.spliced,
                written: self.written,
                acked: self.written,
                read: self.read,
                queued: self.direct.len() as u32 + self.tcp.len() as u32,
                size: left,
                ..GOOD
            };
            let (direct, sent) = match splice(&message) {
                Way::Splice => (true, left),
                Way::Tcp(_) | Way::TcpForAWhile(_) | Way::TcpForGood(_) => (false, left),
            };
            let bytes = self.next..self.next + sent;
            if direct {
                self.direct.extend(bytes);
            } else {
                self.tcp.extend(bytes);
                self.written = self.written.wrapping_add(sent);
            }
            self.spliced = if direct { self.spliced + 1 } else { 0 };
            self.next += sent;
            left -= sent;
        }
    }

    /// The kernel reads what was spliced first.
    fn read(&mut self, length: u32) {
        let direct = self.direct.len().min(length as usize);
        self.got.extend(self.direct.drain(..direct));
        let tcp = self.tcp.len().min(length as usize - direct);
        self.got.extend(self.tcp.drain(..tcp));
        self.read = self.read.wrapping_add(tcp as u32);
    }
}
