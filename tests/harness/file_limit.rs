//! The limit of open files, for tests with many connections.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Makes room for at least `files` open files in this process and its children.
///
/// # Panics
///
/// When the kernel refuses; `fs.nr_open` bounds it.
pub fn raise(files: u64) {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a process has this limit");
    if soft < files {
        setrlimit(Resource::RLIMIT_NOFILE, files, hard.max(files)).unwrap_or_else(|error| {
            panic!("cannot allow {files} open files: {error}; raise fs.nr_open")
        });
    }
}
