//! QEMU: this machine's, or where that is too old or missing the one of Debian's backports,
//! which is not installed but kept in the cache.
//!
//! 7.2, which Debian 12 has, is wrong at times: kernels that use cmpxchg16b died of a double
//! fault, with garbage in the processor's flags. Most likely that is what was repaired in 9:
//! an instruction that changes memory and meets a fault there left garbage in them.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{self, Command},
};

use anyhow::{Context as _, Result, ensure};

use super::{mirror, unpacked};
use crate::{apt::Apt, arch::Arch, exec::Step, paths, say};

/// The oldest version that is taken for right: the one that was tried.
const RIGHT: u32 = 10;

/// Where its firmware is, and where libraries are, below its files.
const FIRMWARE: [&str; 2] = ["usr/share/qemu", "usr/share/seabios"];
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";

/// QEMU for one kind of machine.
struct Emulator {
    program: &'static str,
    /// Debian's packages with it and its firmware. They are taken from backports, and what
    /// they need from wherever it is.
    packages: &'static [&'static str],
    /// Where it is in the cache. A change of the packages is another directory.
    place: &'static str,
}

const PC: Emulator = Emulator {
    program: "qemu-system-x86_64",
    packages: &[
        "qemu-system-common",
        "qemu-system-data",
        "qemu-system-x86",
        "seabios",
    ],
    place: "qemu-amd64-2",
};

const ARM: Emulator = Emulator {
    program: "qemu-system-aarch64",
    packages: &["qemu-system-arm", "qemu-system-common", "qemu-system-data"],
    place: "qemu-arm64-1",
};

/// Downloads one where this machine has none, or one that is too old.
pub(super) fn ready(arch: Arch) -> Result<()> {
    let emulator = Emulator::of(arch);
    if emulator.is_installed() {
        return Ok(());
    }
    let place = emulator.place()?;
    if !place.is_dir() {
        emulator.fetch(&place)?;
    }
    unpacked::check(&place)?;
    let version = version(&text_of(emulator.unpacked()?)?)?;
    ensure!(
        version >= RIGHT,
        "the QEMU in {} is version {version}, and {RIGHT} is needed; remove that directory, and \
         it is downloaded again",
        place.display()
    );
    Ok(())
}

/// The command that starts it, without what the VM is to be. It ends with the thread that
/// starts it: one that outlived a killed xtask would go on for hours, unseen.
pub(super) fn command(arch: Arch) -> Result<Command> {
    let emulator = Emulator::of(arch);
    let qemu = match emulator.is_installed() {
        true => Command::new(emulator.program),
        false => emulator.unpacked()?,
    };
    let set = qemu.get_envs();
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "--"])
        .arg(qemu.get_program())
        .args(qemu.get_args())
        .envs(set.filter_map(|(name, value)| Some((name, value?))));
    Ok(command)
}

impl Emulator {
    const fn of(arch: Arch) -> &'static Self {
        match arch {
            Arch::X86_64 => &PC,
            Arch::Aarch64 => &ARM,
        }
    }

    /// Whether this machine has one that is right.
    fn is_installed(&self) -> bool {
        let said = Step::new(self.program, "asking QEMU for its version")
            .arg("--version")
            .output();
        said.and_then(|said| version(&said))
            .is_ok_and(|version| version >= RIGHT)
    }

    fn place(&self) -> Result<PathBuf> {
        Ok(paths::cache()?.join(self.place))
    }

    fn fetch(&self, place: &Path) -> Result<()> {
        let cache = place.parent().context("it is in the cache")?;
        fs::create_dir_all(cache).with_context(|| format!("making {}", cache.display()))?;
        say("downloading QEMU for the test VM");
        let apt = Apt::new(
            cache.join(format!("apt-qemu-{}", process::id())),
            &[mirror::emulator()?],
        )?;
        apt.update("the package lists of Debian's backports")?;
        let newer = |package| format!("{package}/{}", mirror::BACKPORTS);
        let packages: Vec<String> = self.packages.iter().map(newer).collect();
        unpacked::fetch_with_all_needed(&apt, &packages, place)
    }

    /// The one in the cache.
    fn unpacked(&self) -> Result<Command> {
        let root = unpacked::root(&self.place()?);
        let mut command = Command::new(root.join("usr/bin").join(self.program));
        command.env("LD_LIBRARY_PATH", root.join(LIBRARIES));
        for firmware in FIRMWARE {
            command.arg("-L").arg(root.join(firmware));
        }
        Ok(command)
    }
}

fn text_of(mut command: Command) -> Result<String> {
    let output = command
        .arg("--version")
        .output()
        .context("cannot start QEMU")?;
    ensure!(
        output.status.success(),
        "QEMU does not start: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The first number of its version.
fn version(said: &str) -> Result<u32> {
    let version = said
        .split_once("version ")
        .and_then(|(_, version)| version.split('.').next()?.parse().ok());
    version.with_context(|| format!("QEMU does not tell its version: {said}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_read() {
        let read = |said| version(said).ok();
        let debian = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright";
        assert_eq!(read(debian), Some(7));
        assert_eq!(read("QEMU emulator version 10.0.2\n"), Some(10));
        assert_eq!(read("something else"), None);
    }
}
