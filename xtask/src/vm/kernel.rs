//! Debian's kernels: downloaded once, kept in the cache, checked each time.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process,
};

use anyhow::{Context as _, Result, bail};

use super::{emulator, mirror, unpacked};
use crate::{apt::Apt, arch::Arch, exec::Step, paths, say};

/// The kernels that the tests run on, the oldest first. Debian has each of them in
/// one of the suites of [`mirror`], as cloud images, which are small.
pub(crate) const KERNELS: [&str; 4] = ["6.1", "6.12", "6.18", "7.2"];

/// How their packages' names end.
fn flavour(arch: Arch) -> String {
    format!("-cloud-{}", arch.debian())
}

/// A kernel that is there to be started.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    /// The kind of machine that it runs on.
    pub(crate) arch: Arch,
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
    fn unpacked(arch: Arch, series: &str, dir: &Path) -> Result<Self> {
        let root = unpacked::root(dir);
        let modules = only_entry(&root.join("lib/modules"))?;
        let release = modules.file_name().unwrap_or_default();
        let in_boot = format!("boot/vmlinuz-{}", release.display());
        let places = [root.join(in_boot), modules.join("vmlinuz")];
        let image = places.into_iter().find(|place| place.is_file());
        let image = image.with_context(|| format!("{} has no vmlinuz", root.display()))?;
        Ok(Self {
            arch,
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

/// Where the kernels for `arch` are kept, a directory for each series.
fn cache(arch: Arch) -> Result<PathBuf> {
    let name = match arch {
        Arch::X86_64 => "kernels",
        Arch::Aarch64 => "kernels-arm64",
    };
    Ok(paths::cache()?.join(name))
}

/// Those that a change is tried on: the oldest and the newest in any case, and each that
/// is there already.
pub(crate) fn in_ci(arch: Arch) -> Result<Vec<&'static str>> {
    let cache = cache(arch)?;
    Ok(chosen_for_ci(|series| cache.join(series).is_dir()))
}

fn chosen_for_ci(is_there: impl Fn(&str) -> bool) -> Vec<&'static str> {
    let ends = [KERNELS.first(), KERNELS.last()];
    let wanted = |series: &&&str| ends.contains(&Some(*series)) || is_there(series);
    KERNELS.iter().filter(wanted).copied().collect()
}

/// These kernels, downloaded if they are not in the cache, and what they run in.
pub(crate) fn ready(arch: Arch, series: &[&str]) -> Result<Vec<Kernel>> {
    emulator::ready(arch)?;
    let cache = cache(arch)?;
    let missing: Vec<_> = series
        .iter()
        .filter(|series| !cache.join(series).is_dir())
        .collect();
    if !missing.is_empty() {
        fs::create_dir_all(&cache).with_context(|| format!("making {}", cache.display()))?;
        let apt = Apt::for_arch(
            cache.join(format!("apt-{}", process::id())),
            arch,
            &[mirror::kernels()?],
        )?;
        apt.update("the package lists of Debian's kernels")?;
        for series in missing {
            fetch(&apt, arch, series, &cache)?;
        }
    }
    series
        .iter()
        .map(|series| {
            let dir = cache.join(series);
            unpacked::check(&dir)?;
            Kernel::unpacked(arch, series, &dir)
        })
        .collect()
}

/// Downloads and unpacks one.
fn fetch(apt: &Apt, arch: Arch, series: &str, cache: &Path) -> Result<()> {
    let names = apt.names("linux-")?;
    let packages = packages(series, &flavour(arch), &names);
    if packages.is_empty() {
        bail!(
            "Debian's lists have no package of Linux {series} for {}",
            arch.debian()
        );
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
/// kernel and its modules apart, as newer ones come. Debian's archive may have one of the
/// two earlier than the other.
fn packages(series: &str, flavour: &str, names: &[String]) -> Vec<String> {
    let versions = |kind_of: &str| -> BTreeMap<Vec<u32>, String> {
        let start = format!("linux-{kind_of}-{series}.");
        let version = |name: &String| {
            let version = name.strip_prefix(&start)?.strip_suffix(flavour)?;
            Some((numbers(version), name.clone()))
        };
        names.iter().filter_map(version).collect()
    };
    let mut modules = versions("modules");
    let mut newest_first = versions("binary").into_iter().rev();
    let both =
        newest_first.find_map(|(version, binary)| Some(vec![binary, modules.remove(&version)?]));
    both.unwrap_or_else(|| {
        versions("image")
            .into_values()
            .next_back()
            .into_iter()
            .collect()
    })
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
            "linux-modules-7.2.13+deb13-cloud-amd64",
        ]
        .map(str::to_owned)
        .into();
        let packages = |series, names: &[String]| packages(series, &flavour(Arch::X86_64), names);
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
