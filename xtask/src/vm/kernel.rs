//! Debian's kernels: downloaded once, kept in the cache, checked each time.

use std::{
    fs,
    path::{Path, PathBuf},
    process,
};

use anyhow::{Context as _, Result, bail};

use super::{emulator, mirror, unpacked};
use crate::{apt::Apt, exec::Step, paths, say};

/// The kernels that the tests run on, the oldest first. Debian has each of them in
/// one of the suites of [`mirror`], as cloud images, which are small.
pub(crate) const KERNELS: [&str; 4] = ["6.1", "6.12", "6.18", "7.2"];

/// How their packages' names end.
const FLAVOUR: &str = "-cloud-amd64";

/// A kernel that is there to be started.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    /// Its series, one of [`KERNELS`].
    pub(crate) series: String,
    /// The kernel itself.
    pub(crate) image: PathBuf,
    /// The directory of its modules; its name is the kernel's release.
    pub(crate) modules: PathBuf,
}

impl Kernel {
    /// What `uname -r` says in it.
    pub(crate) fn release(&self) -> String {
        let name = self.modules.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    /// One that was unpacked below `dir`.
    fn unpacked(series: &str, dir: &Path) -> Result<Self> {
        let root = unpacked::root(dir);
        let modules = only_entry(&root.join("lib/modules"))?;
        let release = modules.file_name().unwrap_or_default();
        let in_boot = format!("boot/vmlinuz-{}", release.display());
        let places = [root.join(in_boot), modules.join("vmlinuz")];
        let image = places.into_iter().find(|place| place.is_file());
        let image = image.with_context(|| format!("{} has no vmlinuz", root.display()))?;
        Ok(Self {
            series: series.to_owned(),
            image,
            modules,
        })
    }
}

fn only_entry(dir: &Path) -> Result<PathBuf> {
    let mut entries = fs::read_dir(dir).with_context(|| format!("listing {}", dir.display()))?;
    let entry = entries
        .next()
        .with_context(|| format!("{} is empty", dir.display()))??;
    Ok(entry.path())
}

/// Where the kernels are kept, a directory for each series.
fn cache() -> Result<PathBuf> {
    Ok(paths::cache()?.join("kernels"))
}

/// Those that a change is tried on: the oldest and the newest in any case, and each that
/// is there already.
pub(crate) fn in_ci() -> Result<Vec<&'static str>> {
    let cache = cache()?;
    Ok(chosen_for_ci(|series| cache.join(series).is_dir()))
}

fn chosen_for_ci(is_there: impl Fn(&str) -> bool) -> Vec<&'static str> {
    let ends = [KERNELS.first(), KERNELS.last()];
    let wanted = |series: &&&str| ends.contains(&Some(*series)) || is_there(series);
    KERNELS.iter().filter(wanted).copied().collect()
}

/// These kernels, downloaded if they are not in the cache, and what they run in.
pub(crate) fn ready(series: &[&str]) -> Result<Vec<Kernel>> {
    emulator::ready()?;
    let cache = cache()?;
    let missing: Vec<_> = series
        .iter()
        .filter(|series| !cache.join(series).is_dir())
        .collect();
    if !missing.is_empty() {
        fs::create_dir_all(&cache).with_context(|| format!("making {}", cache.display()))?;
        let apt = Apt::new(
            cache.join(format!("apt-{}", process::id())),
            &[mirror::kernels()?],
        )?;
        apt.update("the package lists of Debian's kernels")?;
        for series in missing {
            fetch(&apt, series, &cache)?;
        }
    }
    series
        .iter()
        .map(|series| {
            let dir = cache.join(series);
            unpacked::check(&dir)?;
            Kernel::unpacked(series, &dir)
        })
        .collect()
}

/// Downloads and unpacks one.
fn fetch(apt: &Apt, series: &str, cache: &Path) -> Result<()> {
    let names = apt.names("linux-")?;
    let packages = packages(series, &names);
    if packages.is_empty() {
        bail!("Debian's lists have no package of Linux {series} for this machine's architecture");
    }
    say(format!(
        "downloading Linux {series} for the test VM: {}",
        packages.join(", ")
    ));
    unpacked::fetch(apt, &packages, &cache.join(series), |root| {
        let modules = only_entry(&root.join("lib/modules"))?;
        Step::new("depmod", "finding out which module needs which")
            .arg("--basedir")
            .arg(root)
            .arg(modules.file_name().unwrap_or_default())
            .output()
            .map(drop)
    })
}

/// The packages of the newest kernel of a series: one with everything, or the
/// kernel and its modules apart, as newer ones come.
fn packages(series: &str, names: &[String]) -> Vec<String> {
    let versions = |kind_of: &str| {
        let start = format!("linux-{kind_of}-{series}.");
        names
            .iter()
            .filter_map(|name| {
                let version = name.strip_prefix(&start)?.strip_suffix(FLAVOUR)?;
                Some((numbers(version), name.clone()))
            })
            .max()
    };
    if let (Some((_, binary)), Some((_, modules))) = (versions("binary"), versions("modules")) {
        return vec![binary, modules];
    }
    versions("image")
        .map(|(_, name)| vec![name])
        .unwrap_or_default()
}

/// The numbers of a version, which sort as it does.
fn numbers(version: &str) -> Vec<u32> {
    version
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|number| number.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_tried_on_both_ends_and_on_what_is_there() {
        assert_eq!(chosen_for_ci(|_| false), ["6.1", "7.2"]);
        assert_eq!(
            chosen_for_ci(|series| series == "6.18"),
            ["6.1", "6.18", "7.2"]
        );
        assert_eq!(chosen_for_ci(|_| true), KERNELS);
    }

    #[test]
    fn the_newest_of_a_series_is_taken() {
        let names: Vec<String> = [
            "linux-image-6.1.0-9-cloud-amd64",
            "linux-image-6.1.0-50-cloud-amd64",
            "linux-image-6.1.0-50-cloud-amd64-dbg",
            "linux-image-6.1.0-51-amd64",
            "linux-image-6.12.94+deb13-cloud-amd64",
            "linux-image-6.12.107+deb13-cloud-amd64",
            "linux-image-7.2.12+deb13-cloud-amd64",
            "linux-binary-7.2.9+deb13-cloud-amd64",
            "linux-binary-7.2.12+deb13-cloud-amd64",
            "linux-modules-7.2.12+deb13-cloud-amd64",
        ]
        .map(str::to_owned)
        .into();
        assert_eq!(
            packages("6.1", &names),
            ["linux-image-6.1.0-50-cloud-amd64"]
        );
        assert_eq!(
            packages("6.12", &names),
            ["linux-image-6.12.107+deb13-cloud-amd64"]
        );
        assert_eq!(
            packages("7.2", &names),
            [
                "linux-binary-7.2.12+deb13-cloud-amd64",
                "linux-modules-7.2.12+deb13-cloud-amd64"
            ]
        );
        assert!(packages("5.15", &names).is_empty());
    }
}
