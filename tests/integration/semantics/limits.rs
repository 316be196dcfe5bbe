//! What a program can notice in a mode that has to be asked for by name, script by
//! script and kernel by kernel. docs/splicing.md has it as a table.

use std::{fmt::Write, path::Path};

use nix::sys::utsname::uname;
use shunt_tests::Splice;

/// The series of kernels that were looked at, oldest first.
const KERNELS: [&str; 4] = ["6.1", "6.12", "6.18", "7.2"];

/// Those of them on which a script may look other than by TCP.
type On = &'static [&'static str];

const EVERY: On = &KERNELS;
const NONE: On = &[];

/// A script that may look other than by TCP.
#[derive(Debug)]
pub(super) struct Limit {
    /// The module and the name of its test.
    script: &'static str,
    /// Where it may in mode `proxy`.
    proxy: On,
    /// Where it may in mode `all`.
    all: On,
    /// What is different.
    what: &'static str,
}

const LIMITS: &[Limit] = &[
    Limit {
        script: "blocking::a_half_close_by_another_thread_does_not_end_a_read",
        proxy: EVERY,
        all: EVERY,
        what: "a blocking read that another thread's half-close wakes gives EAGAIN",
    },
    Limit {
        script: "blocking::a_reader_is_not_disturbed_by_a_writer",
        proxy: EVERY,
        all: EVERY,
        what: "a blocking read that is woken by room for another thread's write gives EAGAIN",
    },
    Limit {
        script: "blocking::a_reader_is_not_disturbed_by_a_writer_that_polls",
        proxy: EVERY,
        all: EVERY,
        what: "the same",
    },
    Limit {
        script: "blocking::a_reset_ends_a_read",
        proxy: EVERY,
        all: EVERY,
        what: "a blocking read that a reset ends gives EAGAIN, not ECONNRESET",
    },
    Limit {
        script: "blocking::a_reset_ends_the_read_of_an_answer",
        proxy: EVERY,
        all: EVERY,
        what: "the same",
    },
    Limit {
        script: "blocking::a_reset_ends_a_write",
        proxy: EVERY,
        all: EVERY,
        what: "a blocking write that a reset ends gives EPIPE, not ECONNRESET",
    },
    Limit {
        script: "blocking::a_shutdown_by_another_thread_ends_a_read",
        proxy: EVERY,
        all: EVERY,
        what: "a blocking read that another thread's shutdown ends gives EAGAIN, not the end",
    },
    Limit {
        script: "blocking::a_signal_does_not_end_a_read_that_is_to_be_restarted",
        proxy: EVERY,
        all: EVERY,
        what: "a blocking read is not restarted after a signal (SA_RESTART): EAGAIN",
    },
    Limit {
        script: "blocking::a_signal_ends_a_read",
        proxy: EVERY,
        all: EVERY,
        what: "a blocking read that a signal ends gives EAGAIN, not EINTR",
    },
    Limit {
        script: "blocking::a_signal_ends_a_read_with_a_time_limit",
        proxy: EVERY,
        all: EVERY,
        what: "the same",
    },
    Limit {
        script: "blocking::two_threads_use_one_socket",
        proxy: EVERY,
        all: EVERY,
        what: "a blocking read while another thread writes gives EAGAIN; MSG_TRUNC as below",
    },
    Limit {
        script: "blocking::waiting_is_switched_on_and_off",
        proxy: EVERY,
        all: EVERY,
        what: "a blocking read that a reset ends gives EAGAIN, not ECONNRESET",
    },
    Limit {
        script: "closing::a_reset_is_told_to_the_next_send",
        proxy: NONE,
        all: EVERY,
        what: "the second send after a reset gives ECONNRESET as well, not EPIPE",
    },
    Limit {
        script: "closing::both_halves_are_closed_at_once",
        proxy: NONE,
        all: EVERY,
        what: "a send after shutdown is taken, not refused with EPIPE",
    },
    Limit {
        script: "closing::the_application_has_said_all_and_listens",
        proxy: NONE,
        all: EVERY,
        what: "the same",
    },
    Limit {
        script: "closing::what_was_not_read_is_a_reset",
        proxy: NONE,
        all: EVERY,
        what: "close() with unread bytes is an end to the sender, not a reset",
    },
    Limit {
        script: "information::how_much_tcp_has_carried",
        proxy: EVERY,
        all: EVERY,
        what: "TCP_INFO does not count what was spliced",
    },
    Limit {
        script: "layers::tls_in_the_kernel",
        proxy: &["6.12", "7.2"],
        all: &["6.12", "7.2"],
        what: "TLS in the kernel cannot be started (EINVAL) on 6.12.117 and 7.2.13",
    },
    Limit {
        script: "layers::tls_in_the_kernel_for_what_is_sent",
        proxy: &["6.12", "7.2"],
        all: &["6.12", "7.2"],
        what: "the same",
    },
    Limit {
        script: "moving::splice_moves_plenty_both_ways",
        proxy: NONE,
        all: EVERY,
        what: "splice(2) takes bytes of TCP before spliced ones that came first: bytes in a wrong order",
    },
    Limit {
        script: "moving::splice_takes_bytes_from_a_socket",
        proxy: NONE,
        all: EVERY,
        what: "splice(2) gives EAGAIN or 0 where spliced bytes wait",
    },
    Limit {
        script: "moving::splice_waits_for_bytes_from_a_socket",
        proxy: NONE,
        all: EVERY,
        what: "splice(2) does not wake up for spliced bytes",
    },
    Limit {
        script: "reading::a_reader_may_want_some_bytes_at_least",
        proxy: NONE,
        all: EVERY,
        what: "SO_RCVLOWAT does not count for poll(): fewer bytes are reported",
    },
    Limit {
        script: "reading::how_much_there_is_to_read",
        proxy: &["6.12", "6.18"],
        all: &["6.1", "6.12", "6.18"],
        what: "FIONREAD counts spliced bytes only; on 6.1 those of TCP only; on 6.12.117 both",
    },
    Limit {
        script: "reading::reads_that_do_not_wait",
        proxy: EVERY,
        all: EVERY,
        what: "recv() of no bytes gives 0, not EAGAIN",
    },
    Limit {
        script: "reading::reads_that_leave_the_bytes_there",
        proxy: &["6.12", "6.18"],
        all: &["6.1", "6.12", "6.18"],
        what: "FIONREAD, as above",
    },
    Limit {
        script: "reading::reads_that_throw_bytes_away",
        proxy: NONE,
        all: EVERY,
        what: "MSG_TRUNC copies the bytes",
    },
    Limit {
        script: "reading::reads_that_want_all",
        proxy: NONE,
        all: EVERY,
        what: "MSG_WAITALL does not wait for all",
    },
    Limit {
        script: "urgent::an_urgent_byte_is_read_beside_the_stream",
        proxy: EVERY,
        all: EVERY,
        what: "recv(MSG_OOB) without urgent data gives EAGAIN, not EINVAL",
    },
    Limit {
        script: "writing::many_writes_without_a_copy",
        proxy: &["6.1"],
        all: &["6.1"],
        what: "MSG_ZEROCOPY is not told to be done",
    },
    Limit {
        script: "writing::writes_without_a_copy",
        proxy: &["6.1"],
        all: &["6.1"],
        what: "the same",
    },
];

