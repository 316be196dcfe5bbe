//! Helm's library and Kubernetes' schemas, from PyPI, for the chart.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use crate::{exec::Step, paths, staging::beside};

/// What is wanted itself, with the digest of the file that is accepted.
const WANTED: [(&str, &str); 2] = [
    (
        "helm-python-sdk==0.2.2",
        "28cc13abaf134c3a7e37f070c939be8d9cdc9825c3c8b8b2d35161073bcd4578",
    ),
    (
        "kubernetes-validate==1.37.0",
        "85136d018a27b50ec7fc049d902bfa5193f5976807e6c0f408e3ab6fe078cad9",
    ),
];

/// What these need. Some are compiled for one version of Python, so that they have
/// many digests.
const NEEDED: [&str; 9] = [
    "attrs==26.1.0",
    "importlib-resources==7.1.0",
    "jsonschema==4.26.0",
    "jsonschema-specifications==2025.9.1",
    "packaging==26.3",
    "PyYAML==6.0.3",
    "referencing==0.37.0",
    "rpds-py==2026.9.1",
    "typing-extensions==4.16.0",
];

/// A change of the lists is another directory.
const GENERATION: &str = "helm-4.2.3-schemas-1.37.0";

/// Where the packages are, or will be: what Python is told to look at.
pub(crate) fn path() -> Result<PathBuf> {
    Ok(paths::cache()?.join(GENERATION))
}

pub(crate) fn is_missing() -> Result<bool> {
    Ok(!path()?.is_dir())
}

/// Installs the packages into a directory of their own: nothing of Python's changes.
pub(crate) fn install() -> Result<()> {
    beside(&path()?, |staging| {
        fill(staging)?;
        Ok(fs::remove_file(staging.join("requirements.txt"))?)
    })
}

fn fill(staging: &Path) -> Result<()> {
    let list = staging.join("requirements.txt");
    let lines = WANTED.map(|(package, digest)| format!("{package} --hash=sha256:{digest}\n"));
    fs::write(&list, lines.concat()).with_context(|| format!("writing {}", list.display()))?;
    pip(staging, "installing Helm's library and Kubernetes' schemas")
        .arg("--require-hashes")
        .arg("--requirement")
        .arg(&list)
        .run()?;
    pip(staging, "installing what Kubernetes' schemas need")
        .args(NEEDED)
        .run()
}

fn pip(target: &Path, purpose: &str) -> Step {
    Step::new("python3", purpose)
        // Errors alone: it warns of root, and that two packages bring programs.
        .args(["-m", "pip", "install", "-qq", "--no-deps", "--no-cache-dir"])
        .args(["--disable-pip-version-check", "--only-binary", ":all:"])
        .arg("--target")
        .arg(target)
        .remedy("Check the network (and the proxy or index in pip's configuration); there are packages for x86-64 and Python 3.9 or newer.")
}
