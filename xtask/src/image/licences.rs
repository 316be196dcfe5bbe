//! The licences of what is linked into the binaries: most ask to be handed on with them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::files::{Content, File};
use crate::{exec::Step, paths};

/// The packages whose code is in the image: the agent, with the programs inside.
const ROOTS: [&str; 2] = ["shunt", "shunt-programs"];

/// What licences are called, at the start of a file's name, in capitals.
const NAMES: [&str; 5] = ["LICENSE", "LICENCE", "COPYING", "NOTICE", "COPYRIGHT"];

/// The licences of all dependencies, as `licences/NAME-VERSION/FILE`, and a list of them.
pub(crate) fn of_dependencies(target: &str) -> Result<Vec<File>> {
    let text = Step::new("cargo", "asking cargo for the dependencies")
        .args([
            "metadata",
            "--format-version",
            "1",
            "--locked",
            "--filter-platform",
            target,
        ])
        .dir(&paths::root())
        .output()?;
    let metadata: Value = serde_json::from_str(&text).context("reading what cargo said")?;
    let mut files = Vec::new();
    let mut list = String::new();
    for package in linked(&metadata, &ROOTS)? {
        list.push_str(&format!(
            "{} {}: {}\n",
            package.name, package.version, package.licence
        ));
        let dir = format!("licences/{}-{}", package.name, package.version);
        for file in texts(&package.dir)? {
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            files.push(File::copy(&format!("{dir}/{name}"), &file, 0o644)?);
        }
    }
    files.push(File::new(
        "licences/LIST",
        Content::Bytes(list.into()),
        0o644,
    ));
    Ok(files)
}

/// A package from a registry.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Package {
    name: String,
    version: String,
    licence: String,
    dir: PathBuf,
}

/// What `roots` are linked with, by what `cargo metadata` says, without the packages of
/// the workspace itself.
fn linked(metadata: &Value, roots: &[&str]) -> Result<BTreeSet<Package>> {
    let packages: BTreeMap<&str, &Value> = all(metadata, "/packages")?
        .filter_map(|package| Some((package["id"].as_str()?, package)))
        .collect();
    let nodes: BTreeMap<&str, &Value> = all(metadata, "/resolve/nodes")?
        .filter_map(|node| Some((node["id"].as_str()?, node)))
        .collect();
    let is_root = |id: &&str| {
        let name = packages
            .get(id)
            .and_then(|package| package["name"].as_str());
        name.is_some_and(|name| roots.contains(&name))
    };
    let mut seen: BTreeSet<&str> = nodes.keys().copied().filter(is_root).collect();
    let mut next: Vec<&str> = seen.iter().copied().collect();
    while let Some(id) = next.pop() {
        let dependencies = nodes.get(id).and_then(|node| node["deps"].as_array());
        for dependency in dependencies.into_iter().flatten() {
            if let Some(id) = dependency["pkg"].as_str()
                && is_linked(dependency)
                && seen.insert(id)
            {
                next.push(id);
            }
        }
    }
    seen.iter()
        .filter_map(|id| packages.get(id))
        // Those of the workspace have no source.
        .filter(|package| !package["source"].is_null())
        .map(|package| describe(package))
        .collect()
}

/// Whether it is a dependency of the code, not of a build script or the tests.
fn is_linked(dependency: &Value) -> bool {
    let kinds = dependency["dep_kinds"].as_array();
    kinds.is_some_and(|kinds| kinds.iter().any(|kind| kind["kind"].is_null()))
}

fn all<'a>(metadata: &'a Value, place: &str) -> Result<impl Iterator<Item = &'a Value>> {
    let list = metadata.pointer(place).and_then(Value::as_array);
    let list = list.with_context(|| format!("cargo metadata has no {place}"))?;
    Ok(list.iter())
}

fn describe(package: &Value) -> Result<Package> {
    let text = |field: &str| package[field].as_str().unwrap_or("unknown").to_owned();
    let manifest = PathBuf::from(text("manifest_path"));
    Ok(Package {
        name: text("name"),
        version: text("version"),
        licence: text("license"),
        dir: manifest
            .parent()
            .context("a manifest is in a directory")?
            .to_owned(),
    })
}

/// The licences in a package's directory.
fn texts(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))?;
    let is_licence = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let name = name.to_uppercase();
        NAMES.iter().any(|start| name.starts_with(start)) && path.is_file()
    };
    Ok(entries
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .filter(is_licence)
        .collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn package(id: &str, source: Option<&str>) -> Value {
        json!({
            "id": id, "name": id, "version": "1.0.0", "license": "MIT", "source": source,
            "manifest_path": format!("/registry/{id}/Cargo.toml"),
        })
    }

    #[test]
    fn only_what_is_linked_is_listed() {
        let registry = Some("registry");
        let on = |id: &str, kind: Option<&str>| json!({"pkg": id, "dep_kinds": [{"kind": kind}]});
        let metadata = json!({
            "packages": [
                package("shunt", None), package("own", None), package("linked", registry),
                package("deeper", registry), package("builds", registry), package("tests", registry),
            ],
            "resolve": {"nodes": [
                {"id": "shunt", "deps": [on("own", None), on("builds", Some("build")), on("tests", Some("dev"))]},
                {"id": "own", "deps": [on("linked", None)]},
                {"id": "linked", "deps": [on("deeper", None), on("linked", None)]},
                {"id": "deeper", "deps": []},
                {"id": "builds", "deps": []},
                {"id": "tests", "deps": []},
            ]},
        });
        let found = linked(&metadata, &["shunt"]).expect("it is what cargo says");
        let names: Vec<_> = found.iter().map(|package| package.name.as_str()).collect();
        assert_eq!(names, ["deeper", "linked"]);
        assert_eq!(
            found.first().map(|one| one.dir.clone()),
            Some("/registry/deeper".into())
        );
    }

    #[test]
    fn something_else_is_an_error() {
        let error = linked(&json!({}), &["shunt"]).expect_err("nothing is there");
        assert!(error.to_string().contains("/packages"), "{error}");
    }
}
