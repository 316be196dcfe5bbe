//! The programs that a VM finds: this machine's, or, for arm64, those of Debian's packages.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use super::{image::Packed, mirror, unpacked};
use crate::{
    apt::Apt,
    arch::Arch,
    exec::{Step, find_program},
    paths, say,
    staging::beside,
};

/// Debian's packages with the programs of a VM. What these need is taken as well.
const PACKAGES: &[&str] = &[
    "bash",
    "bind9-dnsutils",
    "bpftool",
    "busybox-static",
    "conntrack",
    "coreutils",
    "curl",
    "dash",
    "dnsmasq-base",
    "iproute2",
    "iptables",
    "kmod",
    "libc-bin",
    "mount",
    "socat",
    "util-linux",
    "wget",
];

/// A change of the list is another directory.
const GENERATION: &str = "userland-arm64-1";

/// Programs that only the set-up of their package would make, and what it makes them of.
const ALTERNATIVES: [(&str, &str); 6] = [
    ("ip6tables", "ip6tables-nft"),
    ("ip6tables-restore", "ip6tables-nft-restore"),
    ("ip6tables-save", "ip6tables-nft-save"),
    ("iptables", "iptables-nft"),
    ("iptables-restore", "iptables-nft-restore"),
    ("iptables-save", "iptables-nft-save"),
];

/// Where programs are.
const DIRECTORIES: [&str; 2] = ["/usr/bin", "/usr/sbin"];

/// What shows the libraries of a program.
const LOADER: &str = "lib/ld-linux-aarch64.so.1";

/// Where programs and libraries are taken from.
#[derive(Clone, Debug)]
pub(super) enum Userland {
    /// This machine.
    Here,
    /// arm64, unpacked into this directory.
    Unpacked(PathBuf),
}

impl Userland {
    /// The one for `arch`, which is there already.
    pub(super) fn of(arch: Arch) -> Result<Self> {
        Ok(match arch {
            Arch::X86_64 => Self::Here,
            Arch::Aarch64 => Self::Unpacked(paths::cache()?.join(GENERATION)),
        })
    }

    /// Downloads the one for `arch` if it has to be.
    pub(super) fn ready(arch: Arch) -> Result<()> {
        match Self::of(arch)? {
            Self::Unpacked(place) if !place.is_dir() => fetch(arch, &place),
            Self::Here | Self::Unpacked(_) => Ok(()),
        }
    }

    /// A program, as a shell would find it.
    pub(super) fn program(&self, name: &str) -> Result<Packed> {
        let found = match self {
            Self::Here => find_program(name).map(|file| Packed {
                from: file.clone(),
                to: file,
            }),
            Self::Unpacked(_) => DIRECTORIES
                .map(|directory| Path::new(directory).join(name))
                .into_iter()
                .map(|to| self.packed(to))
                .find(|packed| packed.from.is_file()),
        };
        found.with_context(|| match self {
            Self::Here => format!("the program {name} is missing: run `cargo xtask setup`"),
            Self::Unpacked(root) => format!(
                "{} has no program {name}; remove that directory, and it is downloaded again",
                root.display()
            ),
        })
    }

    /// What is `to` in the VM.
    pub(super) fn packed(&self, to: PathBuf) -> Packed {
        let from = match self {
            Self::Here => to.clone(),
            Self::Unpacked(root) => followed(root, &to),
        };
        Packed { from, to }
    }

    /// What shows the libraries of the program that is the first argument of a shell's script,
    /// as `ldd` does.
    pub(super) fn ldd(&self) -> Step {
        let step = Step::new("sh", "looking for libraries").arg("-c");
        match self {
            // ldd fails for a program that needs none.
            Self::Here => step.arg(r#"ldd "$0" || true"#),
            Self::Unpacked(root) => step
                .arg(
                    r#"load() { qemu-aarch64 -L "$ROOT" "$LOADER" "$@"; }
                    if load --verify "$0"; then load --list "$0"; fi"#,
                )
                .env("ROOT", root)
                .env("LOADER", root.join(LOADER)),
        }
    }
}

/// Where `path` is below `root`, also if it is a link to a place below `/` there.
fn followed(root: &Path, path: &Path) -> PathBuf {
    let below = |path: &Path| root.join(path.strip_prefix("/").unwrap_or(path));
    let place = below(path);
    match fs::read_link(&place) {
        Ok(target) if target.is_absolute() => below(&target),
        Ok(_) | Err(_) => place,
    }
}

/// Downloads and unpacks the packages.
fn fetch(arch: Arch, place: &Path) -> Result<()> {
    say(format!(
        "downloading Debian's programs for {}, for the test VM",
        arch.debian()
    ));
    beside(place, |root| fill(arch, root))
}

fn fill(arch: Arch, root: &Path) -> Result<()> {
    let apt = Apt::for_arch(root.join("apt"), arch, &[mirror::programs()?])?;
    apt.update("the package lists of Debian's programs")?;
    unpacked::merge(root, &["bin", "sbin", "lib"])?;
    for package in apt.download_with_all_needed(PACKAGES)? {
        unpacked::unpack(&package, root)?;
    }
    for (name, real) in ALTERNATIVES {
        let link = root.join("usr/sbin").join(name);
        symlink(real, &link).with_context(|| format!("linking {}", link.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_stay_below_the_root() {
        let root = std::env::temp_dir().join(format!("xtask-userland-{}", std::process::id()));
        unpacked::merge(&root, &["bin", "sbin"]).expect("directories in /tmp");
        fs::write(root.join("bin/kmod"), "").expect("a file in it");
        symlink("/bin/kmod", root.join("sbin/modprobe")).expect("a link in it");
        let userland = Userland::Unpacked(root.clone());
        let found = userland.program("modprobe");
        let missing = userland.program("no-such-program");
        fs::remove_dir_all(&root).expect("it is mine");
        let found = found.expect("it is there");
        assert_eq!(found.from, root.join("bin/kmod"));
        assert_eq!(found.to, Path::new("/usr/sbin/modprobe"));
        missing.expect_err("it is not there");
    }
}
