//! Tools that run, answer and end.

use std::{
    io::Write,
    path::Path,
    process::{Command, Stdio},
};

/// What a tool wrote to its standard output.
///
/// # Panics
///
/// When it cannot be started or fails; the message has its command line and
/// what it wrote to standard error.
pub fn output_of(command: &mut Command) -> String {
    output_with_input(command, "")
}

/// The same for a tool that reads `input`.
///
/// # Panics
///
/// As [`output_of`].
pub fn output_with_input(command: &mut Command, input: &str) -> String {
    let line = line_of(command);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("cannot start `{line}`: {e}; `cargo xtask setup` installs it"));
    let mut stdin = child.stdin.take().expect("it was asked for");
    // A tool that ends early reads no input: its own words are the better error.
    let written = stdin.write_all(input.as_bytes());
    drop(stdin);
    let output = child.wait_with_output().expect("a child can be waited for");
    assert!(
        output.status.success(),
        "`{line}` failed ({}): {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    written.unwrap_or_else(|error| panic!("`{line}` did not read its input: {error}"));
    String::from_utf8(output.stdout).unwrap_or_else(|_| panic!("`{line}` wrote no UTF-8"))
}

/// Copies a program that is to be started.
///
/// Another process writes it: a child that this one makes for another test has, until
/// it starts its program, every file that is open here, and a program that anybody
/// has open to write is not started (`ETXTBSY`, execve(2)).
///
/// # Panics
///
/// When it cannot be copied.
pub fn copy_program(from: &Path, to: &Path) {
    output_of(Command::new("cp").arg(from).arg(to));
}

/// The command line as a shell would take it.
pub(crate) fn line_of(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy().into_owned())
        .collect::<Vec<_>>()
        .join(" ")
}
