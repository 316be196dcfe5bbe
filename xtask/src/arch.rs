//! The processors that shunt is built for and tried on.

use clap::ValueEnum;

/// A kind of processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Arch {
    /// What this machine has: its own compiler builds for it.
    #[value(name = "x86_64")]
    X86_64,
    /// arm64: cross-compiled, and emulated.
    Aarch64,
}

impl Arch {
    /// What Debian calls it.
    pub(crate) fn debian(self) -> &'static str {
        match self {
            Self::X86_64 => "amd64",
            Self::Aarch64 => "arm64",
        }
    }

    /// Where Debian has its libraries, below `/usr/lib`.
    pub(crate) fn multiarch(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64-linux-gnu",
            Self::Aarch64 => "aarch64-linux-gnu",
        }
    }
}
