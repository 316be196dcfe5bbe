//! Kubernetes' own programs for the tests on a real node.
//!
//! Debian has no packages of them, but the source package `kubernetes`, which is
//! complete: nothing is downloaded while it is built. The programs are kept in the
//! cache.

mod build;
mod sources;

use std::{
    fs,
    path::{Path, PathBuf},
    process,
};

use anyhow::{Context as _, Result};

use crate::{image, paths, say, setup, staging};

/// The version that is in Debian 12.
pub(crate) const VERSION: &str = "1.20.2";

/// What a cluster of one node consists of, beside etcd and containerd.
const PROGRAMS: [&str; 4] = [
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
];

/// Where the programs are, or will be.
pub(crate) fn directory() -> Result<PathBuf> {
    Ok(paths::cache()?.join("kubernetes").join(VERSION))
}

/// What the tests on a real node learn by their environment: these programs, the image
/// of the agent, which is made now, and Helm's library.
pub(crate) fn for_tests() -> Result<Vec<(&'static str, PathBuf)>> {
    Ok(vec![
        ("SHUNT_KUBERNETES", directory()?),
        ("SHUNT_IMAGE", image::for_tests()?),
        ("SHUNT_HELM", setup::helm()?),
    ])
}

/// Whether they have to be built.
pub(crate) fn is_missing() -> Result<bool> {
    let directory = directory()?;
    Ok(!PROGRAMS.iter().all(|name| directory.join(name).is_file()))
}

/// Builds them.
pub(crate) fn install() -> Result<()> {
    let directory = directory()?;
    let above = directory.parent().context("the cache is a directory")?;
    fs::create_dir_all(above).with_context(|| format!("making {}", above.display()))?;
    // Beside its place, so that the last step is a rename: no half of it is ever
    // found, even when two builds run at once.
    let staging = above.join(format!("partial-{}", process::id()));
    staging::fresh(&staging)?;
    say(format!(
        "building Kubernetes {VERSION} from Debian's source package, to {}; this takes about 10 minutes, and 3 GB meanwhile",
        directory.display()
    ));
    let done = sources::fetch(&staging)
        .and_then(|source| build::programs(&source, &PROGRAMS))
        .and_then(|built| keep(&built, &staging.join("kept"), &directory));
    fs::remove_dir_all(&staging).with_context(|| format!("removing {}", staging.display()))?;
    done
}

/// Moves the programs into a directory of their own, and that to its place.
fn keep(built: &Path, kept: &Path, directory: &Path) -> Result<()> {
    fs::create_dir(kept).with_context(|| format!("making {}", kept.display()))?;
    for name in PROGRAMS {
        fs::rename(built.join(name), kept.join(name))
            .with_context(|| format!("{name} was not built"))?;
    }
    // What is there, if anything is, is not complete.
    if directory.exists() {
        fs::remove_dir_all(directory)
            .with_context(|| format!("removing {}", directory.display()))?;
    }
    fs::rename(kept, directory)
        .with_context(|| format!("putting the programs at {}", directory.display()))
}
