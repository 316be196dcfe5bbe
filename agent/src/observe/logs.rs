//! The log: how it is written, and what the programs in the kernel add to it.

use std::io::IsTerminal as _;

use shunt_abi::{Decided, NO_OWNER};
use shunt_decide::Rule;
use tracing_subscriber::{EnvFilter, filter::ParseError};

use crate::settings::process_env;

/// How a line of the log is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object for each line.
    Json,
}

/// How much is logged unless `SHUNT_LOG` says otherwise.
const USUAL_LOG: &str = "info";

/// What is left out unless `SHUNT_LOG` names it: the client says of each failed request
/// what whoever made the request says once, with what follows from it.
const QUIET: &str = "kube_client=off";

/// Under what name the programs' decisions are in the log.
macro_rules! programs {
    () => {
        "shunt::bpf"
    };
}

/// Starts the log, on stderr; `SHUNT_LOG` says how much of it (`info`, `debug`,
/// `shunt=trace`). Says so when it cannot be understood.
pub fn start(format: LogFormat) {
    let asked = process_env("SHUNT_LOG").filter(|text| !text.trim().is_empty());
    let (filter, complaint) = match asked.as_deref().map(filter) {
        None => (usual(), None),
        Some(Ok(filter)) => (filter, None),
        Some(Err(error)) => (usual(), Some(error)),
    };
    let log = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_env_filter(filter);
    match format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().flatten_event(true).init(),
    }
    if let Some(error) = complaint {
        tracing::warn!(
            asked,
            error = %error,
            "SHUNT_LOG cannot be understood; logs at {USUAL_LOG}. \
             Give a level, such as debug, or shunt=trace"
        );
    }
}

/// What these directives let through. Of two for one target the later holds.
fn filter(directives: &str) -> Result<EnvFilter, ParseError> {
    EnvFilter::try_new(format!("{QUIET},{directives}"))
}

fn usual() -> EnvFilter {
    EnvFilter::new(format!("{QUIET},{USUAL_LOG}"))
}

/// Whether the programs are to log their decisions: they are told when they are
/// loaded, and cannot be told later.
pub fn decisions_are_logged() -> bool {
    tracing::enabled!(target: programs!(), tracing::Level::DEBUG)
}

/// Writes what the programs log into the agent's log.
#[derive(Clone, Copy, Debug)]
pub struct DecisionLog;

impl log::Log for DecisionLog {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let text = record.args().to_string();
        match decision(&text) {
            Some(decision) => decision.log(),
            None => tracing::warn!(text, "the programs logged what is no decision"),
        }
    }

    fn flush(&self) {}
}

/// A decision of a program, with its rule.
#[derive(Debug, PartialEq)]
struct Decision {
    decided: Decided,
    rule: Rule,
}

/// Understands a message: the bytes of a [`Decided`] as hexadecimal digits.
fn decision(text: &str) -> Option<Decision> {
    let mut bytes = [0; Decided::BYTES];
    if text.len() != 2 * bytes.len() {
        return None;
    }
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * i..2 * i + 2)?, 16).ok()?;
    }
    let decided = Decided::from_bytes(bytes);
    let rule = Rule::from_code(decided.rule)?;
    Some(Decision { decided, rule })
}

impl Decision {
    fn log(&self) {
        let Self { decided, rule } = self;
        let owner = |id| (id != NO_OWNER).then_some(id);
        tracing::debug!(
            target: programs!(),
            direction = rule.direction().name(),
            rule = rule.number(),
            verdict = rule.verdict().name(),
            source = %decided.source.to_ip(),
            source_port = decided.source_port,
            destination = %decided.destination.to_ip(),
            port = decided.destination_port,
            uid = owner(decided.uid),
            gid = owner(decided.gid),
            cookie = decided.netns,
            "{}", rule.why()
        );
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use shunt_abi::Addr;

    use super::*;

    fn hexadecimal(bytes: &[u8]) -> String {
        bytes.iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
    }

    #[test]
    fn a_decision_is_understood() {
        let decided = Decided {
            netns: 4526,
            source: Addr::from_ip([10, 0, 0, 1].into()),
            destination: Addr::LOOPBACK6,
            source_port: 0,
            destination_port: 80,
            uid: 1000,
            gid: 1000,
            rule: Rule::OutIncludedCidr as u32,
        };
        let text = hexadecimal(decided.as_bytes());
        assert_eq!(
            decision(&text),
            Some(Decision {
                decided,
                rule: Rule::OutIncludedCidr
            })
        );
    }

    #[test]
    fn anything_else_is_none() {
        let no_rule = Decided {
            rule: 999,
            ..Decided::default()
        };
        let long = "0".repeat(2 * Decided::BYTES);
        for text in [
            "",
            "decided",
            &hexadecimal(no_rule.as_bytes()),
            &long.replace("00", "0x"),
            &long[2..],
            &"é".repeat(Decided::BYTES),
        ] {
            assert_eq!(decision(text), None, "{text}");
        }
    }
}
