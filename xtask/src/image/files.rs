//! The files of the image, as a list in a fixed order.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

/// One entry of the image's file system, owned by root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct File {
    /// Below the root, without a slash in front.
    pub(crate) path: PathBuf,
    pub(crate) content: Content,
    pub(crate) mode: u32,
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    Directory,
    Bytes(Vec<u8>),
    /// A symbolic link, to this.
    Link(PathBuf),
}

impl File {
    pub(crate) fn new(path: impl Into<PathBuf>, content: Content, mode: u32) -> Self {
        Self {
            path: path.into(),
            content,
            mode,
        }
    }

    /// A copy of a file of this machine.
    pub(crate) fn copy(path: &str, from: &Path, mode: u32) -> Result<Self> {
        let bytes = fs::read(from).with_context(|| format!("reading {}", from.display()))?;
        Ok(Self::new(path, Content::Bytes(bytes), mode))
    }
}

/// `files` in the order of their paths, with the directories above them; an error when
/// two are at one place.
pub(crate) fn with_directories(files: Vec<File>) -> Result<Vec<File>> {
    let mut all = BTreeMap::new();
    for file in files {
        for above in file.path.ancestors().skip(1) {
            if !above.as_os_str().is_empty() {
                let directory = File::new(above, Content::Directory, 0o755);
                all.entry(above.to_owned()).or_insert(directory);
            }
        }
        let shown = file.path.display().to_string();
        let before = all.insert(file.path.clone(), file);
        if before.is_some_and(|file| file.content != Content::Directory) {
            bail!("two files of the image have the path {shown}");
        }
    }
    Ok(all.into_values().collect())
}

/// Writes them below `root`, which is made and has to be empty.
pub(crate) fn write(root: &Path, files: &[File]) -> Result<()> {
    fs::create_dir_all(root).with_context(|| format!("making {}", root.display()))?;
    if fs::read_dir(root)?.next().is_some() {
        bail!("{} is not empty; name another directory", root.display());
    }
    for file in files {
        let place = root.join(&file.path);
        let written = match &file.content {
            Content::Directory => fs::create_dir(&place),
            Content::Bytes(bytes) => fs::write(&place, bytes),
            Content::Link(to) => symlink(to, &place),
        };
        written.with_context(|| format!("writing {}", place.display()))?;
        if !matches!(file.content, Content::Link(_)) {
            fs::set_permissions(&place, fs::Permissions::from_mode(file.mode))
                .with_context(|| format!("setting the mode of {}", place.display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str) -> File {
        File::new(path, Content::Bytes(path.into()), 0o644)
    }

    #[test]
    fn directories_come_before_what_is_in_them() {
        let files = with_directories(vec![file("b/c/d"), file("a")]).expect("no two are one");
        let paths: Vec<_> = files
            .iter()
            .map(|file| file.path.display().to_string())
            .collect();
        assert_eq!(paths, ["a", "b", "b/c", "b/c/d"]);
        assert_eq!(files[1].content, Content::Directory);
    }

    #[test]
    fn two_files_at_one_place_are_an_error() {
        let error = with_directories(vec![file("a/b"), file("a/b")]).expect_err("they are");
        assert!(error.to_string().contains("a/b"), "{error}");
    }

    #[test]
    fn they_are_written_with_their_modes() {
        let root = std::env::temp_dir().join(format!("xtask-image-{}", std::process::id()));
        let link = File::new("var/run", Content::Link("../run".into()), 0o777);
        let program = File::new("program", Content::Bytes(b"x".to_vec()), 0o755);
        let files = with_directories(vec![link, program]).expect("no two are one");
        let written = write(&root, &files);
        let mode = fs::metadata(root.join("program")).map(|found| found.permissions().mode());
        let target = fs::read_link(root.join("var/run"));
        let again = write(&root, &files);
        fs::remove_dir_all(&root).expect("it is mine");
        written.expect("/tmp can be written");
        assert_eq!(mode.expect("it was written") & 0o777, 0o755);
        assert_eq!(target.expect("it was written"), Path::new("../run"));
        assert!(
            again
                .expect_err("it is full now")
                .to_string()
                .contains("is not empty")
        );
    }
}
