//! What a test VM finds as its file system: programs with the libraries they need, the
//! kernel's modules, the tests. All of it is in memory.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{BufWriter, Read as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use super::{cpio::Archive, kernel::Kernel, machine, userland::Userland};
use crate::arch::Arch;

/// What the tests run as a program, found as a shell finds it. Those of the tests
/// with real programs (nginx, a JVM, …) are left out: they would be a gigabyte.
const PROGRAMS: &[&str] = &[
    "bash",
    "bpftool",
    "conntrack",
    "curl",
    "dig",
    "dnsmasq",
    "getent",
    "id",
    "ip",
    "ip6tables",
    "ip6tables-legacy-restore",
    "ip6tables-restore",
    "ip6tables-save",
    "iptables",
    "iptables-legacy-restore",
    "iptables-restore",
    "iptables-save",
    "modprobe",
    "mount",
    "nsenter",
    "setpriv",
    "sh",
    "socat",
    "ss",
    "tc",
    "umount",
    "unshare",
    "wget",
];

/// A directory of which everything is taken.
const NAMES: &str = "/etc/iproute2";

/// Files of the system that programs read.
const FILES: &[&str] = &[
    "/etc/group",
    "/etc/nsswitch.conf",
    "/etc/passwd",
    "/etc/protocols",
    "/etc/services",
];

/// What programs load by themselves, in the directory of the libraries: another directory,
/// and files.
const EXTENSIONS: &str = "xtables";
const LOADED: [&str; 2] = ["libnss_dns.so.2", "libnss_files.so.2"];

/// What a script writes to this is read here, a line at a time.
pub(super) const RESULTS: &str = "/dev/results";

/// Where the tests expect the agent, in a VM.
pub(super) const AGENT: &str = "/usr/local/bin/shunt";
/// Where they expect the CNI plugin: beside it.
pub(super) const PLUGIN: &str = "/usr/local/bin/shunt-cni";
/// Where they expect the one with another layout of maps.
pub(super) const OTHER_AGENT: &str = "/usr/local/bin/shunt-other";
/// Where they expect Envoy.
pub(super) const ENVOY: &str = "/usr/local/bin/envoy";
/// The integration tests.
pub(super) const TESTS: &str = "/usr/local/bin/integration";

/// How a program that is not a script starts.
const ELF: &[u8] = b"\x7fELF";

/// The first process.
const INIT: &str = include_str!("init.sh");

/// A file to be packed: where it is here, and where it will be.
#[derive(Clone, Debug)]
pub(super) struct Packed {
    pub(super) from: PathBuf,
    pub(super) to: PathBuf,
}

/// Writes the file system of a VM with `kernel` to `image`. `run` is what the VM
/// does, as a script; `files` are packed beside the system's.
pub(super) fn write(image: &Path, kernel: &Kernel, files: &[Packed], run: &str) -> Result<()> {
    let mut tree = Tree::create(image, Userland::of(kernel.arch)?)?;
    tree.system(kernel.arch)?;
    for file in files {
        tree.program(file)?;
    }
    tree.modules(kernel)?;
    tree.text("/init", 0o755, INIT)?;
    tree.text("/vm/run", 0o755, run)?;
    tree.text("/vm/results", 0o644, machine::second_line(kernel.arch))?;
    tree.text("/etc/hosts", 0o644, "127.0.0.1 localhost\n::1 localhost\n")?;
    // Nobody answers there, as without the line; but a pod has one to be found.
    tree.text("/etc/resolv.conf", 0o644, "nameserver 127.0.0.1\n")?;
    tree.finish()
}

/// A file system that is being packed.
struct Tree {
    archive: Archive<BufWriter<File>>,
    /// What is in it.
    packed: BTreeSet<PathBuf>,
    userland: Userland,
}

impl Tree {
    fn create(image: &Path, userland: Userland) -> Result<Self> {
        let mut tree = Self {
            archive: Archive::create(image)?,
            packed: BTreeSet::new(),
            userland,
        };
        // As on Debian since 12.
        for name in ["bin", "sbin", "lib", "lib64"] {
            tree.archive.symlink(name, &format!("usr/{name}"))?;
            tree.directory(&Path::new("/usr").join(name))?;
        }
        for mounted in [
            "/dev",
            "/proc",
            "/run",
            "/sys",
            "/tmp",
            "/root",
            "/vm",
            "/var/lib/misc",
            "/usr/lib/busybox",
        ] {
            tree.directory(Path::new(mounted))?;
        }
        tree.archive.symlink("var/run", "/run")?;
        tree.archive.character_device("dev/console", (5, 1))?;
        tree.archive.character_device("dev/null", (1, 3))?;
        Ok(tree)
    }

    /// Programs and libraries of the userland, and files of this machine, which are the same
    /// everywhere.
    fn system(&mut self, arch: Arch) -> Result<()> {
        let busybox = Packed {
            to: PathBuf::from("/usr/bin/busybox"),
            ..self.userland.program("busybox")?
        };
        self.program(&busybox)?;
        for name in PROGRAMS {
            self.program(&self.userland.program(name)?)?;
        }
        let libraries = Path::new("/usr/lib").join(arch.multiarch());
        let extensions = self.userland.packed(libraries.join(EXTENSIONS));
        self.everything(&extensions.from, &extensions.to)?;
        for name in LOADED {
            let loaded = self.userland.packed(libraries.join(name));
            if loaded.from.is_file() {
                self.file(&loaded.from, &loaded.to)?;
            }
        }
        self.everything(Path::new(NAMES), Path::new(NAMES))?;
        for file in FILES.iter().map(Path::new).filter(|file| file.is_file()) {
            self.file(file, file)?;
        }
        Ok(())
    }

