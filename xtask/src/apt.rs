//! apt with sources, lists and downloads of its own: nothing of the machine's apt is
//! changed, and packages can be had that the machine's own sources do not list.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use crate::{arch::Arch, exec::Step};

/// An apt of our own, below one directory, which is removed on drop: its lists are large
/// and soon old.
#[derive(Debug)]
pub(crate) struct Apt {
    dir: PathBuf,
}

impl Apt {
    /// One below `dir` with these files of sources, each a name as apt reads it
    /// (`….list`, `….sources`) and its text. Its lists are empty yet.
    pub(crate) fn new(dir: PathBuf, sources: &[(String, String)]) -> Result<Self> {
        let text = configuration(&dir);
        Self::configured(dir, &text, sources)
    }

    /// The same, for the packages of machines of this kind.
    pub(crate) fn for_arch(dir: PathBuf, arch: Arch, sources: &[(String, String)]) -> Result<Self> {
        let debian = arch.debian();
        let text = format!(
            "{}APT::Architecture \"{debian}\";\nAPT::Architectures {{ \"{debian}\"; }};\n",
            configuration(&dir)
        );
        Self::configured(dir, &text, sources)
    }

    fn configured(dir: PathBuf, text: &str, sources: &[(String, String)]) -> Result<Self> {
        let apt = Self { dir };
        for part in ["sources", "lists/partial", "archives/partial"] {
            let part = apt.dir.join(part);
            fs::create_dir_all(&part).with_context(|| format!("making {}", part.display()))?;
        }
        for (name, text) in sources {
            write(&apt.dir.join("sources").join(name), text)?;
        }
        write(&apt.config(), text)?;
        Ok(apt)
    }

    /// Fetches the lists of `what`.
    pub(crate) fn update(&self, what: &str) -> Result<()> {
        self.step("apt-get", format!("fetching {what}"))
            // By itself apt goes on without a list that it could not fetch.
            .args(["--quiet", "--error-on=any", "update"])
            .remedy(
                "Check the network, and that the mirror of this machine's apt sources has them.",
            )
            .output()
            .map(drop)
    }

    /// The names of all packages that start with `prefix`.
    pub(crate) fn names(&self, prefix: &str) -> Result<Vec<String>> {
        let names = self
            .step("apt-cache", format!("listing the packages {prefix}…"))
            .args(["pkgnames", prefix])
            .output()?;
        Ok(names.lines().map(str::to_owned).collect())
    }

    /// The SHA-256 of a package's newest file, from the signed lists.
    pub(crate) fn digest(&self, package: &str) -> Result<String> {
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
    pub(crate) fn download(&self, package: &str, to: &Path) -> Result<()> {
        self.fetch(&["download", package], to)
    }

    /// Downloads a source package into `to`; apt compares its files with
    /// the lists.
    pub(crate) fn download_source(&self, package: &str, to: &Path) -> Result<()> {
        self.fetch(&["source", "--download-only", package], to)
    }

    /// Downloads packages and all that they need, as for a machine that has nothing yet, and
    /// gives back their files; apt compares them with the lists.
    pub(crate) fn download_with_all_needed(
        &self,
        packages: &[impl AsRef<str>],
    ) -> Result<Vec<PathBuf>> {
        let install = [
            "install",
            "--yes",
            "--download-only",
            "--no-install-recommends",
        ];
        let packages = packages.iter().map(AsRef::as_ref);
        let arguments: Vec<&str> = install.into_iter().chain(packages).collect();
        self.fetch(&arguments, &self.dir)?;
        let archives = self.dir.join("archives");
        let entries =
            fs::read_dir(&archives).with_context(|| format!("listing {}", archives.display()))?;
        let files = entries.flatten().map(|entry| entry.path());
        Ok(files
            .filter(|file| file.extension().is_some_and(|extension| extension == "deb"))
            .collect())
    }

    fn fetch(&self, arguments: &[&str], to: &Path) -> Result<()> {
        let package = arguments.last().copied().unwrap_or_default();
        self.step("apt-get", format!("downloading {package}"))
            .arg("--quiet")
            .args(arguments)
            .dir(to)
            .remedy("Check the network, and that this machine's apt sources are Debian 12's, main.")
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

fn write(file: &Path, text: &str) -> Result<()> {
    fs::write(file, text).with_context(|| format!("writing {}", file.display()))
}

/// What apt is told: no place of the machine's but its keyrings, and root in place of its
/// unprivileged user, who may not enter every directory.
fn configuration(dir: &Path) -> String {
    let dir = dir.display();
    format!(
        "Dir::Etc::sourcelist \"/dev/null\";\n\
         Dir::Etc::sourceparts \"{dir}/sources\";\n\
         Dir::State::lists \"{dir}/lists\";\n\
         Dir::State::status \"/dev/null\";\n\
         Dir::Cache \"{dir}\";\n\
         Acquire::Languages \"none\";\n\
         APT::Sandbox::User \"root\";\n"
    )
}
