//! The Rust toolchain for the BPF crate.
//!
//! The BPF target comes without a compiled `core`: cargo builds it from the
//! library source (`-Z build-std`), so the toolchain needs that source. A stable
//! compiler does it as a nightly does when `RUSTC_BOOTSTRAP=1` says so.
//!
//! `agent/build.rs` and this module agree on the order: the toolchain that
//! `SHUNT_BPF_TOOLCHAIN` names, else [`LINKED`] if rustup knows it, else
//! [`NIGHTLY`].

use std::{
    env, fmt,
    path::{Path, PathBuf},
};

use anyhow::{Result, bail};

use crate::exec::{Step, find_program};

/// The variable that names another toolchain.
pub(crate) const VARIABLE: &str = "SHUNT_BPF_TOOLCHAIN";

/// The name under which rustup knows Debian's toolchain.
pub(crate) const LINKED: &str = "shunt-bpf";

/// rustup's nightly.
pub(crate) const NIGHTLY: &str = "nightly";

/// Where Debian's toolchain is: rustc in `bin`, the source in `lib/rustlib`.
const DEBIAN: &str = "/usr";

/// The oldest compiler that the BPF crate builds with: the workspace's own.
const OLDEST: (u32, u32) = (1, 95);

/// What `rustc -vV` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Version {
    /// E.g. `1.97.0-nightly`.
    release: String,
    /// LLVM's major version.
    llvm: u32,
}

impl Version {
    /// From the output of `rustc -vV`.
    fn parse(text: &str) -> Option<Self> {
        let field = |name: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
        };
        Some(Self {
            release: field("release")?.to_owned(),
            llvm: field("LLVM version")?.split('.').next()?.parse().ok()?,
        })
    }

    fn minor(&self) -> Option<(u32, u32)> {
        let mut parts = self.release.split('.');
        Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rustc {}, LLVM {}", self.release, self.llvm)
    }
}

/// A toolchain, and what decides whether it serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Toolchain {
    /// rustup's name for it; `None` where there is no rustup and the cargo on
    /// `PATH` is used.
    name: Option<String>,
    dir: PathBuf,
    version: Version,
    /// Whether the library source is there.
    source: bool,
}

impl Toolchain {
    /// Why it does not serve for the BPF target with a bpf-linker that has this
    /// LLVM; `None` when it does.
    fn unfit(&self, linker_llvm: u32) -> Option<String> {
        let version = &self.version;
        if !self.source {
            return Some("it has no library source (the component rust-src)".to_owned());
        }
        if version.minor() < Some(OLDEST) {
            let (major, minor) = OLDEST;
            return Some(format!("it is {version}, and {major}.{minor} is needed"));
        }
        if version.llvm > linker_llvm {
            return Some(format!(
                "it is {version}, and bpf-linker's LLVM {linker_llvm} cannot read what a newer LLVM writes"
            ));
        }
        None
    }

    /// Whether it is the one that Debian's packages bring.
    pub(crate) fn is_debians(&self) -> bool {
        self.dir == Path::new(DEBIAN)
    }

    /// cargo of this toolchain, allowed to use `-Z`.
    pub(crate) fn cargo(&self, purpose: &str) -> Step {
        let step = match &self.name {
            Some(name) => Step::new("rustup", purpose).args(["run", name, "cargo"]),
            None => Step::new("cargo", purpose),
        };
        // To a nightly it makes no difference.
        step.env("RUSTC_BOOTSTRAP", "1")
    }
}

impl fmt::Display for Toolchain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name.as_deref().unwrap_or("the cargo on PATH");
        write!(f, "{name} ({})", self.version)
    }
}

/// Which toolchain builds the BPF crate.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// This one, for this reason.
    Use(Toolchain, &'static str),
    /// Debian's, which has to be installed and linked first; the reason says
    /// why nothing that is here serves.
    Debian(String),
}

