//! One run of a virtual machine: packed, started, and put away.

use std::{
    fs,
    path::{Path, PathBuf},
    process,
    time::Duration,
};

use anyhow::{Context as _, Result};

use super::{
    directory,
    image::{self, Packed},
    kernel::Kernel,
    machine::{End, Machine},
};

/// A VM that has ended. What it wrote to its console is kept, for whoever has to find out
/// what went wrong.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) end: End,
    console: PathBuf,
}

impl Session {
    /// Runs the script `run` in a VM with `kernel` and these files, at most for `limit`;
    /// hands every line that the script writes to its second serial line to `see`. `name`
    /// tells it from others that run at the same time.
    pub(super) fn run(
        name: &str,
        kernel: &Kernel,
        files: &[Packed],
        run: &str,
        limit: Duration,
        see: impl FnMut(&str),
    ) -> Result<Self> {
        let console = directory()?.join(format!("{name}-{}.console", process::id()));
        let end = with_image(name, kernel, files, run, |machine| {
            machine.run(&console, limit, see)
        })?;
        Ok(Self { end, console })
    }

    /// The file with what it wrote to its console.
    pub(super) fn console(&self) -> &Path {
        &self.console
    }

    /// All went well.
    pub(super) fn forget(self) -> Result<()> {
        fs::remove_file(&self.console)
            .with_context(|| format!("removing {}", self.console.display()))
    }
}

/// How the name of an image ends, after the id of the process that made it.
const IMAGE: &str = "cpio";

/// The same of a binary that was made to be packed.
pub(super) const STRIPPED: &str = "tests";

/// Removes what processes have made that were killed.
fn sweep(directory: &Path) -> Result<()> {
    let entries =
        fs::read_dir(directory).with_context(|| format!("listing {}", directory.display()))?;
    let is_made = |file: &PathBuf| {
        let end = file.extension();
        end.is_some_and(|end| end == IMAGE || end == STRIPPED)
    };
    let files = entries.flatten().map(|entry| entry.path());
    for image in files.filter(is_made) {
        let name = image.file_stem().unwrap_or_default().to_string_lossy();
        let maker = name
            .rsplit_once('-')
            .map(|(_, id)| Path::new("/proc").join(id));
        if maker.is_some_and(|maker| !maker.exists()) {
            // Another may be about to do the same.
            let _ = fs::remove_file(&image);
        }
    }
    Ok(())
}

/// Packs the file system of a VM for as long as `work` needs it.
pub(super) fn with_image<T>(
    name: &str,
    kernel: &Kernel,
    files: &[Packed],
    run: &str,
    work: impl FnOnce(&Machine<'_>) -> Result<T>,
) -> Result<T> {
    let directory = directory()?;
    sweep(&directory)?;
    let image = directory.join(format!("{name}-{}.{IMAGE}", process::id()));
    let machine = Machine {
        kernel,
        image: &image,
    };
    let worked = image::write(&image, kernel, files, run).and_then(|()| work(&machine));
    // Hundreds of megabytes, whatever happened.
    let removed = fs::remove_file(&image).with_context(|| format!("removing {}", image.display()));
    let done = worked?;
    removed?;
    Ok(done)
}
