//! `cargo xtask vm`: a VM to play with.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{self, ExitCode},
};

use anyhow::{Context as _, Result, bail};

use super::{
    directory,
    image::{self, Packed},
    kernel::{self, KERNELS},
    machine::Machine,
    packed,
};
use crate::{
    build,
    exec::Step,
    paths, say,
    setup::{self, Use},
};

/// What `cargo xtask vm` takes.
#[derive(clap::Args, Debug)]
pub(crate) struct Arguments {
    /// The kernel: 6.1, 6.12, 6.18 or 7.2
    #[arg(long, value_name = "SERIES", default_value = "6.12", value_parser = KERNELS)]
    kernel: String,
}

/// What the VM does: the pods of the demo, which stay, then a shell.
const RUN: &str = include_str!("dev.sh");

/// Where the work tree is in the VM.
const WORK_TREE: &str = "/work";

pub(crate) fn command(arguments: &Arguments) -> Result<ExitCode> {
    paths::require_root(
        "vm",
        "the VM needs root because what is packed into it may be readable by root alone",
    )?;
    setup::ensure(&[Use::Build, Use::Tests, Use::Vm])?;
    build::release(&[
        "--package",
        "shunt",
        "--package",
        "shunt-tests",
        "--bin",
        "shunt",
        "--bin",
        "demo",
    ])?;
    let mut files = vec![
        packed(paths::release("shunt"), image::AGENT),
        packed(paths::release("demo"), "/usr/local/bin/demo"),
        packed(setup::envoy()?, image::ENVOY),
    ];
    files.extend(work_tree()?);
    let kernels = kernel::ready(&[&arguments.kernel])?;
    let kernel = kernels.first().context("there is one")?;
    say(format!(
        "Linux {}: the shell comes when the pods are there; `exit` or Ctrl-A X ends the VM",
        kernel.release()
    ));
    let image = directory()?.join(format!("dev-{}.cpio", process::id()));
    image::write(&image, kernel, &files, RUN)?;
    let machine = Machine {
        kernel,
        image: &image,
    };
    // Ctrl-C is for the shell in there.
    let ended = machine.command("mon:stdio").status();
    fs::remove_file(&image).with_context(|| format!("removing {}", image.display()))?;
    let status = ended.context("cannot start QEMU")?;
    if !status.success() {
        bail!("QEMU failed: {status}");
    }
    Ok(ExitCode::SUCCESS)
}

/// The files that git knows.
fn work_tree() -> Result<Vec<Packed>> {
    let root = paths::root();
    let names = Step::new("git", "listing the work tree")
        .args([
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ])
        .dir(&root)
        .output()?;
    let files = names
        .split_terminator('\0')
        .map(|name| Packed {
            from: root.join(name),
            to: Path::new(WORK_TREE).join(name),
        })
        // One may be deleted that git still lists.
        .filter(|file| PathBuf::from(&file.from).is_file());
    Ok(files.collect())
}
