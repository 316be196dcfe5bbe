//! What this kernel does with spliced sockets, tried out: in a network namespace
//! of its own, with maps of its own, and with the programs that splice. Nothing of
//! the node is touched.

mod bench;
mod trials;

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use aya::Btf;
use serde::{Deserialize, Serialize};
use shunt_abi::{SpliceMode, SpliceOffsets};

use super::of_kernel;
use crate::{datapath::kernel_types::KernelTypes, settings::Splice};

/// What one trial showed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trial {
    /// What was tried.
    pub name: String,
    /// The weakest mode that is not safe when it fails.
    pub needed_for: Splice,
    /// What went wrong; nothing when it went well.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub failed: Option<String>,
}

/// What all trials showed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tried {
    /// Each of them, in the order in which they ran.
    pub trials: Vec<Trial>,
    /// How long they took.
    pub took: Duration,
}

impl Tried {
    /// Tries out what this kernel does, with what is known of it.
    pub(super) fn with(offsets: &Result<SpliceOffsets>, btf: &Btf) -> Self {
        let start = Instant::now();
        let trials = match offsets {
            Ok(offsets) => bench::alone(*offsets, btf, trials::run),
            Err(error) => Err(anyhow!("{error:#}")),
        };
        Self {
            trials: trials.unwrap_or_else(|error| vec![not_loaded(&error)]),
            took: start.elapsed(),
        }
    }

    /// The strongest mode that is safe on this kernel, and why no stronger one
    /// is.
    pub fn strongest(&self) -> (SpliceMode, String) {
        let failing = |mode: Splice| {
            self.trials
                .iter()
                .filter(move |trial| trial.needed_for == mode)
                .find_map(|trial| Some(format!("{}: {}", trial.name, trial.failed.as_ref()?)))
        };
        let noticed = |why| format!("an application would notice more on this kernel: {why}");
        if let Some(why) = failing(Splice::Between) {
            (
                SpliceMode::Off,
                format!("this kernel does not do it: {why}"),
            )
        } else if let Some(why) = failing(Splice::Proxy) {
            (SpliceMode::Between, noticed(why))
        } else if let Some(why) = failing(Splice::All) {
            (SpliceMode::Proxy, noticed(why))
        } else {
            (SpliceMode::All, "this kernel passes every trial".to_owned())
        }
    }

    /// What is done when this was asked for, and why. What would break the proxy is
    /// never done; what would break an application is done when it is asked for by
    /// name.
    pub fn settle(&self, asked: Splice) -> (SpliceMode, String) {
        let (strongest, reason) = self.strongest();
        let by_name = asked.within(SpliceMode::All);
        if asked == Splice::Auto || strongest == SpliceMode::Off {
            (strongest, reason)
        } else if by_name <= strongest {
            (by_name, "it was asked for".to_owned())
        } else {
            (by_name, format!("it was asked for, although {reason}"))
        }
    }
}

/// What is said where nothing could be tried.
fn not_loaded(error: &anyhow::Error) -> Trial {
    Trial {
        name: "the programs load".to_owned(),
        needed_for: Splice::Between,
        failed: Some(format!("{error:#}")),
    }
}

/// Tries out what this kernel does. Takes a tenth of a second; on a busy machine each trial may
/// wait two more.
///
/// # Errors
///
/// When the kernel has no BTF.
pub fn try_out() -> Result<Tried> {
    let offsets = of_kernel(&KernelTypes::read()?);
    let btf = Btf::from_sys_fs().context("cannot read the kernel's BTF")?;
    Ok(Tried::with(&offsets, &btf))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tried(failed: &[(Splice, &str)]) -> Tried {
        let trials = failed
            .iter()
            .map(|(needed_for, why)| Trial {
                name: "a trial".to_owned(),
                needed_for: *needed_for,
                failed: (!why.is_empty()).then(|| (*why).to_owned()),
            })
            .collect();
        Tried {
            trials,
            took: Duration::ZERO,
        }
    }

    #[test]
    fn the_strongest_mode_without_a_failure_is_taken() {
        let well = tried(&[
            (Splice::Between, ""),
            (Splice::Proxy, ""),
            (Splice::All, ""),
        ]);
        assert_eq!(well.settle(Splice::Auto).0, SpliceMode::All);
        assert_eq!(well.settle(Splice::Proxy).0, SpliceMode::Proxy);
        assert_eq!(well.settle(Splice::Off).0, SpliceMode::Off);
        let noticed = tried(&[(Splice::Proxy, ""), (Splice::All, "it reads 0")]);
        let (mode, reason) = noticed.settle(Splice::Auto);
        assert_eq!(mode, SpliceMode::Proxy);
        assert!(reason.contains("a trial: it reads 0"), "{reason}");
        let less = tried(&[(Splice::Proxy, "it counts 0"), (Splice::All, "")]);
        assert_eq!(less.settle(Splice::Auto).0, SpliceMode::Between);
    }

    #[test]
    fn what_breaks_a_proxy_is_never_done_and_the_rest_when_asked_for() {
        let broken = tried(&[(Splice::Between, "it is lost"), (Splice::All, "")]);
        for asked in [Splice::Auto, Splice::Proxy, Splice::All] {
            assert_eq!(broken.settle(asked).0, SpliceMode::Off, "{asked:?}");
        }
        let noticed = tried(&[(Splice::All, "it reads 0")]);
        assert_eq!(noticed.settle(Splice::All).0, SpliceMode::All);
        assert_eq!(noticed.settle(Splice::Between).0, SpliceMode::Between);
    }
}
