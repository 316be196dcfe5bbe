//! What a program can notice in a mode that has to be asked for by name, script by
//! script. docs/splicing.md has it as a table.

use std::{fmt::Write, path::Path};

use shunt_tests::Splice;

/// A script that may look other than by TCP.
#[derive(Debug)]
pub(super) struct Limit {
    /// The module and the name of its test.
    script: &'static str,
    /// The modes in which it may.
    modes: &'static [Splice],
    /// What is different.
    what: &'static str,
}

const BOTH: &[Splice] = &[Splice::Proxy, Splice::All];
const ALL: &[Splice] = &[Splice::All];

/// Seen on Linux 6.18.44.
const LIMITS: &[Limit] = &[
    Limit {
        script: "blocking::a_half_close_by_another_thread_does_not_end_a_read",
        modes: BOTH,
        what: "a blocking read that another thread's half-close wakes gives EAGAIN",
    },
    Limit {
        script: "blocking::a_reader_is_not_disturbed_by_a_writer",
        modes: BOTH,
        what: "a blocking read that is woken by room for another thread's write gives EAGAIN",
    },
    Limit {
        script: "blocking::a_reader_is_not_disturbed_by_a_writer_that_polls",
        modes: BOTH,
        what: "the same",
    },
    Limit {
        script: "blocking::a_reset_ends_a_read",
        modes: BOTH,
        what: "a blocking read that a reset ends gives EAGAIN, not ECONNRESET",
    },
    Limit {
        script: "blocking::a_reset_ends_the_read_of_an_answer",
        modes: BOTH,
        what: "the same",
    },
    Limit {
        script: "blocking::a_reset_ends_a_write",
        modes: BOTH,
        what: "a blocking write that a reset ends gives EPIPE, not ECONNRESET",
    },
    Limit {
        script: "blocking::a_shutdown_by_another_thread_ends_a_read",
        modes: BOTH,
        what: "a blocking read that another thread's shutdown ends gives EAGAIN, not the end",
    },
    Limit {
        script: "blocking::a_signal_does_not_end_a_read_that_is_to_be_restarted",
        modes: BOTH,
        what: "a blocking read is not restarted after a signal (SA_RESTART): EAGAIN",
    },
    Limit {
        script: "blocking::a_signal_ends_a_read",
        modes: BOTH,
        what: "a blocking read that a signal ends gives EAGAIN, not EINTR",
    },
    Limit {
        script: "blocking::a_signal_ends_a_read_with_a_time_limit",
        modes: BOTH,
        what: "the same",
    },
    Limit {
        script: "blocking::two_threads_use_one_socket",
        modes: BOTH,
        what: "a blocking read while another thread writes gives EAGAIN; MSG_TRUNC as below",
    },
    Limit {
        script: "blocking::waiting_is_switched_on_and_off",
        modes: BOTH,
        what: "a blocking read that a reset ends gives EAGAIN, not ECONNRESET",
    },
    Limit {
        script: "closing::a_reset_is_told_to_the_next_send",
        modes: ALL,
        what: "the second send after a reset gives ECONNRESET as well, not EPIPE",
    },
    Limit {
        script: "closing::both_halves_are_closed_at_once",
        modes: ALL,
        what: "a send after shutdown is taken, not refused with EPIPE",
    },
    Limit {
        script: "closing::the_application_has_said_all_and_listens",
        modes: ALL,
        what: "the same",
    },
    Limit {
        script: "closing::what_was_not_read_is_a_reset",
        modes: ALL,
        what: "close() with unread bytes is an end to the sender, not a reset",
    },
    Limit {
        script: "moving::splice_moves_plenty_both_ways",
        modes: ALL,
        what: "splice(2) takes bytes of TCP before spliced ones that came first: bytes in a wrong order",
    },
    Limit {
        script: "moving::splice_takes_bytes_from_a_socket",
        modes: ALL,
        what: "splice(2) gives EAGAIN or 0 where spliced bytes wait",
    },
    Limit {
        script: "moving::splice_waits_for_bytes_from_a_socket",
        modes: ALL,
        what: "splice(2) does not wake up for spliced bytes",
    },
    Limit {
        script: "reading::a_reader_may_want_some_bytes_at_least",
        modes: ALL,
        what: "SO_RCVLOWAT does not count for poll(): fewer bytes are reported",
    },
    Limit {
        script: "reading::how_much_there_is_to_read",
        modes: BOTH,
        what: "FIONREAD counts spliced bytes only",
    },
    Limit {
        script: "reading::reads_that_do_not_wait",
        modes: BOTH,
        what: "recv() of no bytes gives 0, not EAGAIN",
    },
    Limit {
        script: "reading::reads_that_leave_the_bytes_there",
        modes: BOTH,
        what: "FIONREAD counts spliced bytes only",
    },
    Limit {
        script: "reading::reads_that_throw_bytes_away",
        modes: ALL,
        what: "MSG_TRUNC copies the bytes",
    },
    Limit {
        script: "reading::reads_that_want_all",
        modes: ALL,
        what: "MSG_WAITALL does not wait for all",
    },
    Limit {
        script: "urgent::an_urgent_byte_is_read_beside_the_stream",
        modes: BOTH,
        what: "recv(MSG_OOB) without urgent data gives EAGAIN, not EINVAL",
    },
];

/// What is known of a script in a mode; it is given by a path that contains its own.
pub(super) fn of(path: &str, mode: Splice) -> Option<&'static Limit> {
    let path = path.replace("::{{closure}}", "");
    LIMITS
        .iter()
        .find(|limit| path.ends_with(limit.script) && limit.modes.contains(&mode))
}

const BEGIN: &str = "<!-- limits: written by the tests -->\n";
const END: &str = "<!-- end of limits -->\n";

/// `SHUNT_UPDATE_DOCS=1` has it written.
#[test]
fn the_documentation_has_every_limit() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/splicing.md");
    let text = std::fs::read_to_string(&file).expect("the documentation is there");
    let (before, rest) = text.split_once(BEGIN).expect("the table has a beginning");
    let (_, after) = rest.split_once(END).expect("the table has an end");
    let wanted = format!("{before}{BEGIN}{}{END}{after}", table());
    if std::env::var_os("SHUNT_UPDATE_DOCS").is_some() {
        std::fs::write(&file, wanted).expect("the repository is ours");
    } else {
        assert!(
            text == wanted,
            "docs/splicing.md does not have the limits that the tests know; \
             `SHUNT_UPDATE_DOCS=1 cargo xtask test every_limit` writes them"
        );
    }
}

fn table() -> String {
    let mut table =
        "\n| script | `proxy` | `all` | what is different |\n|---|---|---|---|\n".to_owned();
    for Limit {
        script,
        modes,
        what,
    } in LIMITS
    {
        let cell = |mode| {
            if modes.contains(&mode) {
                "differs"
            } else {
                "as TCP"
            }
        };
        let (proxy, all) = (cell(Splice::Proxy), cell(Splice::All));
        writeln!(table, "| `{script}` | {proxy} | {all} | {what} |").expect("a string");
    }
    table.push('\n');
    table
}
