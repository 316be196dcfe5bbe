//! The machine that a benchmark ran on, and what ran there.

use std::{fmt, fs, process::Command};

use nix::sys::utsname;
use serde::Serialize;
use shunt_tests::envoy;

/// What decides how fast it is.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Machine {
    pub(crate) kernel: String,
    pub(crate) processor: String,
    pub(crate) processors: usize,
    /// Memory, in MiB.
    pub(crate) memory: u64,
    /// Whether it says itself that it is a virtual machine.
    pub(crate) is_virtual: bool,
    /// The commit of the repository, with `-dirty` where files differ.
    pub(crate) shunt: String,
    /// The version of Envoy.
    pub(crate) envoy: String,
    /// How many tasks were ready to run, on average of the minute before.
    pub(crate) load: String,
}

impl Machine {
    /// This one.
    pub(crate) fn this() -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let (cpuinfo, meminfo) = (read("/proc/cpuinfo"), read("/proc/meminfo"));
        let unknown = || "unknown".to_owned();
        Self {
            kernel: utsname::uname().map_or_else(
                |_| unknown(),
                |name| name.release().to_string_lossy().into_owned(),
            ),
            processor: field(&cpuinfo, "model name").map_or_else(unknown, str::to_owned),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            memory: field(&meminfo, "MemTotal").map_or(0, kibibytes) / 1024,
            is_virtual: field(&cpuinfo, "flags")
                .is_some_and(|flags| flags.split(' ').any(|flag| flag == "hypervisor")),
            shunt: said_by(
                Command::new("git")
                    .args(["-C", env!("CARGO_MANIFEST_DIR")])
                    .args(["describe", "--always", "--dirty", "--exclude=*"]),
            )
            .map_or_else(unknown, |said| said.trim().to_owned()),
            envoy: said_by(Command::new(envoy::binary()).arg("--version"))
                .and_then(|said| Some(version(&said)?.to_owned()))
                .unwrap_or_else(unknown),
            load: read("/proc/loadavg")
                .split(' ')
                .next()
                .map_or_else(unknown, str::to_owned),
        }
    }

    /// One for tests.
    #[cfg(test)]
    pub(crate) fn example() -> Self {
        Self {
            kernel: "6.18".to_owned(),
            processor: "an abacus".to_owned(),
            processors: 2,
            memory: 1024,
            is_virtual: true,
            shunt: "0123abc".to_owned(),
            envoy: "1.2.3".to_owned(),
            load: "0.00".to_owned(),
        }
    }
}

/// What a program writes; `None` where it cannot be started, or fails.
fn said_by(command: &mut Command) -> Option<String> {
    let output = command.output().ok()?;
    let said = output.status.success().then_some(output.stdout)?;
    String::from_utf8(said).ok()
}

/// The version in what `envoy --version` writes: `envoy  version: COMMIT/VERSION/…`.
fn version(said: &str) -> Option<&str> {
    said.split_once("version:")?.1.split('/').nth(1)
}

/// The value of the first line `NAME : VALUE`.
pub(crate) fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim())
    })
}

/// `12 kB` as 12; 0 when it is something else.
pub(crate) fn kibibytes(text: &str) -> u64 {
    let number = text.split(' ').next().unwrap_or_default();
    number.parse().unwrap_or(0)
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            kernel,
            processor,
            processors,
            memory,
            is_virtual,
            shunt,
            envoy,
            load,
        } = self;
        let kind = if *is_virtual {
            "a virtual machine with "
        } else {
            ""
        };
        write!(
            f,
            "Linux {kernel}, {kind}{processors} processors ({processor}), {memory} MiB; \
             shunt at {shunt}, Envoy {envoy}; load before: {load}."
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "model\t\t: 85\nmodel name\t: Some Processor: fast\n";
        assert_eq!(field(text, "model name"), Some("Some Processor: fast"));
        assert_eq!(field(text, "name"), None);
        assert_eq!(kibibytes("123 kB"), 123);
        assert_eq!(kibibytes("many"), 0);
    }

    #[test]
    fn the_version_of_envoy_is_the_second_part() {
        let said = "\n/usr/bin/envoy  version: abc123/1.35.0/Clean/RELEASE/BoringSSL\n\n";
        assert_eq!(version(said), Some("1.35.0"));
        assert_eq!(version("envoy"), None);
    }

    #[test]
    fn a_virtual_machine_is_called_one() {
        assert!(Machine::example().to_string().contains("virtual"));
    }
}
