//! Debian's packages of other suites than this machine's, without touching its
//! apt: a configuration of our own, with the mirror that the machine uses.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use crate::exec::Step;

/// The suites that are looked through: the kernels come from these.
const SUITES: [&str; 4] = ["bookworm", "trixie", "trixie-backports", "sid"];

/// With which the lists are signed, unless the machine's sources name another.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// An apt of our own, below one directory, which is removed on drop: its lists
/// are large and soon old.
#[derive(Debug)]
pub(super) struct Apt {
    dir: PathBuf,
}

impl Apt {
    /// Fetches the lists of [`SUITES`].
    pub(super) fn open(dir: PathBuf) -> Result<Self> {
        let apt = Self { dir };
        for part in ["lists/partial", "archives/partial"] {
            let part = apt.dir.join(part);
            fs::create_dir_all(&part).with_context(|| format!("making {}", part.display()))?;
        }
        let mirror = mirror()?;
        fs::write(apt.dir.join("sources.list"), sources(&mirror))?;
        fs::write(apt.config(), configuration(&apt.dir))?;
        apt.step("apt-get", "fetching the package lists of Debian's kernels")
            .args(["--quiet", "update"])
            .remedy("Check the network, and that the mirror of this machine's apt sources has these suites.")
            .output()?;
        Ok(apt)
    }

    /// The names of all packages that start with `prefix`.
    pub(super) fn names(&self, prefix: &str) -> Result<Vec<String>> {
        let names = self
            .step("apt-cache", "listing Debian's kernels")
            .args(["pkgnames", prefix])
            .output()?;
        Ok(names.lines().map(str::to_owned).collect())
    }

    /// The SHA-256 of a package's newest file, from the signed lists.
    pub(super) fn digest(&self, package: &str) -> Result<String> {
        let shown = self
            .step("apt-cache", format!("looking up {package}"))
            .args(["show", "--no-all-versions", package])
            .output()?;
        let digest = shown.lines().find_map(|line| line.strip_prefix("SHA256: "));
        digest
            .map(|digest| digest.trim().to_owned())
            .with_context(|| format!("Debian's lists have no SHA-256 of {package}"))
    }

    /// Downloads a package into `to`; apt compares it with the lists.
    pub(super) fn download(&self, package: &str, to: &Path) -> Result<()> {
        self.step("apt-get", format!("downloading {package}"))
            .args(["--quiet", "download", package])
            .dir(to)
            .remedy("Check the network, and try again.")
            .output()
            .map(drop)
    }

    fn config(&self) -> PathBuf {
        self.dir.join("apt.conf")
    }

    fn step(&self, program: &str, purpose: impl Into<String>) -> Step {
        Step::new(program, purpose).env("APT_CONFIG", self.config())
    }
}

impl Drop for Apt {
    fn drop(&mut self) {
        // What cannot be removed is written over the next time.
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Where Debian's archive is, and with what it is signed.
#[derive(Debug, PartialEq, Eq)]
struct Mirror {
    uri: String,
    keyring: String,
}

/// The mirror of this machine's own sources.
fn mirror() -> Result<Mirror> {
    let targets = Step::new("apt-get", "asking apt for its mirror of Debian")
        .args([
            "indextargets",
            "--format",
            "$(LABEL)|$(COMPONENT)|$(CREATED_BY)|$(REPO_URI)|$(SIGNED_BY)",
        ])
        .remedy("Run `apt-get update`.")
        .output()?;
    targets.lines().find_map(mirror_of).context(
        "this machine's apt has no source of Debian's main archive, from which the kernels come; \
         run `apt-get update` if it has",
    )
}

/// The mirror in one line of apt's answer, if it is one of Debian's archive.
fn mirror_of(line: &str) -> Option<Mirror> {
    let mut fields = line.split('|');
    let mut next = || fields.next();
    let wanted = next()? == "Debian" && next()? == "main" && next()? == "Packages";
    let (uri, keyring) = (next()?, next()?);
    // A field that is not set is given back as it was asked for.
    let keyring = if keyring.starts_with('/') {
        keyring
    } else {
        KEYRING
    };
    wanted.then(|| Mirror {
        uri: uri.to_owned(),
        keyring: keyring.to_owned(),
    })
}

fn sources(mirror: &Mirror) -> String {
    let Mirror { uri, keyring } = mirror;
    SUITES
        .map(|suite| format!("deb [signed-by={keyring} target=Packages] {uri} {suite} main\n"))
        .concat()
}

fn configuration(dir: &Path) -> String {
    let dir = dir.display();
    format!(
        "Dir::Etc::sourcelist \"{dir}/sources.list\";\n\
         Dir::Etc::sourceparts \"-\";\n\
         Dir::State::lists \"{dir}/lists\";\n\
         Dir::State::status \"/dev/null\";\n\
         Dir::Cache \"{dir}\";\n\
         Acquire::Languages \"none\";\n\
         APT::Sandbox::User \"root\";\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_the_machines_own() {
        assert_eq!(
            mirror_of("Debian|main|Packages|http://mirror.example/debian/|$(SIGNED_BY)"),
            Some(Mirror {
                uri: "http://mirror.example/debian/".to_owned(),
                keyring: KEYRING.to_owned(),
            })
        );
        let signed = mirror_of("Debian|main|Packages|http://mirror.example/|/etc/keys.gpg");
        assert_eq!(signed.expect("a mirror").keyring, "/etc/keys.gpg");
        for other in [
            "",
            "Debian-Security|main|Packages|http://mirror.example/|$(SIGNED_BY)",
            "Debian|contrib|Packages|http://mirror.example/|$(SIGNED_BY)",
            "Debian|main|DEP-11|http://mirror.example/|$(SIGNED_BY)",
        ] {
            assert_eq!(mirror_of(other), None, "{other}");
        }
    }

    #[test]
    fn every_suite_has_its_line() {
        let mirror = Mirror {
            uri: "http://mirror.example/".to_owned(),
            keyring: KEYRING.to_owned(),
        };
        let sources = sources(&mirror);
        assert_eq!(sources.lines().count(), SUITES.len());
        assert!(
            sources.ends_with("http://mirror.example/ sid main\n"),
            "{sources}"
        );
    }
}
