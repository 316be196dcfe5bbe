//! What the next agent has to know of the enrolled namespaces.

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use shunt_abi::NetnsCookie;

use super::EnrolRequest;
use crate::bpffs::remove_file;

/// Where enrolments are saved unless told otherwise.
pub const DEFAULT_STATE_DIR: &str = "/run/shunt/state";

/// A directory with a file for each enrolled namespace, `COOKIE.json`: the request
/// that enrolled it. A file is replaced in one step, so that whoever reads it finds
/// the former request or the new one.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
}

/// An enrolment that a former agent has saved.
#[derive(Debug)]
pub(super) struct Saved {
    pub(super) cookie: NetnsCookie,
    /// The request, if this agent understands it.
    pub(super) request: Result<EnrolRequest>,
}

impl Store {
    /// Makes the directory, for root only.
    ///
    /// # Errors
    ///
    /// When it cannot be made.
    pub fn open(dir: &Path) -> Result<Self> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .with_context(|| {
                format!(
                    "cannot make the directory {}, in which enrolments are saved; name another \
                     one with --state-dir",
                    dir.display()
                )
            })?;
        Ok(Self {
            dir: dir.to_owned(),
        })
    }

    /// Saves an enrolment, in place of a former one of that namespace.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub(super) fn save(&self, cookie: NetnsCookie, request: &EnrolRequest) -> Result<()> {
        let place = self.place(cookie);
        let aside = place.with_extension("new");
        let text = serde_json::to_vec(request).context("cannot write an enrolment as JSON")?;
        fs::write(&aside, text)
            .and_then(|()| fs::rename(&aside, &place))
            .with_context(|| {
                format!(
                    "cannot save the enrolment at {}, for the next agent; is there room?",
                    place.display()
                )
            })
    }

    /// Removes an enrolment, if it is there.
    ///
    /// # Errors
    ///
    /// When it cannot be removed.
    pub(super) fn remove(&self, cookie: NetnsCookie) -> Result<()> {
        remove_file(&self.place(cookie))
    }

    /// Every enrolment that is saved.
    ///
    /// # Errors
    ///
    /// When the directory cannot be read.
    pub(super) fn load(&self) -> Result<Vec<Saved>> {
        let cookies = cookies(&self.dir)?;
        let saved = cookies.into_iter().map(|cookie| Saved {
            cookie,
            request: read(&self.place(cookie)),
        });
        Ok(saved.collect())
    }

    fn place(&self, cookie: NetnsCookie) -> PathBuf {
        self.dir.join(format!("{cookie}.json"))
    }
}

/// The namespaces whose enrolments are saved in `dir`, as far as they can be read: the
/// paths under which they were enrolled.
pub fn saved_namespaces(dir: &Path) -> Vec<PathBuf> {
    let store = Store {
        dir: dir.to_owned(),
    };
    let saved = store.load().unwrap_or_default();
    let requests = saved.into_iter().filter_map(|saved| saved.request.ok());
    requests.map(|request| request.netns).collect()
}

/// Removes what is saved in `dir`, and the directory with the one above it, if nothing
/// else is in them.
///
/// # Errors
///
/// When a file cannot be removed.
pub fn remove_saved(dir: &Path) -> Result<()> {
    for cookie in cookies(dir)? {
        let place = dir.join(format!("{cookie}.json"));
        remove_file(&place)?;
        remove_file(&place.with_extension("new"))?;
    }
    // Not empty, or not there.
    let _ = fs::remove_dir(dir);
    Ok(())
}

/// The namespaces that have a file in `dir`.
fn cookies(dir: &Path) -> Result<Vec<NetnsCookie>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        found => found.with_context(|| format!("cannot list {}", dir.display()))?,
    };
    let mut cookies = Vec::new();
    for entry in entries {
        let path = entry
            .with_context(|| format!("cannot list {}", dir.display()))?
            .path();
        let stem = path.file_stem().and_then(|stem| stem.to_str());
        let is_whole = path.extension().is_some_and(|end| end == "json");
        if is_whole && let Some(Ok(cookie)) = stem.map(str::parse) {
            cookies.push(cookie);
        }
    }
    cookies.sort_unstable();
    Ok(cookies)
}

fn read(place: &Path) -> Result<EnrolRequest> {
    let text = fs::read(place).with_context(|| format!("cannot read {}", place.display()))?;
    serde_json::from_slice(&text)
        .with_context(|| format!("{} is no enrolment that is understood", place.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::{Inputs, Settings};

    fn request(netns: &str) -> EnrolRequest {
        EnrolRequest {
            netns: netns.into(),
            resolvers: vec![[10, 96, 0, 10].into()],
            settings: Settings::parse(&Inputs::default()).expect("settings"),
            pod: None,
        }
    }

    #[test]
    fn what_was_saved_is_found_and_what_was_removed_is_not() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::open(&dir.path().join("state")).expect("a store");
        for (cookie, netns) in [
            (7, "/run/netns/a"),
            (8, "/run/netns/b"),
            (7, "/run/netns/c"),
        ] {
            store
                .save(cookie, &request(netns))
                .expect("it can be saved");
        }
        store.remove(9).expect("it was never there");
        let found = |saved: Vec<Saved>| -> Vec<_> {
            let each = saved.into_iter();
            each.map(|one| (one.cookie, one.request.expect("a request").netns))
                .collect()
        };
        let saved = found(store.load().expect("it can be read"));
        assert_eq!(
            saved,
            [(7, "/run/netns/c".into()), (8, "/run/netns/b".into())]
        );
        store.remove(7).expect("it can be removed");
        let saved = found(store.load().expect("it can be read"));
        assert_eq!(saved, [(8, "/run/netns/b".into())]);
    }

    #[test]
    fn what_is_not_understood_is_told() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::open(dir.path()).expect("a store");
        fs::write(dir.path().join("12.json"), "{\"netns\":").expect("a file");
        fs::write(dir.path().join("12.new"), "half").expect("a file");
        let saved = store.load().expect("it can be read");
        let [one] = &saved[..] else {
            panic!("not one: {saved:?}");
        };
        assert_eq!(one.cookie, 12);
        assert!(one.request.is_err());
        remove_saved(dir.path()).expect("it can be removed");
        assert!(!dir.path().exists(), "something is left");
    }
}
