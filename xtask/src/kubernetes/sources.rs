//! Debian's source package of Kubernetes.

use std::{
    fs, iter,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use super::VERSION;
use crate::{apt::Apt, exec::Step};

/// Where apt has the machine's sources.
const SOURCES: &str = "/etc/apt";

/// Downloads and unpacks the source package below `staging`; gives back its
/// directory.
pub(super) fn fetch(staging: &Path) -> Result<PathBuf> {
    let apt = Apt::new(staging.join("apt"), &of_this_machine())?;
    // A third party's source may have no source packages: what matters is whether
    // Kubernetes is found.
    let updated = apt.update("Debian's lists of source packages");
    let downloads = staging.join("package");
    fs::create_dir(&downloads).with_context(|| format!("making {}", downloads.display()))?;
    apt.download_source("kubernetes", &downloads)
        .or_else(|error| updated.and(Err(error)))?;
    let description = description(&downloads)?;
    let source = staging.join("kubernetes");
    // apt has checked the signature and the digests.
    Step::new("dpkg-source", "unpacking the source package kubernetes")
        .args(["--no-check", "--no-copy", "--extract"])
        .arg(&description)
        .arg(&source)
        .remedy("Check that the disk is not full.")
        .run()?;
    Ok(source)
}

/// The package's description, if it is of the version that the tests know.
fn description(downloads: &Path) -> Result<PathBuf> {
    let found = fs::read_dir(downloads)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "dsc"))
        .context("apt has left no source package")?;
    let name = found.file_name().unwrap_or_default().to_string_lossy();
    if !is_known(&name) {
        bail!(
            "the source package is {name}, and the tests are written for Kubernetes {VERSION} of Debian 12; \
             see that the apt sources have bookworm alone",
        );
    }
    Ok(found)
}

/// Debian calls it `1.20.5+really1.20.2-1.1`.
fn is_known(name: &str) -> bool {
    let version = name.strip_prefix("kubernetes_").unwrap_or_default();
    let upstream = version.rsplit_once('-').map_or(version, |(first, _)| first);
    upstream == VERSION || upstream.ends_with(&format!("really{VERSION}"))
}

/// The machine's sources, of source packages instead of binary ones: files and their texts.
fn of_this_machine() -> Vec<(String, String)> {
    let parts = fs::read_dir(Path::new(SOURCES).join("sources.list.d"));
    let parts = parts.into_iter().flatten().flatten();
    let files = parts.map(|entry| entry.path());
    // sources.list may be absent, and apt reads no other names.
    iter::once(Path::new(SOURCES).join("sources.list"))
        .chain(files)
        .filter_map(|file| {
            let of_sources = match file.extension()?.to_str()? {
                "list" => of_sources_in_lines,
                "sources" => of_sources_in_stanzas,
                _ => return None,
            };
            let name = file.file_name()?.to_str()?.to_owned();
            Some((name, of_sources(&fs::read_to_string(&file).ok()?)))
        })
        .collect()
}

/// `deb …` becomes `deb-src …`, in the format of one line each.
fn of_sources_in_lines(text: &str) -> String {
    text.lines()
        .filter_map(|line| {
            Some(format!(
                "deb-src {}\n",
                line.trim_start().strip_prefix("deb ")?
            ))
        })
        .collect()
}

/// `Types: deb` becomes `Types: deb-src`, in the format of deb822.
fn of_sources_in_stanzas(text: &str) -> String {
    text.lines()
        .map(|line| {
            let is_types = line.to_ascii_lowercase().starts_with("types:");
            if is_types {
                "Types: deb-src\n".to_owned()
            } else {
                format!("{line}\n")
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn binary_sources_become_those_of_sources() {
        assert_eq!(
            of_sources_in_lines(
                "# deb no\n deb [signed-by=/k] http://a b main\ndeb-src http://a b main\n"
            ),
            "deb-src [signed-by=/k] http://a b main\n"
        );
        assert_eq!(
            of_sources_in_stanzas("Types: deb deb-src\nURIs: http://a\n\ntypes: deb\n"),
            "Types: deb-src\nURIs: http://a\n\nTypes: deb-src\n"
        );
    }

    #[test]
    fn another_version_is_not_taken() {
        assert!(is_known("kubernetes_1.20.5+really1.20.2-1.1+deb12u1.dsc"));
        assert!(is_known("kubernetes_1.20.2-1.dsc"));
        assert!(!is_known("kubernetes_1.20.5-1.dsc"));
        assert!(!is_known("kubernetes_1.32.3+ds-2.dsc"));
    }
}
