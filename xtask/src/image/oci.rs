//! An image with one layer, as an archive in the layout of the Open Container Initiative:
//! `oci-layout`, `index.json`, and blobs that are named by their digests.

use std::{fs, io::Write as _, path::Path};

use anyhow::{Context as _, Result};
use flate2::{Compression, GzBuilder};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

use super::files::{Content, File};

/// No time is when it was built.
const CREATED: &str = "1970-01-01T00:00:00Z";

/// An image, ready to be written.
#[derive(Debug)]
pub(crate) struct Image {
    layer: Blob,
    config: Blob,
    manifest: Blob,
    name: String,
}

/// Bytes with their digest and their type.
#[derive(Debug)]
struct Blob {
    bytes: Vec<u8>,
    digest: String,
    media_type: &'static str,
}

impl Blob {
    fn new(media_type: &'static str, bytes: Vec<u8>) -> Self {
        let digest = digest(&bytes);
        Self {
            bytes,
            digest,
            media_type,
        }
    }

    fn json(media_type: &'static str, value: &Value) -> Self {
        Self::new(media_type, value.to_string().into_bytes())
    }

    /// How other parts refer to it.
    fn descriptor(&self) -> Value {
        json!({"mediaType": self.media_type, "digest": self.digest, "size": self.bytes.len()})
    }

    /// Where it is in the archive.
    fn path(&self) -> String {
        format!("blobs/{}", self.digest.replace(':', "/"))
    }
}

impl Image {
    /// From the files, in their order; `name` is `REPOSITORY:TAG`.
    pub(crate) fn new(files: &[File], name: &str) -> Result<Self> {
        let layer = tar_of(files)?;
        let config = Blob::json(
            "application/vnd.oci.image.config.v1+json",
            &config(&digest(&layer))?,
        );
        let layer = Blob::new(
            "application/vnd.oci.image.layer.v1.tar+gzip",
            compressed(&layer)?,
        );
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": media_type,
            "config": config.descriptor(),
            "layers": [layer.descriptor()],
        });
        Ok(Self {
            manifest: Blob::json(media_type, &manifest),
            layer,
            config,
            name: name.to_owned(),
        })
    }

    /// By which a registry knows it.
    pub(crate) fn digest(&self) -> &str {
        &self.manifest.digest
    }

    /// What has to be downloaded, in bytes.
    pub(crate) fn size(&self) -> usize {
        self.layer.bytes.len() + self.config.bytes.len() + self.manifest.bytes.len()
    }

    /// Writes the archive, and the directories above it.
    pub(crate) fn write(&self, output: &Path) -> Result<()> {
        if let Some(dir) = output.parent() {
            fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
        }
        fs::write(output, self.archive()?).with_context(|| format!("writing {}", output.display()))
    }

    fn archive(&self) -> Result<Vec<u8>> {
        let mut tar = Builder::new(Vec::new());
        let layout = json!({"imageLayoutVersion": "1.0.0"}).to_string();
        append_file(&mut tar, "oci-layout", layout.as_bytes(), 0o644)?;
        append_file(
            &mut tar,
            "index.json",
            self.index().to_string().as_bytes(),
            0o644,
        )?;
        for dir in ["blobs", "blobs/sha256"] {
            append(&mut tar, dir, EntryType::Directory, 0o755)?;
        }
        for blob in [&self.config, &self.layer, &self.manifest] {
            append_file(&mut tar, &blob.path(), &blob.bytes, 0o644)?;
        }
        tar.into_inner().context("closing the archive")
    }

    fn index(&self) -> Value {
        let mut manifest = self.manifest.descriptor();
        let tag = self.name.rsplit_once(':').map_or("latest", |(_, tag)| tag);
        manifest["annotations"] = json!({
            // The first is the standard's, the second what containerd goes by.
            "org.opencontainers.image.ref.name": tag,
            "io.containerd.image.name": self.name,
        });
        json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [manifest],
        })
    }
}

fn digest(bytes: &[u8]) -> String {
    let hex = Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect::<String>();
    format!("sha256:{hex}")
}

/// How the image is run, and what it is. `layer` is the digest before compression.
fn config(layer: &str) -> Result<Value> {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => anyhow::bail!("no name is known for the architecture {other} in images"),
    };
    let version = env!("CARGO_PKG_VERSION");
    Ok(json!({
        "created": CREATED,
        "architecture": architecture,
        "os": "linux",
        "config": {
            "Entrypoint": ["/shunt"],
            "Cmd": ["--help"],
            "Env": ["PATH=/"],
            "WorkingDir": "/",
            "Labels": {
                "org.opencontainers.image.title": "shunt",
                "org.opencontainers.image.description": "redirects connections of mesh pods to their sidecars with eBPF",
                "org.opencontainers.image.version": version,
                "org.opencontainers.image.licenses": "Apache-2.0 AND (MIT OR GPL-2.0-only)",
            },
        },
        "rootfs": {"type": "layers", "diff_ids": [layer]},
        "history": [{"created": CREATED, "created_by": "cargo xtask image"}],
    }))
}

