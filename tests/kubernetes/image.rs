//! Images of containers, put together from programs of this machine.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::json;
use shunt_tests::command::output_of;
use tempfile::TempDir;

/// The image of the tests' own programs, Envoy among them.
pub(crate) const TOOL: &str = "localhost/shunt-tests/tool:1";

/// The root file system of an image, and its name.
pub(crate) struct Image {
    name: String,
    entrypoint: Vec<String>,
    root: TempDir,
}

impl Image {
    /// An empty one, whose containers run `entrypoint` where nothing else is asked
    /// for.
    pub(crate) fn new(name: &str, entrypoint: &[&str]) -> Self {
        Self {
            name: name.to_owned(),
            entrypoint: entrypoint.iter().map(|&word| word.to_owned()).collect(),
            root: tempfile::tempdir().expect("a temporary directory"),
        }
    }

    /// The same with the program `from` at `to`, and the libraries that it asks for
    /// where it looks for them.
    ///
    /// # Panics
    ///
    /// When there is no such program.
    pub(crate) fn with_program(self, from: &Path, to: &str) -> Self {
        self.put(from, to);
        for library in libraries(from) {
            let to = library.to_str().expect("a library's name is ASCII");
            self.put(&library, to);
        }
        self
    }

    /// The same with an empty directory, for mounts.
    pub(crate) fn with_directory(self, path: &str) -> Self {
        fs::create_dir_all(self.place(path)).expect("an own directory");
        self
    }

    /// The same with a symbolic link.
    pub(crate) fn with_link(self, target: &str, path: &str) -> Self {
        let place = self.place(path);
        fs::create_dir_all(place.parent().expect("below the root")).expect("an own directory");
        symlink(target, place).expect("nothing is there");
        self
    }

    /// Writes it as `docker save` does.
    pub(crate) fn archive(&self, to: &Path) -> PathBuf {
        let parts = tempfile::tempdir().expect("a temporary directory");
        let layer = parts.path().join("layer.tar");
        tar(self.root.path(), &layer);
        let sum = output_of(Command::new("sha256sum").arg(&layer));
        let digest = sum.split(' ').next().expect("it begins with the sum");
        let config = json!({
            "architecture": architecture(),
            "os": "linux",
            "config": {"Entrypoint": self.entrypoint},
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{digest}")]},
        });
        let manifest = json!([{
            "Config": "config.json",
            "RepoTags": [self.name],
            "Layers": ["layer.tar"],
        }]);
        for (name, content) in [("config.json", config), ("manifest.json", manifest)] {
            fs::write(parts.path().join(name), content.to_string()).expect("an own directory");
        }
        tar(parts.path(), to);
        to.to_owned()
    }

    fn put(&self, from: &Path, to: &str) {
        let to = self.place(to);
        fs::create_dir_all(to.parent().expect("below the root")).expect("an own directory");
        // Through symbolic links, as the loader goes.
        fs::copy(from, &to)
            .unwrap_or_else(|error| panic!("cannot copy {}: {error}", from.display()));
    }

    fn place(&self, path: &str) -> PathBuf {
        self.root.path().join(path.trim_start_matches('/'))
    }
}

fn tar(directory: &Path, to: &Path) {
    output_of(
        Command::new("tar")
            .args([
                "--owner=0",
                "--group=0",
                "--mode=go+rX",
                "--create",
                "--file",
            ])
            .arg(to)
            .arg("--directory")
            .arg(directory)
            .arg("."),
    );
}

/// The libraries of a program, its loader among them; none of a static one.
fn libraries(program: &Path) -> BTreeSet<PathBuf> {
    let output = Command::new("ldd")
        .arg(program)
        .output()
        .expect("libc-bin is there");
    // Of a static program it says so, and fails.
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(PathBuf::from)
        .collect()
}

/// In Docker's words.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
