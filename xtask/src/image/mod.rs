//! `cargo xtask image`: the container image, without a container engine.
//!
//! The same input gives the same bytes: files have no times, owners are numbers, and
//! their order is fixed. `deploy/image/Dockerfile` takes the files from here, too
//! (`--root`), so that there is one list of what the image contains.

mod files;
mod licences;
mod oci;

use std::path::PathBuf;

use anyhow::{Context as _, Result};

use self::files::{Content, File};
use crate::{
    exec::Step,
    paths, say,
    setup::{self, Use},
};

/// What runs in the image: the agent, and the plugin that it installs on the node.
const BINARIES: [&str; 2] = ["shunt", "shunt-cni"];

/// What `cargo xtask image` takes.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Where the OCI archive goes [default: target/image/shunt-VERSION.tar]
    #[arg(long, value_name = "FILE", conflicts_with = "root")]
    output: Option<PathBuf>,
    /// The name that the archive gives the image
    #[arg(long, value_name = "NAME", default_value = concat!("localhost/shunt:", env!("CARGO_PKG_VERSION")))]
    name: String,
    /// Write the files of the image into this directory instead, for an engine to copy
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
}

pub(crate) fn command(arguments: &Arguments) -> Result<()> {
    setup::ensure(&[Use::Build])?;
    let target = target()?;
    build(&target)?;
    let files = files(&target)?;
    if let Some(root) = &arguments.root {
        files::write(root, &files)?;
        say(format!("written: {}", root.display()));
        return Ok(());
    }
    let output = arguments.output.clone().unwrap_or_else(|| {
        let name = format!("shunt-{}.tar", env!("CARGO_PKG_VERSION"));
        paths::target().join("image").join(name)
    });
    let image = oci::Image::new(&files, &arguments.name)?;
    image.write(&output)?;
    say(format!(
        "written: {}\n  name    {}\n  digest  {}\n  size    {} kB compressed",
        output.display(),
        arguments.name,
        image.digest(),
        image.size() / 1000
    ));
    Ok(())
}

/// The image for the tests on a real node: where its archive is.
pub(crate) fn for_tests() -> Result<PathBuf> {
    let output = paths::target().join("image/tests.tar");
    command(&Arguments {
        output: Some(output.clone()),
        name: "localhost/shunt:tests".to_owned(),
        root: None,
    })?;
    Ok(output)
}

/// The target with glibc: the toolchain has it already, and the plugin has to run on
/// nodes with any libc or none.
fn target() -> Result<String> {
    let about = Step::new("rustc", "asking the compiler for its target")
        .arg("-vV")
        .output()?;
    let host = about.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc -vV names no host")?.to_owned())
}

/// Builds the binaries without a dynamic loader: the image has no libc, and the node
/// that the plugin is copied to may have another one.
fn build(target: &str) -> Result<()> {
    let root = paths::root();
    let home = std::env::home_dir().unwrap_or_default();
    // Neither where this was built nor by whom shows in the binaries.
    let flags = [
        "-Ctarget-feature=+crt-static".to_owned(),
        "-Cstrip=symbols".to_owned(),
        format!("--remap-path-prefix={}=/home", home.display()),
        format!("--remap-path-prefix={}=/shunt", root.display()),
    ];
    let mut step = Step::new("cargo", "building the image's binaries")
        // Flags for a named target do not reach build scripts, which must be dynamic.
        .args(["build", "--release", "--locked", "--package", "shunt", "--target", target])
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
        .dir(&root)
        .remedy("Read the compiler's first error; where it speaks of static libraries, install libc6-dev (Debian) or glibc-static (Fedora).");
    for binary in BINARIES {
        step = step.args(["--bin", binary]);
    }
    step.run()
}

/// Everything in the image.
fn files(target: &str) -> Result<Vec<File>> {
    let built = paths::target().join(target).join("release");
    let root = paths::root();
    let mut files = Vec::new();
    for binary in BINARIES {
        files.push(File::copy(binary, &built.join(binary), 0o755)?);
    }
    for (name, source) in [
        ("LICENSE", "LICENSE"),
        ("ebpf/LICENSE-GPL-2.0", "ebpf/LICENSE-GPL-2.0"),
        ("ebpf/LICENSE-MIT", "ebpf/LICENSE-MIT"),
    ] {
        let name = format!("licences/shunt/{name}");
        files.push(File::copy(&name, &root.join(source), 0o644)?);
    }
    files.extend(licences::of_dependencies(target)?);
    files.push(File::new("run", Content::Directory, 0o755));
    // Runtimes name network namespaces by the old path.
    files.push(File::new("var/run", Content::Link("../run".into()), 0o777));
    files::with_directories(files)
}