fn tar_of(files: &[File]) -> Result<Vec<u8>> {
    let mut tar = Builder::new(Vec::new());
    for file in files {
        let path = file.path.to_string_lossy();
        match &file.content {
            Content::Directory => append(&mut tar, &path, EntryType::Directory, file.mode)?,
            Content::Bytes(bytes) => append_file(&mut tar, &path, bytes, file.mode)?,
            Content::Link(to) => {
                let mut header = header(EntryType::Symlink, 0, file.mode);
                tar.append_link(&mut header, path.as_ref(), to)
                    .with_context(|| format!("adding the link {path}"))?;
            }
        }
    }
    tar.into_inner().context("closing the layer")
}

fn append(tar: &mut Builder<Vec<u8>>, path: &str, kind: EntryType, mode: u32) -> Result<()> {
    tar.append_data(&mut header(kind, 0, mode), path, std::io::empty())
        .with_context(|| format!("adding {path}"))
}

fn append_file(tar: &mut Builder<Vec<u8>>, path: &str, bytes: &[u8], mode: u32) -> Result<()> {
    let size = u64::try_from(bytes.len())?;
    tar.append_data(&mut header(EntryType::Regular, size, mode), path, bytes)
        .with_context(|| format!("adding {path}"))
}

/// An entry of root's, with no time.
fn header(kind: EntryType, size: u64, mode: u32) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

fn compressed(bytes: &[u8]) -> Result<Vec<u8>> {
    // Its header has no name and no time unless they are given.
    let mut encoder = GzBuilder::new().write(Vec::new(), Compression::best());
    encoder.write_all(bytes).context("compressing the layer")?;
    encoder.finish().context("compressing the layer")
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    fn files() -> Vec<File> {
        let program = File::new("program", Content::Bytes(b"#!".to_vec()), 0o755);
        let link = File::new("var/run", Content::Link("../run".into()), 0o777);
        super::super::files::with_directories(vec![program, link]).expect("no two are one")
    }

    fn image() -> Image {
        Image::new(&files(), "registry.example:5000/shunt:1").expect("it can be made")
    }

    /// The entries of an archive: path → content.
    fn entries(archive: &[u8]) -> Vec<(String, Vec<u8>)> {
        let mut archive = tar::Archive::new(archive);
        let entries = archive.entries().expect("it is an archive");
        entries
            .map(|entry| {
                let mut entry = entry.expect("it is whole");
                assert_eq!(entry.header().mtime().expect("a number"), 0);
                let path = entry.path().expect("a path").display().to_string();
                let mut bytes = Vec::new();
                entry.read_to_end(&mut bytes).expect("it is whole");
                (path, bytes)
            })
            .collect()
    }

    #[test]
    fn the_same_files_are_the_same_bytes() {
        let archive = || image().archive().expect("it can be written");
        assert!(archive() == archive());
    }

    #[test]
    fn everything_is_found_by_its_digest() {
        let archive = entries(&image().archive().expect("it can be written"));
        let content = |path: &str| {
            let found = archive.iter().find(|(name, _)| name == path);
            found
                .unwrap_or_else(|| panic!("there is no {path}"))
                .1
                .clone()
        };
        let json = |bytes: Vec<u8>| serde_json::from_slice::<Value>(&bytes).expect("it is JSON");
        let blob = |descriptor: &Value| {
            let name = descriptor["digest"].as_str().expect("a digest");
            let bytes = content(&format!("blobs/{}", name.replace(':', "/")));
            assert_eq!(digest(&bytes), name);
            assert_eq!(descriptor["size"], bytes.len());
            bytes
        };
        let index = json(content("index.json"));
        assert_eq!(
            index["manifests"][0]["annotations"]["org.opencontainers.image.ref.name"],
            "1"
        );
        let manifest = json(blob(&index["manifests"][0]));
        let config = json(blob(&manifest["config"]));
        let mut layer = Vec::new();
        flate2::read::GzDecoder::new(blob(&manifest["layers"][0]).as_slice())
            .read_to_end(&mut layer)
            .expect("it is compressed");
        assert_eq!(config["rootfs"]["diff_ids"][0], digest(&layer));
        let paths: Vec<_> = entries(&layer).into_iter().map(|(path, _)| path).collect();
        assert_eq!(paths, ["program", "var", "var/run"]);
    }

    #[test]
    fn the_digest_is_that_of_the_standard() {
        assert_eq!(
            digest(b""),
            "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
    }
}
