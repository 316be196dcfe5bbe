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
    /// `None` when its cargo or its rustc does not run.
    version: Option<Version>,
    /// Whether the library source is there.
    source: bool,
}

impl Toolchain {
    /// Whether it serves for the BPF target, with a bpf-linker that has this
    /// LLVM; the error completes "it does not serve, for …".
    fn check(&self, linker_llvm: u32) -> Result<(), String> {
        let Some(version) = &self.version else {
            return Err("it is not there, or does not run".to_owned());
        };
        if !self.source {
            return Err("it has no library source (the component rust-src)".to_owned());
        }
        if version.minor() < Some(OLDEST) {
            let (major, minor) = OLDEST;
            return Err(format!("it is {version}, and {major}.{minor} is needed"));
        }
        if version.llvm > linker_llvm {
            return Err(format!(
                "it is {version}, and bpf-linker's LLVM {linker_llvm} cannot read what a newer LLVM writes"
            ));
        }
        Ok(())
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
        f.write_str(self.name.as_deref().unwrap_or("the cargo on PATH"))?;
        match &self.version {
            Some(version) => write!(f, " ({version})"),
            None => Ok(()),
        }
    }
}

/// Which toolchain builds the BPF crate.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// This one, for this reason.
    Use(Toolchain, &'static str),
    /// Debian's, which has to be linked first.
    Debian {
        /// Why nothing that rustup has serves.
        why: String,
        /// Whether it has to be installed, too.
        install: bool,
    },
}

/// What is here to choose from.
#[derive(Debug)]
struct Here {
    /// [`VARIABLE`].
    asked: Option<String>,
    origin: Origin,
    /// What is in [`DEBIAN`].
    debian: Toolchain,
}

/// Where a toolchain can come from.
#[derive(Debug)]
enum Origin {
    /// rustup, with those of its toolchains that may be chosen.
    Rustup(Vec<Toolchain>),
    /// No rustup: there is only the one on `PATH`.
    Path(Toolchain),
}

impl Here {
    fn choose(&self, linker_llvm: u32) -> Result<Choice> {
        match (&self.origin, &self.asked) {
            (Origin::Path(only), _) => only_one(only, linker_llvm),
            (Origin::Rustup(known), Some(asked)) => asked_for(asked, known, linker_llvm),
            (Origin::Rustup(known), None) => Ok(self.usual(known, linker_llvm)),
        }
    }

    fn usual(&self, known: &[Toolchain], linker_llvm: u32) -> Choice {
        // A link that is there is used, for it stands before the nightly in
        // agent/build.rs too; one that does not serve is repaired.
        let (toolchain, why) = match (named(known, LINKED), named(known, NIGHTLY)) {
            (Some(linked), _) => (linked, "set up earlier"),
            (None, Some(nightly)) => (nightly, "a nightly with rust-src is the usual way"),
            (None, None) => {
                return self.debians("rustup has no nightly toolchain".to_owned(), linker_llvm);
            }
        };
        match toolchain.check(linker_llvm) {
            Ok(()) => Choice::Use(toolchain.clone(), why),
            Err(unfit) => self.debians(
                format!("rustup's toolchain {toolchain} does not serve: {unfit}"),
                linker_llvm,
            ),
        }
    }

    fn debians(&self, why: String, linker_llvm: u32) -> Choice {
        Choice::Debian {
            why,
            install: self.debian.check(linker_llvm).is_err(),
        }
    }
}

fn only_one(only: &Toolchain, linker_llvm: u32) -> Result<Choice> {
    match only.check(linker_llvm) {
        Ok(()) => Ok(Choice::Use(
            only.clone(),
            "there is no rustup to choose with, and it has the library source",
        )),
        Err(unfit) => bail!(
            "there is no rustup, so the BPF crate has to be built by the cargo on PATH, which cannot do it: {unfit}; \
             install rustup (https://rustup.rs), or with Debian's rustc-web the package rust-web-src"
        ),
    }
}

fn asked_for(asked: &str, known: &[Toolchain], linker_llvm: u32) -> Result<Choice> {
    let toolchain = named(known, asked).ok_or_else(|| "rustup knows no such toolchain".to_owned());
    let served = toolchain.and_then(|toolchain| toolchain.check(linker_llvm).map(|()| toolchain));
    match served {
        Ok(toolchain) => Ok(Choice::Use(
            toolchain.clone(),
            "SHUNT_BPF_TOOLCHAIN names it",
        )),
        Err(unfit) => bail!(
            "SHUNT_BPF_TOOLCHAIN names the toolchain {asked}, which cannot build the BPF crate: {unfit}; \
             unset the variable, or name another one"
        ),
    }
}

/// The toolchain that rustup means by `name`.
fn named<'a>(known: &'a [Toolchain], name: &str) -> Option<&'a Toolchain> {
    // rustup's own toolchains carry the host's triple behind their name; a
    // digit there would be the date of another nightly.
    let is = |full: &str| {
        full == name
            || full
                .strip_prefix(name)
                .and_then(|rest| rest.strip_prefix('-'))
                .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_alphabetic()))
    };
    known
        .iter()
        .find(|toolchain| toolchain.name.as_deref().is_some_and(is))
}

