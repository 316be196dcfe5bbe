//! `cargo xtask setup`: finds out what is missing, and installs that.

mod deny;
mod envoy;
mod helm;
mod linker;
mod packages;
mod services;
mod toolchain;

use anyhow::{Result, bail};

pub(crate) use self::{
    envoy::{VARIABLE as ENVOY_VARIABLE, for_arch as envoy_for, path as envoy},
    helm::path as helm,
    toolchain::Toolchain,
};
use self::{
    linker::Linker,
    packages::{For, Package},
    toolchain::Choice,
};
use crate::{kubernetes, paths, say};

/// What a task is going to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// Compile the agent and the BPF programs.
    Build,
    /// Run the integration tests or the demo.
    Tests,
    /// Run the tests on a real node, beside what the tests need.
    Kubernetes,
    /// Run the benchmark, beside what the tests need.
    Bench,
    /// Run virtual machines.
    Vm,
    /// Build for arm64, and, with [`Self::Vm`], run such machines.
    Aarch64,
    /// Run the lints.
    Lint,
    /// Render and check the chart.
    Chart,
}

/// What is there after the set-up.
#[derive(Debug)]
pub(crate) struct Ready {
    /// Builds the BPF crate.
    pub(crate) toolchain: Toolchain,
    why: String,
    installed: bool,
}

/// The subcommand: everything that `build`, `test`, `demo` and `manifests` need.
pub(crate) fn command() -> Result<()> {
    let ready = ensure(&[Use::Build, Use::Tests, Use::Chart])?;
    let what = if ready.installed {
        "set up"
    } else {
        "everything is there"
    };
    say(format!(
        "{what}; the BPF crate is built with {}: {}",
        ready.toolchain, ready.why
    ));
    Ok(())
}

/// Installs what these uses need and is not there, saying what and why; says
/// nothing when everything is there.
pub(crate) fn ensure(uses: &[Use]) -> Result<Ready> {
    let missing = Missing::look(uses)?;
    missing.refuse_if_by_hand()?;
    let ready = missing.install()?;
    if uses.contains(&Use::Tests) && paths::is_root() {
        paths::check_reachable(&envoy::path()?)?;
    }
    Ok(ready)
}

/// What the set-up found.
#[derive(Debug)]
struct Missing {
    linker: Linker,
    choice: Choice,
    envoy: bool,
    deny: bool,
    helm: bool,
    kubernetes: bool,
    packages: Vec<&'static Package>,
}

impl Missing {
    fn look(uses: &[Use]) -> Result<Self> {
        let linker = linker::look();
        let choice = toolchain::choose(linker.llvm())?;
        let envoy = uses.contains(&Use::Tests) && envoy::is_missing()?;
        let deny = uses.contains(&Use::Lint) && deny::is_missing();
        let kubernetes = uses.contains(&Use::Kubernetes) && kubernetes::is_missing()?;
        let helm = uses.contains(&Use::Chart) && helm::is_missing()?;
        let needs = package_needs(uses, &linker, &choice, envoy || helm, kubernetes);
        Ok(Self {
            packages: packages::missing(&needs),
            linker,
            choice,
            envoy,
            deny,
            helm,
            kubernetes,
        })
    }

    fn is_nothing(&self) -> bool {
        let Self {
            linker,
            choice,
            envoy,
            deny,
            helm,
            kubernetes,
            packages,
        } = self;
        matches!(linker, Linker::Fit { .. })
            && matches!(choice, Choice::Use(..))
            && !envoy
            && !deny
            && !helm
            && !kubernetes
            && packages.is_empty()
    }

    /// An error with everything that the user has to install, if this process
    /// cannot.
    fn refuse_if_by_hand(&self) -> Result<()> {
        if packages::has_apt() {
            return match packages::obstacle(&self.packages) {
                Some(obstacle) => bail!(obstacle),
                None => Ok(()),
            };
        }
        let list = self.by_hand();
        if list.is_empty() {
            return Ok(());
        }
        bail!(
            "this system has no apt-get, so these have to be installed by hand:\n{}",
            list.join("\n")
        )
    }

    /// What is missing on a system without Debian's packages, one line each.
    fn by_hand(&self) -> Vec<String> {
        let debian_only = [For::Toolchain, For::Linker, For::Clippy];
        let mut lines: Vec<_> = self
            .packages
            .iter()
            .filter(|package| !debian_only.contains(&package.needed))
            .map(|package| package.by_sign())
            .collect();
        if let Choice::Debian { why, .. } = &self.choice {
            lines.push(format!(
                "  a toolchain for the BPF crate ({why}): rustup toolchain install nightly --component rust-src,clippy"
            ));
        }
        if let Linker::Unfit(why) = &self.linker {
            lines.push(format!("  bpf-linker ({why}): {}", linker::by_hand()));
        }
        lines
    }