/// What is here to choose from.
#[derive(Debug, Default)]
struct Here {
    /// [`VARIABLE`].
    asked: Option<String>,
    rustup: bool,
    /// The toolchains of rustup that `agent/build.rs` would consider, or the
    /// one without a name.
    toolchains: Vec<Toolchain>,
}

impl Here {
    fn named(&self, name: &str) -> Option<&Toolchain> {
        // rustup's own toolchains carry the host's triple behind their name.
        let is = |full: &str| {
            full == name
                || full
                    .strip_prefix(name)
                    .and_then(|rest| rest.strip_prefix('-'))
                    .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_alphabetic()))
        };
        self.toolchains
            .iter()
            .find(|toolchain| toolchain.name.as_deref().is_some_and(is))
    }

    fn choose(&self, linker_llvm: u32) -> Result<Choice> {
        let fit = |toolchain: &Toolchain| toolchain.unfit(linker_llvm);
        if !self.rustup {
            let Some(only) = self.toolchains.first() else {
                bail!(
                    "there is neither rustup nor a rustc on PATH: install rustup (https://rustup.rs)"
                );
            };
            if let Some(unfit) = fit(only) {
                bail!(
                    "there is no rustup, so the BPF crate has to be built by the cargo on PATH, and {unfit}; \
                     install rustup (https://rustup.rs), or with Debian's rustc-web the package rust-web-src"
                );
            }
            return Ok(Choice::Use(
                only.clone(),
                "there is no rustup to choose with, and it has the library source",
            ));
        }
        if let Some(asked) = &self.asked {
            let unfit = match self.named(asked) {
                None => "rustup knows no such toolchain".to_owned(),
                Some(toolchain) => match fit(toolchain) {
                    None => {
                        return Ok(Choice::Use(
                            toolchain.clone(),
                            "SHUNT_BPF_TOOLCHAIN names it",
                        ));
                    }
                    Some(unfit) => unfit,
                },
            };
            bail!(
                "SHUNT_BPF_TOOLCHAIN names the toolchain {asked}, which cannot build the BPF crate: {unfit}; \
                 unset the variable, or name another one"
            );
        }
        // A link that is there is used, for it stands before the nightly in
        // agent/build.rs too; one that does not serve is repaired.
        if let Some(linked) = self.named(LINKED) {
            return Ok(match fit(linked) {
                None => Choice::Use(linked.clone(), "set up earlier"),
                Some(unfit) => {
                    Choice::Debian(format!("the toolchain {LINKED} does not serve: {unfit}"))
                }
            });
        }
        Ok(match self.named(NIGHTLY) {
            None => Choice::Debian("rustup has no nightly toolchain".to_owned()),
            Some(nightly) => match fit(nightly) {
                None => Choice::Use(nightly.clone(), "a nightly with rust-src is the usual way"),
                Some(unfit) => Choice::Debian(format!("rustup's nightly does not serve: {unfit}")),
            },
        })
    }
}

/// Looks at this machine and chooses.
pub(crate) fn choose(linker_llvm: u32) -> Result<Choice> {
    look()?.choose(linker_llvm)
}

fn look() -> Result<Here> {
    let asked = env::var(VARIABLE).ok().filter(|name| !name.is_empty());
    if find_program("rustup").is_none() {
        return Ok(Here {
            asked,
            rustup: false,
            toolchains: on_path().into_iter().collect(),
        });
    }
    let text = Step::new("rustup", "asking rustup for its toolchains")
        .args(["toolchain", "list", "--verbose"])
        .output()?;
    let considered = |name: &str| {
        asked
            .as_deref()
            .is_some_and(|asked| name.starts_with(asked))
            || name.starts_with(LINKED)
            || name.starts_with(NIGHTLY)
    };
    let toolchains = parse_list(&text)
        .into_iter()
        .filter(|(name, _)| considered(name))
        .filter_map(|(name, path)| inspect(Some(name), path))
        .collect();
    Ok(Here {
        asked,
        rustup: true,
        toolchains,
    })
}

