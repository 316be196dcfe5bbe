//! bpf-linker, which rustc calls to link the BPF programs.

use std::env;

use anyhow::Result;

use crate::exec::{Step, find_program};

/// The version that is installed, and the oldest that is accepted.
const VERSION: &str = "0.13.0";

/// The LLVM of Debian's `llvm-22-dev`, and of rustc 1.95 to 1.97.
const LLVM: u32 = 22;

/// Where Debian has that LLVM.
const LLVM_PREFIX: &str = "/usr/lib/llvm-22";

/// The bpf-linker of this machine.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Linker {
    /// It serves. `None` for LLVM when it is linked in statically, so that its
    /// version cannot be seen.
    Fit { llvm: Option<u32> },
    /// It has to be installed, because …
    Unfit(String),
}

impl Linker {
    /// The newest LLVM whose output it reads, once set up.
    pub(crate) fn llvm(&self) -> u32 {
        match self {
            Self::Fit { llvm: Some(llvm) } => *llvm,
            // Released binaries contain the newest LLVM of their day.
            Self::Fit { llvm: None } => u32::MAX,
            Self::Unfit(_) => LLVM,
        }
    }
}

/// Looks for bpf-linker.
pub(crate) fn look() -> Linker {
    let Some(program) = find_program("bpf-linker") else {
        return Linker::Unfit("it is not there".to_owned());
    };
    let ask = Step::new(&program, "asking bpf-linker for its version").arg("--version");
    let ldd = Step::new("ldd", "asking what bpf-linker is linked with").arg(&program);
    match ask.output() {
        Ok(version) => judge(&version, &ldd.output().unwrap_or_default()),
        Err(_broken) => Linker::Unfit(format!("{} does not run", program.display())),
    }
}

/// From what `bpf-linker --version` and `ldd` say.
fn judge(version: &str, ldd: &str) -> Linker {
    let version = version.trim().trim_start_matches("bpf-linker ");
    if numbers(version) < numbers(VERSION) {
        return Linker::Unfit(format!("version {version} is older than {VERSION}"));
    }
    match linked_llvm(ldd) {
        Some(llvm) if llvm < LLVM => Linker::Unfit(format!(
            "it uses LLVM {llvm}, and the compiler writes LLVM {LLVM}"
        )),
        llvm => Linker::Fit { llvm },
    }
}

fn numbers(version: &str) -> Vec<u32> {
    let digits = |part: &str| {
        part.chars()
            .take_while(char::is_ascii_digit)
            .collect::<String>()
    };
    version
        .split('.')
        .map_while(|part| digits(part).parse().ok())
        .collect()
}

/// The major version in `libLLVM.so.22.1` or `libLLVM-14.so.1`.
fn linked_llvm(ldd: &str) -> Option<u32> {
    ldd.split_whitespace().find_map(|word| {
        let rest = word.strip_prefix("libLLVM")?;
        let rest = rest
            .strip_prefix(".so.")
            .or_else(|| rest.strip_prefix('-'))?;
        rest.split('.').next()?.parse().ok()
    })
}

/// Builds and installs it where cargo installs programs.
pub(crate) fn install() -> Result<()> {
    command()
        // One that cargo did not install, or with another LLVM, is replaced.
        .arg("--force")
        .remedy("If LLVM is not found: LLVM_PREFIX has to be the directory with LLVM's bin/llvm-config.")
        .run()
}

/// The same, for a reader who has to do it.
pub(crate) fn by_hand() -> String {
    format!(
        "LLVM_PREFIX=<where LLVM {LLVM} is, with its development files> cargo install bpf-linker --version {VERSION} \
         --locked --no-default-features --features llvm-{LLVM}"
    )
}

fn command() -> Step {
    // LLVM_PREFIX: bpf-linker's build script does not look at LLVM_SYS_*_PREFIX.
    let prefix = env::var("LLVM_PREFIX").unwrap_or_else(|_unset| LLVM_PREFIX.to_owned());
    Step::new("cargo", "building bpf-linker")
        .args(["install", "bpf-linker", "--version", VERSION, "--locked"])
        .args(["--no-default-features", "--features"])
        .arg(format!("llvm-{LLVM}"))
        .env("LLVM_PREFIX", prefix)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LDD: &str = "\tlinux-vdso.so.1 (0x00007f090e547000)\n\
        \tlibLLVM.so.22.1 => /usr/lib/llvm-22/lib/libLLVM.so.22.1 (0x00007f0905200000)\n";

    #[test]
    fn a_fitting_linker_is_left_alone() {
        assert_eq!(
            judge("bpf-linker 0.13.0\n", LDD),
            Linker::Fit { llvm: Some(22) }
        );
        assert_eq!(
            judge("bpf-linker 0.14.1-rc.1", LDD),
            Linker::Fit { llvm: Some(22) }
        );
    }

    #[test]
    fn an_old_linker_or_an_old_llvm_is_replaced() {
        assert!(
            matches!(judge("bpf-linker 0.9.15", LDD), Linker::Unfit(why) if why.contains("0.9.15"))
        );
        let old = LDD.replace("libLLVM.so.22.1", "libLLVM-19.so.1");
        assert!(
            matches!(judge("bpf-linker 0.13.0", &old), Linker::Unfit(why) if why.contains("LLVM 19"))
        );
        assert!(matches!(judge("", LDD), Linker::Unfit(_)));
    }

    #[test]
    fn a_static_linker_may_read_anything() {
        let linker = judge("bpf-linker 0.13.0", "\tnot a dynamic executable\n");
        assert_eq!(linker, Linker::Fit { llvm: None });
        assert_eq!(linker.llvm(), u32::MAX);
    }

    #[test]
    fn versions_are_compared_as_numbers() {
        assert!(numbers("0.9.15") < numbers("0.13.0"));
        assert!(numbers("0.13.0") < numbers("1.0"));
        assert_eq!(numbers("0.14.1-rc.1"), [0, 14, 1, 1]);
    }
}
