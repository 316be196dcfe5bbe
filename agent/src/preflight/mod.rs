//! What has to be true of a node before anything is loaded, and what is good to
//! know. Nothing here changes anything.
//!
//! `shunt check` shows every [`Finding`]; `shunt run` asks for those without which it
//! cannot begin ([`required`]).

mod kernel;
mod neighbours;
mod places;
mod privileges;
mod processes;

use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};
use serde::{Deserialize, Serialize};

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// As it should be.
    Ok,
    /// shunt runs, but somebody should know.
    Warning,
    /// shunt cannot run.
    Failure,
}

/// What was found when one thing was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What was looked at.
    pub subject: String,
    /// How bad it is.
    pub level: Level,
    /// What was found.
    pub found: String,
    /// What to do about it; empty where there is nothing to do.
    #[serde(skip_serializing_if = "String::is_empty", default)]
    pub remedy: String,
}

impl Finding {
    fn ok(subject: &str, found: impl Into<String>) -> Self {
        Self::new(subject, Level::Ok, found, "")
    }

    fn warning(subject: &str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(subject, Level::Warning, found, remedy)
    }

    fn failure(subject: &str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(subject, Level::Failure, found, remedy)
    }

    fn into_error(self) -> anyhow::Error {
        anyhow!("{}; {}", self.found, self.remedy)
    }

    fn new(
        subject: &str,
        level: Level,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            subject: subject.to_owned(),
            level,
            found: found.into(),
            remedy: remedy.into(),
        }
    }
}

/// Where an agent would have its parts.
#[derive(Clone, Debug)]
pub struct Places {
    /// The cgroup v2 directory, if it is named.
    pub cgroup: Option<PathBuf>,
    /// Where maps would be pinned.
    pub bpffs: PathBuf,
}

/// Looks at everything.
pub fn all(places: &Places) -> Vec<Finding> {
    let mut findings = before_loading();
    findings.push(kernel::btf());
    findings.push(kernel::memlock());
    findings.push(places::bpffs(&places.bpffs));
    match places::cgroup(places.cgroup.as_deref()) {
        Ok(root) => {
            findings.push(Finding::ok("cgroup v2", root.display().to_string()));
            if findings.iter().all(|one| one.level < Level::Failure) {
                findings.extend(kernel::features());
                findings.push(neighbours::on_cgroup(&root));
                findings.push(neighbours::lookups());
                findings.push(neighbours::splicers());
                findings.push(kernel::splicing());
            }
        }
        Err(finding) => findings.push(finding),
    }
    findings
}

/// Checks that this process may load programs, and that the kernel can; warns in the log of
/// what somebody should know.
///
/// # Errors
///
/// With the first thing that is missing, and what to do.
pub fn required() -> Result<()> {
    for finding in before_loading() {
        match finding.level {
            Level::Ok => {}
            Level::Warning => tracing::warn!("{}; {}", finding.found, finding.remedy),
            Level::Failure => return Err(finding.into_error()),
        }
    }
    Ok(())
}

/// The cgroup v2 directory that the programs are to hang on: the one that is named, or
/// the root of the hierarchy.
///
/// # Errors
///
/// When it is none, or none is mounted.
pub fn cgroup(named: Option<&Path>) -> Result<PathBuf> {
    places::cgroup(named).map_err(Finding::into_error)
}

/// What loading a program would only fail at with a bare errno.
fn before_loading() -> Vec<Finding> {
    vec![
        privileges::root(),
        privileges::capabilities(),
        processes::seen(),
        kernel::release(),
        kernel::lockdown(Path::new("/sys/kernel/security/lockdown")),
    ]
}