/// Names and directories, from `rustup toolchain list --verbose`: lines of
/// `NAME (notes) PATH`, the notes being optional.
fn parse_list(text: &str) -> Vec<(String, PathBuf)> {
    let entry = |line: &str| {
        let (name, rest) = line.split_once(' ')?;
        let path = &rest[rest.find('/')?..];
        Some((name.to_owned(), PathBuf::from(path.trim_end())))
    };
    text.lines().filter_map(entry).collect()
}

fn on_path() -> Option<Toolchain> {
    let sysroot = Step::new("rustc", "asking rustc for its directory")
        .args(["--print", "sysroot"])
        .output()
        .ok()?;
    inspect(None, PathBuf::from(sysroot.trim()))
}

/// The toolchain in `dir`; `None` where there is no working compiler.
fn inspect(name: Option<String>, dir: PathBuf) -> Option<Toolchain> {
    let text = Step::new(dir.join("bin/rustc"), "asking a compiler for its version")
        .arg("-vV")
        .output()
        .ok()?;
    Some(Toolchain {
        name,
        version: Version::parse(&text)?,
        source: dir
            .join("lib/rustlib/src/rust/library/core/src/lib.rs")
            .exists(),
        dir,
    })
}

/// Makes Debian's toolchain one of rustup's, under the name [`LINKED`].
pub(crate) fn link_debian(linker_llvm: u32) -> Result<Toolchain> {
    Step::new("rustup", "making Debian's toolchain known to rustup")
        .args(["toolchain", "link", LINKED, DEBIAN])
        .remedy("See whether /usr/bin/rustc and /usr/bin/cargo work.")
        .output()?;
    let Some(debian) = inspect(Some(LINKED.to_owned()), PathBuf::from(DEBIAN)) else {
        bail!("/usr/bin/rustc does not run; reinstall the Debian package rustc-web");
    };
    if let Some(unfit) = debian.unfit(linker_llvm) {
        bail!(
            "Debian's toolchain in /usr cannot build the BPF crate: {unfit}; it has to be the one of rustc-web, \
             cargo-web and rust-web-src from Debian 12 with its security updates (see `apt-cache policy rustc-web`), \
             or install a nightly with `rustup toolchain install nightly --component rust-src`"
        );
    }
    Ok(debian)
}

#[cfg(test)]
mod tests {
    use super::*;

    const VERBOSE: &str = "rustc 1.97.0-nightly (e50aa6fba 2026-05-19)\nbinary: rustc\n\
        host: x86_64-unknown-linux-gnu\nrelease: 1.97.0-nightly\nLLVM version: 22.1.4\n";

    fn toolchain(name: &str, release: &str, llvm: u32, source: bool) -> Toolchain {
        Toolchain {
            name: Some(name.to_owned()),
            dir: PathBuf::from(if name == LINKED {
                "/usr"
            } else {
                "/toolchains"
            }),
            version: Version {
                release: release.to_owned(),
                llvm,
            },
            source,
        }
    }

    fn here(toolchains: &[Toolchain]) -> Here {
        Here {
            asked: None,
            rustup: true,
            toolchains: toolchains.to_vec(),
        }
    }

    fn nightly(llvm: u32, source: bool) -> Toolchain {
        toolchain(
            "nightly-x86_64-unknown-linux-gnu",
            "1.97.0-nightly",
            llvm,
            source,
        )
    }

    fn debian() -> Toolchain {
        toolchain(LINKED, "1.96.0", 22, true)
    }

    #[test]
    fn rustc_version_is_read() {
        let version = Version::parse(VERBOSE).expect("it is rustc's own output");
        assert_eq!(version.to_string(), "rustc 1.97.0-nightly, LLVM 22");
        assert_eq!(version.minor(), Some((1, 97)));
        assert_eq!(Version::parse("rustc 1.95.0"), None);
    }