    /// A program, and the libraries that it needs.
    fn program(&mut self, program: &Packed) -> Result<()> {
        self.file(&program.from, &program.to)?;
        for library in libraries(&self.userland, &program.from)? {
            let library = self.userland.packed(library);
            self.file(&library.from, &library.to)?;
        }
        Ok(())
    }

    /// The content of a file, also of one that a link leads to.
    fn file(&mut self, from: &Path, to: &Path) -> Result<()> {
        let to = merged(to);
        if !self.packed.insert(to.clone()) {
            return Ok(());
        }
        let read = || -> std::io::Result<(Vec<u8>, u32)> {
            Ok((fs::read(from)?, fs::metadata(from)?.permissions().mode()))
        };
        let (content, mode) = read().with_context(|| format!("reading {}", from.display()))?;
        self.parents(&to)?;
        self.archive
            .file(&relative(&to), mode & 0o7777, &content)
            .with_context(|| format!("packing {}", from.display()))
    }

    /// Everything below a directory, if there is one.
    fn everything(&mut self, from: &Path, to: &Path) -> Result<()> {
        if !from.is_dir() {
            return Ok(());
        }
        let entries = fs::read_dir(from).with_context(|| format!("listing {}", from.display()))?;
        for entry in entries {
            let entry = entry?;
            let (from, to) = (entry.path(), to.join(entry.file_name()));
            if from.is_dir() {
                self.everything(&from, &to)?;
            } else if from.is_file() {
                self.file(&from, &to)?;
            }
        }
        Ok(())
    }

    /// The modules, as the kernel's package has them: `modprobe` loads what the
    /// kernel asks for, as on any machine.
    fn modules(&mut self, kernel: &Kernel) -> Result<()> {
        let to = Path::new("/usr/lib/modules").join(kernel.release());
        for part in ["net", "lib", "crypto", "drivers/net"] {
            let part = Path::new("kernel").join(part);
            self.everything(&kernel.modules.join(&part), &to.join(&part))?;
        }
        let entries = fs::read_dir(&kernel.modules)?;
        for entry in entries.flatten() {
            let name = entry.file_name();
            if name.to_string_lossy().starts_with("modules.") {
                self.file(&entry.path(), &to.join(name))?;
            }
        }
        Ok(())
    }

    fn text(&mut self, to: &str, mode: u32, content: &str) -> Result<()> {
        let to = Path::new(to);
        self.parents(to)?;
        self.archive
            .file(&relative(to), mode, content.as_bytes())
            .with_context(|| format!("packing {}", to.display()))
    }

    fn parents(&mut self, of: &Path) -> Result<()> {
        match of.parent() {
            Some(parent) => self.directory(parent),
            None => Ok(()),
        }
    }

    /// A directory, after those above it.
    fn directory(&mut self, path: &Path) -> Result<()> {
        if path == Path::new("/") || !self.packed.insert(path.to_owned()) {
            return Ok(());
        }
        self.parents(path)?;
        self.archive
            .directory(&relative(path), 0o755)
            .with_context(|| format!("packing {}", path.display()))
    }

    fn finish(self) -> Result<()> {
        self.archive.finish().context("packing the file system")?;
        Ok(())
    }
}

/// A path where `/bin`, `/sbin` and `/lib` are links into `/usr`.
fn merged(path: &Path) -> PathBuf {
    let mut parts = path.components().skip(1).peekable();
    let first = parts
        .peek()
        .map(|part| part.as_os_str())
        .unwrap_or_default();
    let in_usr = ["bin", "sbin", "lib", "lib64"]
        .iter()
        .any(|name| first == *name);
    let root = if in_usr { "/usr" } else { "/" };
    Path::new(root).join(parts.collect::<PathBuf>())
}

/// A path as an archive has it.
fn relative(path: &Path) -> String {
    path.to_string_lossy().trim_start_matches('/').to_owned()
}

/// The libraries that a program needs, its loader among them; none for a program
/// that is linked statically and for a script.
fn libraries(userland: &Userland, program: &Path) -> Result<Vec<PathBuf>> {
    let mut start = Vec::new();
    File::open(program)
        .and_then(|file| file.take(4).read_to_end(&mut start))
        .with_context(|| format!("reading {}", program.display()))?;
    if start != ELF {
        return Ok(Vec::new());
    }
    let needed = userland.ldd().arg(program).output()?;
    Ok(needed.lines().filter_map(library).collect())
}

/// The library in a line of `ldd`.
fn library(line: &str) -> Option<PathBuf> {
    let words = || line.split_whitespace();
    let path = words().find(|word| word.starts_with('/'))?;
    Some(PathBuf::from(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_go_into_usr() {
        for (path, expected) in [
            ("/bin/sh", "/usr/bin/sh"),
            ("/lib64/ld.so", "/usr/lib64/ld.so"),
            ("/usr/bin/sh", "/usr/bin/sh"),
            ("/etc/hosts", "/etc/hosts"),
            ("/library/x", "/library/x"),
        ] {
            assert_eq!(merged(Path::new(path)), Path::new(expected));
        }
    }

    #[test]
    fn libraries_are_read_from_ldd() {
        let found = |line| library(line);
        assert_eq!(
            found("\tlibm.so.6 => /lib/x/libm.so.6 (0x00007fb82751b000)"),
            Some("/lib/x/libm.so.6".into())
        );
        assert_eq!(
            found("\t/lib64/ld-linux-x86-64.so.2 (0x00007fb82760d000)"),
            Some("/lib64/ld-linux-x86-64.so.2".into())
        );
        assert_eq!(found("\tlinux-vdso.so.1 (0x00007fb82760d000)"), None);
        assert_eq!(found("\tstatically linked"), None);
    }
}
