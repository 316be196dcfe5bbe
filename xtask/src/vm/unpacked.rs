//! Packages of Debian that are downloaded once and unpacked in the cache, not installed.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use crate::{apt::Apt, exec::Step, staging::beside};

/// What names the digests of the packages in a directory, beside them.
const DIGESTS: &str = "SHA256SUMS";

/// Where the files of the packages in `dir` are.
pub(super) fn root(dir: &Path) -> PathBuf {
    dir.join("root")
}

/// Compares the packages in `dir` with the digests that Debian's signed lists had.
pub(super) fn check(dir: &Path) -> Result<()> {
    Step::new("sha256sum", "checking what was downloaded for the test VM")
        .args(["--check", "--quiet", DIGESTS])
        .dir(dir)
        .remedy(format!("Remove {}; it is downloaded again.", dir.display()))
        .output()
        .map(drop)
}

/// Downloads and unpacks packages into the directory `place`, and has `finish` do the rest
/// where they are.
pub(super) fn fetch(
    apt: &Apt,
    packages: &[String],
    place: &Path,
    finish: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    beside(place, |staging| {
        fill(apt, packages, staging)?;
        finish(&root(staging))
    })
}

/// The C library. A program needs the one of the loader that starts it, which is this
/// machine's.
const C_LIBRARY: &str = "libc6_";

/// The same with all that the packages need, but for the C library: whatever this machine
/// has or lacks, and in whichever versions, it does not matter.
pub(super) fn fetch_with_all_needed(apt: &Apt, packages: &[String], place: &Path) -> Result<()> {
    beside(place, |staging| {
        let root = root(staging);
        merge(&root, &["bin", "sbin", "lib", "lib64"])?;
        for package in apt.download_with_all_needed(packages)? {
            let name = package.file_name().unwrap_or_default();
            if name.to_string_lossy().starts_with(C_LIBRARY) {
                continue;
            }
            let kept = staging.join(name);
            fs::rename(&package, &kept).with_context(|| format!("moving {}", package.display()))?;
            unpack(&kept, &root)?;
        }
        // apt has just compared them with the signed lists.
        Step::new(
            "sh",
            "noting the digests of what was downloaded for the test VM",
        )
        .args(["-c", r#"sha256sum ./*.deb >"$0""#, DIGESTS])
        .dir(staging)
        .output()
        .map(drop)
    })
}

fn fill(apt: &Apt, packages: &[String], dir: &Path) -> Result<()> {
    let root = root(dir);
    // Older packages have their modules in /lib, newer ones in /usr/lib.
    merge(&root, &["lib"])?;
    let mut digests = String::new();
    for package in packages {
        let digest = apt.digest(package)?;
        apt.download(package, dir)?;
        let file = file_of(package, dir)?;
        digests.push_str(&format!("{digest}  {file}\n"));
    }
    fs::write(dir.join(DIGESTS), digests)?;
    check(dir)?;
    for package in packages {
        unpack(&dir.join(file_of(package, dir)?), &root)?;
    }
    Ok(())
}

/// Makes these directories below `root` links into `usr` there, as on Debian since 12.
pub(super) fn merge(root: &Path, directories: &[&str]) -> Result<()> {
    for name in directories {
        let real = Path::new("usr").join(name);
        fs::create_dir_all(root.join(&real))
            .and_then(|()| symlink(&real, root.join(name)))
            .with_context(|| format!("making {name} in {}", root.display()))?;
    }
    Ok(())
}

/// Unpacks one below `root`. dpkg-deb would put a directory in the place of a link; tar keeps
/// it.
pub(super) fn unpack(package: &Path, root: &Path) -> Result<()> {
    Step::new("sh", "unpacking what was downloaded for the test VM")
        .args(["-c", r#"dpkg-deb --fsys-tarfile "$0" | tar --extract --keep-directory-symlink --directory "$1""#])
        .arg(package)
        .arg(root)
        .output()
        .map(drop)
}

/// The file that apt downloaded for a package.
fn file_of(package: &str, dir: &Path) -> Result<String> {
    let start = format!("{package}_");
    let mut names = fs::read_dir(dir)?
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok());
    names
        .find(|name| name.starts_with(&start))
        .with_context(|| format!("apt left no file of {package} in {}", dir.display()))
}
