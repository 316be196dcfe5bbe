//! Where things are: the work tree, the build's results, the cache.

use std::{
    env,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

/// The root of the work tree.
pub(crate) fn root() -> PathBuf {
    let here = env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    here.parent().map(Path::to_path_buf).unwrap_or(here)
}

/// cargo's target directory.
pub(crate) fn target() -> PathBuf {
    let root = root();
    // join() of an absolute path is that path.
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |dir| root.join(dir))
}

/// The release build of the workspace's binary `name`.
pub(crate) fn release(name: &str) -> PathBuf {
    target().join("release").join(name)
}

/// Where downloads are kept, outside the work tree.
pub(crate) fn cache() -> Result<PathBuf> {
    cache_from(
        |name| {
            env::var_os(name)
                .filter(|v| !v.is_empty())
                .map(PathBuf::from)
        },
        is_root(),
    )
}

fn cache_from(var: impl Fn(&str) -> Option<PathBuf>, root: bool) -> Result<PathBuf> {
    if let Some(dir) = var("SHUNT_CACHE") {
        return Ok(dir);
    }
    // Envoy runs from the cache as uid 1337, which may not enter /root.
    if root {
        return Ok(PathBuf::from("/var/cache/shunt"));
    }
    if let Some(dir) = var("XDG_CACHE_HOME") {
        return Ok(dir.join("shunt"));
    }
    let home = var("HOME").context(
        "neither SHUNT_CACHE nor HOME is set: set SHUNT_CACHE to a directory to keep downloads in",
    )?;
    Ok(home.join(".cache/shunt"))
}

/// Whether this process is root.
pub(crate) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Refuses to go on without root. `what` is the task, as it was called.
pub(crate) fn require_root(what: &str, because: &str) -> Result<()> {
    if is_root() {
        return Ok(());
    }
    bail!("{because}; run: sudo -E env PATH=\"$PATH\" cargo xtask {what}")
}

/// Checks that a user who is neither owner nor group of anything can reach
/// `file`; the error names the directory that is in the way.
pub(crate) fn check_reachable(file: &Path) -> Result<()> {
    let file = file
        .canonicalize()
        .with_context(|| format!("looking at {}", file.display()))?;
    for step in file.ancestors() {
        let mode = step
            .metadata()
            .with_context(|| format!("looking at {}", step.display()))?
            .permissions()
            .mode();
        if mode & 0o001 == 0 {
            bail!(
                "the proxy's user (uid 1337) cannot run {}, because {} has mode {:o}; \
                 set SHUNT_CACHE to a directory that every user may enter, for example /var/cache/shunt",
                file.display(),
                step.display(),
                mode & 0o7777,
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn chosen(vars: &[(&str, &str)], root: bool) -> Option<PathBuf> {
        let var = |name: &str| {
            vars.iter()
                .find(|(known, _)| *known == name)
                .map(|(_, value)| PathBuf::from(value))
        };
        cache_from(var, root).ok()
    }

    #[test]
    fn the_cache_is_where_it_was_asked_for() {
        let vars = [
            ("SHUNT_CACHE", "/a"),
            ("XDG_CACHE_HOME", "/b"),
            ("HOME", "/c"),
        ];
        assert_eq!(chosen(&vars, true), Some("/a".into()));
        assert_eq!(chosen(&vars, false), Some("/a".into()));
        assert_eq!(chosen(&vars[1..], false), Some("/b/shunt".into()));
        assert_eq!(chosen(&vars[2..], false), Some("/c/.cache/shunt".into()));
        assert_eq!(chosen(&[], false), None);
    }

    #[test]
    fn root_does_not_use_a_home_that_others_cannot_enter() {
        let vars = [("XDG_CACHE_HOME", "/root/b"), ("HOME", "/root")];
        assert_eq!(chosen(&vars, true), Some("/var/cache/shunt".into()));
    }

    #[test]
    fn a_closed_directory_on_the_way_is_named() {
        let dir = env::temp_dir().join(format!("xtask-reach-{}", std::process::id()));
        let file = dir.join("open/envoy");
        fs::create_dir_all(dir.join("open")).expect("a directory in /tmp");
        fs::write(&file, "").expect("a file in it");
        let mode = |path: &Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("it is mine");
        };
        mode(&file, 0o755);
        mode(&dir.join("open"), 0o755);
        mode(&dir, 0o755);
        let open = check_reachable(&file);
        mode(&dir, 0o700);
        let closed = check_reachable(&file);
        fs::remove_dir_all(&dir).expect("it is mine");
        open.expect("every directory is open");
        let text = closed.expect_err("one is closed").to_string();
        assert!(
            text.contains(&format!("{} has mode 700", dir.display())),
            "{text}"
        );
    }
}
