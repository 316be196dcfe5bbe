//! Directories of the cache that are there as a whole or not at all.

use std::{fs, path::Path, process};

use anyhow::{Context as _, Result};

/// Has `work` fill a directory beside `place`, and then moves it there: no half of it is ever
/// found.
pub(crate) fn beside(place: &Path, work: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let name = place.file_name().unwrap_or_default().display();
    let staging = place.with_file_name(format!("partial-{name}-{}", process::id()));
    fresh(&staging)?;
    let done = work(&staging).and_then(|()| match fs::rename(&staging, place) {
        // Another was quicker with the same.
        Err(_) if place.is_dir() => fs::remove_dir_all(&staging).map_err(Into::into),
        done => done.with_context(|| format!("making {}", place.display())),
    });
    if done.is_err() {
        // The error of the download is the one to report.
        let _ = fs::remove_dir_all(&staging);
    }
    done
}

/// Makes a directory with nothing in it: a process that had the same number may have been killed
/// before it removed its own.
pub(crate) fn fresh(staging: &Path) -> Result<()> {
    if staging.exists() {
        fs::remove_dir_all(staging).with_context(|| format!("removing {}", staging.display()))?;
    }
    fs::create_dir_all(staging).with_context(|| format!("making {}", staging.display()))
}
