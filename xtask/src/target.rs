//! What is built for: this machine, or arm64.

use std::path::{Path, PathBuf};

use crate::{arch::Arch, exec::Step, paths, setup::Toolchain};

/// What the compiler calls arm64 with glibc.
const AARCH64: &str = "aarch64-unknown-linux-gnu";

/// Its linker: Debian's cross compiler.
const LINKER: &str = "aarch64-linux-gnu-gcc";

/// Without a dynamic loader, and at a fixed place: what is built has to run wherever it is
/// copied to.
const STATIC: [&str; 2] = ["-Ctarget-feature=+crt-static", "-Crelocation-model=static"];

/// What something is built for, and with which compiler.
#[derive(Debug)]
pub(crate) enum Target {
    /// This machine, with the workspace's compiler.
    Native,
    /// arm64, with the toolchain that builds the BPF programs. It has the library source, and
    /// so builds the library for arm64, too: no compiled one has to be found that fits.
    Aarch64(Toolchain),
}

impl Target {
    /// For `arch`; `toolchain` is the one of the BPF programs.
    pub(crate) fn new(arch: Arch, toolchain: &Toolchain) -> Self {
        match arch {
            Arch::X86_64 => Self::Native,
            Arch::Aarch64 => Self::Aarch64(toolchain.clone()),
        }
    }

    /// What it is for.
    pub(crate) fn arch(&self) -> Arch {
        match self {
            Self::Native => Arch::X86_64,
            Self::Aarch64(_) => Arch::Aarch64,
        }
    }

    /// `cargo SUBCOMMAND`, for this target.
    pub(crate) fn cargo(&self, subcommand: &str, purpose: &str) -> Step {
        match self {
            Self::Native => Step::new("cargo", purpose).arg(subcommand),
            Self::Aarch64(toolchain) => toolchain
                .cargo(purpose)
                .args([
                    subcommand,
                    "-Zbuild-std=std,panic_unwind,test",
                    "--target",
                    AARCH64,
                ])
                .env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", LINKER)
                .env("CARGO_ENCODED_RUSTFLAGS", STATIC.join("\u{1f}")),
        }
    }

    /// Binutils' `strip`, for its programs.
    pub(crate) fn strip(&self, purpose: &str) -> Step {
        match self {
            Self::Native => Step::new("strip", purpose),
            Self::Aarch64(_) => Step::new("aarch64-linux-gnu-strip", purpose),
        }
    }

    /// A program that was built, where it asks nothing of the kernel that an emulator of
    /// system calls could not give.
    pub(crate) fn program(&self, program: &Path, purpose: &str) -> Step {
        match self {
            Self::Native => Step::new(program, purpose),
            Self::Aarch64(_) => Step::new("qemu-aarch64", purpose).arg(program),
        }
    }

    /// The release build of the workspace's binary `name`.
    pub(crate) fn release(&self, name: &str) -> PathBuf {
        match self {
            Self::Native => paths::release(name),
            Self::Aarch64(_) => paths::target().join(AARCH64).join("release").join(name),
        }
    }

    /// The agent with another layout of maps.
    pub(crate) fn other_agent(&self) -> PathBuf {
        self.release("shunt-other")
    }
}
