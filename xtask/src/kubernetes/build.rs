//! Compiles Kubernetes, with Debian's Go and without a network.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use super::VERSION;
use crate::exec::Step;

/// A package that Kubernetes brings with it in a version which this Go breaks: it
/// looks into the runtime's maps, and the API server dies of it when it reads JSON.
const BROKEN: &str = "vendor/github.com/modern-go/reflect2";
/// Debian's, which is newer.
const REPLACEMENT: &str = "/usr/share/gocode/src/github.com/modern-go/reflect2";

/// Builds `programs` in the unpacked source, and gives back where they are.
pub(super) fn programs(source: &Path, programs: &[&str]) -> Result<PathBuf> {
    replace_broken(&source.join(BROKEN))?;
    let path = source.join(".go");
    let inside = put_into_gopath(source, &path)?;
    let targets: Vec<_> = programs.iter().map(|name| format!("cmd/{name}")).collect();
    Step::new("make", format!("building Kubernetes {VERSION}"))
        .arg(format!("WHAT={}", targets.join(" ")))
        .dir(&inside)
        .env("GOPATH", &path)
        .env("GOCACHE", source.join(".cache"))
        .env("GOFLAGS", "-mod=vendor")
        .env("GOPROXY", "off")
        .env("CGO_ENABLED", "0")
        // Neither symbols nor debug information: half the size.
        .env("GOLDFLAGS", "-s -w")
        // The source is in no repository of git that could tell.
        .env("KUBE_GIT_VERSION", format!("v{VERSION}"))
        .remedy("Read Go's first error; the build needs 3 GB of disk and as much of memory.")
        .run()?;
    let output = Step::new("go", "asking Go for the name of this platform")
        .args(["env", "GOOS", "GOARCH"])
        .output()?;
    let platform: PathBuf = output.lines().collect();
    Ok(source.join("_output/local/bin").join(platform))
}

fn replace_broken(broken: &Path) -> Result<()> {
    let is_code = |path: &Path| {
        path.extension()
            .is_some_and(|extension| extension == "go" || extension == "s")
    };
    for file in files(broken)?.iter().filter(|path| is_code(path)) {
        fs::remove_file(file).with_context(|| format!("removing {}", file.display()))?;
    }
    for file in files(Path::new(REPLACEMENT))?
        .iter()
        .filter(|path| is_code(path))
    {
        let name = file.file_name().unwrap_or_default();
        fs::copy(file, broken.join(name)).with_context(|| format!("copying {}", file.display()))?;
    }
    Ok(())
}

/// Links the source to where Go looks for the package, and gives back that place.
fn put_into_gopath(source: &Path, path: &Path) -> Result<PathBuf> {
    let inside = path.join("src/k8s.io/kubernetes");
    let above = path.join("src/k8s.io");
    fs::create_dir_all(&above).with_context(|| format!("making {}", above.display()))?;
    symlink(source, &inside).with_context(|| format!("linking {}", inside.display()))?;
    Ok(inside)
}

fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries =
        fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))?;
    Ok(entries.flatten().map(|entry| entry.path()).collect())
}