    #[test]
    fn rustup_list_is_read() {
        let text = "stable-x86_64-unknown-linux-gnu (active, default) /home/a b/.rustup/stable\nshunt-bpf /usr\n";
        assert_eq!(
            parse_list(text),
            [
                (
                    "stable-x86_64-unknown-linux-gnu".to_owned(),
                    "/home/a b/.rustup/stable".into()
                ),
                ("shunt-bpf".to_owned(), "/usr".into()),
            ]
        );
        assert_eq!(parse_list("no installed toolchains\n"), []);
    }

    #[test]
    fn a_nightly_with_source_is_preferred() {
        let choice = here(&[nightly(22, true)]).choose(22).expect("one serves");
        assert!(matches!(choice, Choice::Use(t, _) if t == nightly(22, true)));
    }

    #[test]
    fn a_nightly_that_does_not_serve_is_passed_over_with_the_reason() {
        for (unfit, reason) in [
            (nightly(22, false), "no library source"),
            (nightly(23, true), "cannot read what a newer LLVM writes"),
            (
                toolchain(NIGHTLY, "1.90.0-nightly", 20, true),
                "1.95 is needed",
            ),
        ] {
            let choice = here(&[unfit])
                .choose(22)
                .expect("Debian's can be installed");
            assert!(
                matches!(&choice, Choice::Debian(why) if why.contains(reason)),
                "{choice:?}"
            );
        }
        let none = here(&[]).choose(22).expect("Debian's can be installed");
        assert!(matches!(none, Choice::Debian(_)));
    }

    #[test]
    fn a_dated_nightly_is_not_the_nightly() {
        let dated = toolchain(
            "nightly-2026-05-20-x86_64-unknown-linux-gnu",
            "1.97.0-nightly",
            22,
            true,
        );
        let choice = here(&[dated])
            .choose(22)
            .expect("Debian's can be installed");
        assert!(matches!(choice, Choice::Debian(_)));
    }

    #[test]
    fn the_link_stands_before_the_nightly_as_in_the_build_script() {
        let choice = here(&[nightly(22, true), debian()])
            .choose(22)
            .expect("one serves");
        assert!(matches!(choice, Choice::Use(t, _) if t == debian()));
        let broken = Toolchain {
            source: false,
            ..debian()
        };
        let choice = here(&[nightly(22, true), broken])
            .choose(22)
            .expect("it can be repaired");
        assert!(matches!(choice, Choice::Debian(_)));
    }

    #[test]
    fn the_variable_decides_or_fails() {
        let ask = |name: &str| Here {
            asked: Some(name.to_owned()),
            ..here(&[
                nightly(22, true),
                debian(),
                toolchain("mine", "1.96.0", 22, false),
            ])
        };
        let choice = ask("nightly").choose(22).expect("it serves");
        assert!(matches!(choice, Choice::Use(t, _) if t == nightly(22, true)));
        let unfit = ask("mine").choose(22).expect_err("it has no source");
        assert!(unfit.to_string().contains("no library source"), "{unfit}");
        let unknown = ask("other").choose(22).expect_err("it is not there");
        assert!(
            unknown.to_string().contains("no such toolchain"),
            "{unknown}"
        );
    }

    #[test]
    fn without_rustup_the_cargo_on_path_must_serve() {
        let only = |source| Here {
            rustup: false,
            ..here(&[Toolchain {
                name: None,
                source,
                ..debian()
            }])
        };
        assert!(matches!(only(true).choose(22), Ok(Choice::Use(..))));
        let error = only(false).choose(22).expect_err("it has no source");
        assert!(error.to_string().contains("no rustup"), "{error}");
        let nothing = Here {
            rustup: false,
            ..here(&[])
        };
        assert!(nothing.choose(22).is_err());
    }

    #[test]
    fn debians_toolchain_is_known_by_its_place() {
        assert!(debian().is_debians());
        assert!(!nightly(22, true).is_debians());
    }
}
