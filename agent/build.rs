//! Builds the BPF objects that the agent embeds, with the toolchain that
//! `cargo xtask setup` found.

use std::{env, process::Command};

use anyhow::{Context as _, Result};
use aya_build::{Package, Toolchain, build_ebpf};
// A build dependency for cargo's sake only: it rebuilds when the programs change.
use shunt_programs as _;

/// The toolchain that `cargo xtask setup` links where no nightly has rust-src.
const LINKED: &str = "shunt-bpf";

fn main() -> Result<()> {
    println!("cargo:rerun-if-env-changed=SHUNT_BPF_TOOLCHAIN");
    println!("cargo:rerun-if-changed=../ebpf/abi");
    println!("cargo:rerun-if-changed=../ebpf/decide");
    let toolchain = toolchain();
    // SAFETY: a build script has one thread at this point.
    unsafe {
        // aya-build shows whatever cargo prints as a warning.
        env::set_var("CARGO_TERM_QUIET", "true");
        // A stable compiler builds the core library for the target only so; to a
        // nightly it makes no difference.
        env::set_var("RUSTC_BOOTSTRAP", "1");
    }
    let programs = Package {
        name: "shunt-programs",
        root_dir: "../ebpf/programs",
        features: if cfg!(feature = "other-layout") {
            &["other-layout"]
        } else {
            &[]
        },
        ..Package::default()
    };
    build_ebpf([programs], Toolchain::Custom(&toolchain))
        .context("cannot build the BPF programs; `cargo xtask setup` installs what they need")
}

fn toolchain() -> String {
    if let Some(named) = env::var("SHUNT_BPF_TOOLCHAIN")
        .ok()
        .filter(|name| !name.is_empty())
    {
        return named;
    }
    let installed = Command::new("rustup").args(["toolchain", "list"]).output();
    let linked = installed.is_ok_and(|out| {
        String::from_utf8_lossy(&out.stdout)
            .lines()
            .any(|line| line.split_whitespace().next() == Some(LINKED))
    });
    if linked { LINKED } else { "nightly" }.to_owned()
}
