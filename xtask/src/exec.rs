//! The one way in which a task runs another program.
//!
//! A [`Step`] knows what it is for and what to do when it fails, so that no
//! failure ends in a bare exit status.

use std::{
    convert::Infallible,
    ffi::{OsStr, OsString},
    io::{self, BufRead as _, BufReader},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
};

use anyhow::{Context as _, Error, Result, anyhow};

/// A program to run, its purpose, and the remedy when it fails.
#[derive(Debug)]
pub(crate) struct Step {
    command: Command,
    purpose: String,
    remedy: String,
}

/// What `cargo run` tells xtask of itself. A build script that looks at it, such as
/// ring's, would be run again whenever `cargo` and `cargo xtask` take turns, and all that
/// depends on it compiled again.
fn of_this_package() -> impl Iterator<Item = OsString> {
    let names = std::env::vars_os().map(|(name, _)| name);
    names.filter(|name| {
        let name = name.to_string_lossy();
        name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")
    })
}

impl Step {
    /// `purpose` completes the sentence "… failed", e.g. "installing iptables".
    pub(crate) fn new(program: impl AsRef<OsStr>, purpose: impl Into<String>) -> Self {
        let mut command = Command::new(program);
        for name in of_this_package() {
            command.env_remove(name);
        }
        Self {
            command,
            purpose: purpose.into(),
            remedy: String::new(),
        }
    }

    /// What the reader of the error should do: one imperative sentence.
    pub(crate) fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = remedy.into();
        self
    }

    pub(crate) fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    pub(crate) fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.command.args(args);
        self
    }

    pub(crate) fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    pub(crate) fn dir(mut self, dir: &Path) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// Runs it on this terminal; an error unless it succeeds.
    pub(crate) fn run(mut self) -> Result<()> {
        let status = self.command.status();
        self.judge(status, "")
    }

    /// Runs it and gives back what it wrote to standard output; standard error
    /// is part of the error when it fails, and else dropped.
    pub(crate) fn output(mut self) -> Result<String> {
        let output = match self.command.stdin(Stdio::null()).output() {
            Ok(output) => output,
            Err(error) => return Err(self.failure(&error_in_words(&error), "")),
        };
        self.judge(Ok(output.status), &String::from_utf8_lossy(&output.stderr))?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs it, hands each line of its standard output to `see` as it comes,
    /// and gives back how it ended: a non-zero end is the caller's to judge.
    pub(crate) fn stream(mut self, mut see: impl FnMut(&str)) -> Result<ExitStatus> {
        let mut child = match self.command.stdout(Stdio::piped()).spawn() {
            Ok(child) => child,
            Err(error) => return Err(self.failure(&error_in_words(&error), "")),
        };
        let stdout = child.stdout.take().context("the pipe was just asked for")?;
        for line in BufReader::new(stdout).split(b'\n') {
            // Not lines(): a test may print bytes that are no UTF-8.
            see(&String::from_utf8_lossy(&line?));
        }
        child
            .wait()
            .with_context(|| format!("waiting for {}", self.shown()))
    }

    /// Becomes that program, so that signals (Ctrl-C) and the exit status are
    /// its own. Returns only if that fails.
    pub(crate) fn replace_self(mut self) -> Result<Infallible> {
        let error = self.command.exec();
        Err(self.failure(&error_in_words(&error), ""))
    }

    /// An error unless the program ended well; `said` is its standard error.
    fn judge(&self, status: io::Result<ExitStatus>, said: &str) -> Result<()> {
        match status {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(self.failure(&status.to_string(), said)),
            Err(error) => Err(self.failure(&error_in_words(&error), said)),
        }
    }

    fn failure(&self, how: &str, said: &str) -> Error {
        let mut text = format!(
            "{} failed: {how}\n  command: {}",
            self.purpose,
            self.shown()
        );
        let rest = [("it said", said.trim()), ("remedy", &self.remedy)];
        for (name, value) in rest.iter().filter(|(_, value)| !value.is_empty()) {
            text.push_str(&format!("\n  {name}: {value}"));
        }
        anyhow!(text)
    }

    /// The command as one would type it.
    fn shown(&self) -> String {
        let set = self
            .command
            .get_envs()
            .filter_map(|(name, value)| Some(format!("{}={}", name.display(), quoted(value?))));
        let words = std::iter::once(self.command.get_program())
            .chain(self.command.get_args())
            .map(quoted);
        set.chain(words).collect::<Vec<_>>().join(" ")
    }
}

fn error_in_words(error: &io::Error) -> String {
    if error.kind() == io::ErrorKind::NotFound {
        "there is no such program".to_owned()
    } else {
        error.to_string()
    }
}

/// A word for a shell, quoted only where it has to be.
fn quoted(word: &OsStr) -> String {
    let word = word.to_string_lossy();
    let plain = |c: char| c.is_alphanumeric() || "-_=+./:,@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.into_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// The program `name` as it would be run: from `PATH`, from where cargo
/// installs (a cargo that rustup did not bring may have no `PATH` to it), or
/// from the directories of the administrator's tools, which a user's `PATH`
/// lacks on Debian.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(cargo_bin())
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

/// Where `cargo install` puts programs.
pub(crate) fn cargo_bin() -> Option<PathBuf> {
    let home = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::home_dir().map(|home| home.join(".cargo")));
    home.map(|home| home.join("bin"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_names_purpose_command_and_remedy() {
        let error = Step::new("sh", "asking the shell")
            .args(["-c", "exit 3"])
            .env("A", "b c")
            .remedy("Ask again.")
            .run()
            .expect_err("exit 3 is a failure");
        let text = error.to_string();
        assert_eq!(
            text,
            "asking the shell failed: exit status: 3\n  command: A='b c' sh -c 'exit 3'\n  remedy: Ask again."
        );
    }

    #[test]
    fn a_missing_program_is_said_in_words() {
        let error = Step::new("no-such-program-here", "running it")
            .output()
            .expect_err("it does not exist");
        assert!(
            error.to_string().contains("there is no such program"),
            "{error}"
        );
    }

    #[test]
    fn output_of_a_failure_keeps_what_the_program_said() {
        let error = Step::new("sh", "asking")
            .args(["-c", "echo because >&2; exit 1"])
            .output()
            .expect_err("exit 1 is a failure");
        assert!(error.to_string().contains("it said: because"), "{error}");
    }

    #[test]
    fn stream_hands_on_every_line_and_the_status() {
        let mut seen = Vec::new();
        let status = Step::new("sh", "counting")
            .args(["-c", r"printf 'one\ntw\377o\nthree'; exit 7"])
            .stream(|line| seen.push(line.to_owned()))
            .expect("sh runs");
        assert_eq!(seen, ["one", "tw\u{fffd}o", "three"]);
        assert_eq!(status.code(), Some(7));
    }

    #[test]
    fn quoting_survives_a_quote() {
        assert_eq!(quoted(OsStr::new("it's")), r"'it'\''s'");
        assert_eq!(quoted(OsStr::new("")), "''");
        assert_eq!(quoted(OsStr::new("a/b-c=d")), "a/b-c=d");
    }
}