/// Looks at this machine and chooses.
pub(crate) fn choose(linker_llvm: u32) -> Result<Choice> {
    look()?.choose(linker_llvm)
}

fn look() -> Result<Here> {
    let asked = env::var(VARIABLE).ok().filter(|name| !name.is_empty());
    let origin = if find_program("rustup").is_some() {
        Origin::Rustup(known_to_rustup(asked.as_deref())?)
    } else {
        Origin::Path(on_path())
    };
    Ok(Here {
        asked,
        origin,
        debian: inspect(None, PathBuf::from(DEBIAN)),
    })
}

/// Those of rustup's toolchains that may be chosen.
fn known_to_rustup(asked: Option<&str>) -> Result<Vec<Toolchain>> {
    let text = Step::new("rustup", "asking rustup for its toolchains")
        .args(["toolchain", "list", "--verbose"])
        .output()?;
    let may_be = |name: &str| {
        [asked, Some(LINKED), Some(NIGHTLY)]
            .iter()
            .flatten()
            .any(|candidate| name.starts_with(candidate))
    };
    Ok(parse_list(&text)
        .into_iter()
        .filter(|(name, _)| may_be(name))
        .map(|(name, dir)| inspect(Some(name), dir))
        .collect())
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

fn on_path() -> Toolchain {
    let sysroot = Step::new("rustc", "asking rustc for its directory")
        .args(["--print", "sysroot"])
        .output()
        .unwrap_or_default();
    inspect(None, PathBuf::from(sysroot.trim()))
}

/// The toolchain in `dir`, which may be none.
fn inspect(name: Option<String>, dir: PathBuf) -> Toolchain {
    let ask = Step::new(dir.join("bin/rustc"), "asking a compiler for its version").arg("-vV");
    let version = match ask.output() {
        Ok(text) if dir.join("bin/cargo").exists() => Version::parse(&text),
        Ok(_) | Err(_) => None,
    };
    Toolchain {
        name,
        version,
        source: dir
            .join("lib/rustlib/src/rust/library/core/src/lib.rs")
            .exists(),
        dir,
    }
}

/// Makes Debian's toolchain one of rustup's, under the name [`LINKED`].
pub(crate) fn link_debian(linker_llvm: u32) -> Result<Toolchain> {
    let debian = inspect(Some(LINKED.to_owned()), PathBuf::from(DEBIAN));
    if let Err(unfit) = debian.check(linker_llvm) {
        bail!(
            "Debian's toolchain in /usr cannot build the BPF crate: {unfit}; it has to be the one of rustc-web, \
             cargo-web and rust-web-src from Debian 12 with its security updates (see `apt-cache policy rustc-web`), \
             or install a nightly with `rustup toolchain install nightly --component rust-src,clippy`"
        );
    }
    Step::new("rustup", "making Debian's toolchain known to rustup")
        .args(["toolchain", "link", LINKED, DEBIAN])
        .output()?;
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
            version: Some(Version {
                release: release.to_owned(),
                llvm,
            }),
            source,
        }
    }

    fn here(known: &[Toolchain]) -> Here {
        Here {
            asked: None,
            origin: Origin::Rustup(known.to_vec()),
            debian: nothing(),
        }
    }

    fn nothing() -> Toolchain {
        Toolchain {
            version: None,
            source: false,
            ..debian()
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
                matches!(&choice, Choice::Debian { why, .. } if why.contains(reason)),
                "{choice:?}"
            );
        }
        let none = here(&[]).choose(22).expect("Debian's can be installed");
        assert!(matches!(none, Choice::Debian { .. }));
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
        assert!(matches!(choice, Choice::Debian { .. }));
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
        assert!(matches!(choice, Choice::Debian { .. }));
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
    fn debians_is_installed_unless_it_only_has_to_be_linked() {
        for (debian, missing) in [(debian(), false), (nothing(), true)] {
            let here = Here {
                debian,
                ..here(&[nightly(22, false)])
            };
            let choice = here.choose(22).expect("Debian's is a choice");
            assert!(matches!(choice, Choice::Debian { install, .. } if install == missing));
        }
    }

    #[test]
    fn without_rustup_the_cargo_on_path_must_serve() {
        let only = |toolchain| Here {
            origin: Origin::Path(toolchain),
            ..here(&[])
        };
        assert!(matches!(only(debian()).choose(22), Ok(Choice::Use(..))));
        for unfit in [
            nothing(),
            Toolchain {
                source: false,
                ..debian()
            },
        ] {
            let error = only(unfit).choose(22).expect_err("it does not serve");
            assert!(error.to_string().contains("no rustup"), "{error}");
        }
    }

    #[test]
    fn debians_toolchain_is_known_by_its_place() {
        assert!(debian().is_debians());
        assert!(!nightly(22, true).is_debians());
    }
}