    fn install(self) -> Result<Ready> {
        let installed = !self.is_nothing();
        if !self.packages.is_empty() {
            say(format!(
                "installing Debian packages:\n{}",
                packages::list(&self.packages)
            ));
            packages::install(&self.packages)?;
        }
        let llvm = self.linker.llvm();
        let (toolchain, why) = match self.choice {
            Choice::Use(toolchain, why) => (toolchain, why.to_owned()),
            Choice::Debian { why, .. } => {
                say(format!(
                    "linking Debian's Rust toolchain as rustup's {}: it builds the BPF crate, because {why}",
                    toolchain::LINKED
                ));
                (toolchain::link_debian(llvm)?, why)
            }
        };
        if let Linker::Unfit(why) = &self.linker {
            say(format!(
                "building bpf-linker, which links the BPF programs ({why}); this takes about a minute"
            ));
            linker::install()?;
        }
        if self.envoy {
            say(format!(
                "downloading Envoy {} for the tests and the demo, to {}",
                envoy::VERSION,
                envoy::path()?.display()
            ));
            envoy::install()?;
        }
        if self.deny {
            say(
                "building cargo-deny, which checks licences and sources of the dependencies; this takes minutes",
            );
            deny::install()?;
        }
        if self.kubernetes {
            kubernetes::install()?;
        }
        if self.helm {
            say(format!(
                "downloading Helm's library and Kubernetes' schemas for the chart, to {}",
                helm::path()?.display()
            ));
            helm::install()?;
        }
        Ok(Ready {
            toolchain,
            why,
            installed,
        })
    }
}

/// Which rows of the package table matter.
fn package_needs(
    uses: &[Use],
    linker: &Linker,
    choice: &Choice,
    pypi: bool,
    build_kubernetes: bool,
) -> Vec<For> {
    let (install_debians, use_debians) = match choice {
        Choice::Debian { install, .. } => (*install, true),
        Choice::Use(toolchain, _) => (false, toolchain.is_debians()),
    };
    [
        (For::Build, true),
        (For::Toolchain, install_debians),
        (For::Clippy, use_debians && uses.contains(&Use::Lint)),
        (For::Linker, matches!(linker, Linker::Unfit(_))),
        (For::PyPi, pypi),
        (For::Tests, uses.contains(&Use::Tests)),
        (For::Bench, uses.contains(&Use::Bench)),
        (For::Kubernetes, uses.contains(&Use::Kubernetes)),
        (For::KubernetesBuild, build_kubernetes),
        (For::Vm, uses.contains(&Use::Vm)),
        (For::Aarch64, uses.contains(&Use::Aarch64)),
        (
            For::Aarch64Vm,
            uses.contains(&Use::Vm) && uses.contains(&Use::Aarch64),
        ),
    ]
    .into_iter()
    .filter_map(|(need, wanted)| wanted.then_some(need))
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn debian() -> Choice {
        Choice::Debian {
            why: "there is no nightly".to_owned(),
            install: true,
        }
    }

    fn missing(linker: Linker) -> Missing {
        Missing {
            packages: packages::TABLE.iter().collect(),
            linker,
            choice: debian(),
            envoy: true,
            deny: true,
            helm: true,
            kubernetes: true,
        }
    }

    #[test]
    fn only_what_is_used_is_needed() {
        let fit = Linker::Fit { llvm: Some(22) };
        assert_eq!(
            package_needs(&[Use::Build], &fit, &debian(), false, false),
            [For::Build, For::Toolchain]
        );
        let lint = package_needs(&[Use::Build, Use::Lint], &fit, &debian(), false, false);
        assert_eq!(lint, [For::Build, For::Toolchain, For::Clippy]);
        let unfit = Linker::Unfit("it is not there".to_owned());
        let tests = package_needs(&[Use::Build, Use::Tests], &unfit, &debian(), true, false);
        assert_eq!(
            tests,
            [
                For::Build,
                For::Toolchain,
                For::Linker,
                For::PyPi,
                For::Tests
            ]
        );
    }

    #[test]
    fn without_apt_the_ways_are_not_debians() {
        let lines = missing(Linker::Unfit("it is not there".to_owned()))
            .by_hand()
            .join("\n");
        assert!(
            lines.contains("rustup toolchain install nightly --component rust-src"),
            "{lines}"
        );
        assert!(lines.contains("cargo install bpf-linker"), "{lines}");
        assert!(lines.contains("the program ip "), "{lines}");
        assert!(
            !lines.contains("rustc-web") && !lines.contains("llvm-22-dev"),
            "{lines}"
        );
    }

    #[test]
    fn without_apt_nothing_is_listed_that_is_there() {
        let lines = missing(Linker::Fit { llvm: None }).by_hand().join("\n");
        assert!(!lines.contains("bpf-linker"), "{lines}");
    }
}