impl Limit {
    /// Where it may in this mode.
    fn on(&self, mode: Splice) -> On {
        match mode {
            Splice::Proxy => self.proxy,
            Splice::All => self.all,
            Splice::Off | Splice::Between => NONE,
        }
    }
}

/// What is known of a script in a mode on this kernel; it is given by a path that contains
/// its own.
pub(super) fn of(path: &str, mode: Splice) -> Option<&'static Limit> {
    let path = path.replace("::{{closure}}", "");
    let kernel = uname().expect("the kernel has a name");
    let kernel = series(kernel.release().to_str().expect("ASCII"));
    LIMITS
        .iter()
        .find(|limit| path.ends_with(limit.script) && limit.on(mode).contains(&kernel))
}

/// The newest series of [`KERNELS`] that is not newer than this release.
fn series(release: &str) -> &'static str {
    let numbers = |version: &str| -> Vec<u32> {
        let numbers = version.split(|character: char| !character.is_ascii_digit());
        numbers
            .map_while(|number| number.parse().ok())
            .take(2)
            .collect()
    };
    let known = KERNELS
        .iter()
        .rfind(|known| numbers(known) <= numbers(release));
    known.copied().unwrap_or(KERNELS[0])
}

#[test]
fn a_kernel_belongs_to_a_series() {
    assert_eq!(series("6.18.44-cloud-amd64"), "6.18");
    assert_eq!(series("6.12.117+deb13"), "6.12");
    assert_eq!(series("6.17.0"), "6.12");
    assert_eq!(series("6.1"), "6.1");
    assert_eq!(series("8.0-rc1"), "7.2");
    assert_eq!(series("5.15.0"), "6.1");
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
    for limit in LIMITS {
        let [proxy, all] = [limit.proxy, limit.all].map(cell);
        let (script, what) = (limit.script, limit.what);
        writeln!(table, "| `{script}` | {proxy} | {all} | {what} |").expect("a string");
    }
    table.push('\n');
    table
}

fn cell(on: On) -> String {
    match on.len() {
        0 => "as TCP".to_owned(),
        n if n == KERNELS.len() => "differs".to_owned(),
        _ => format!("differs on {}", on.join(", ")),
    }
}
