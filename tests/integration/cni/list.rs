//! The plugin's entry in the node's list of plugins, while others write there.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use shunt::cni::install::{CniDirs, CniFlags, remove};
use shunt_tests::{deadline::wait_until, leftovers::temp_dir};
use tempfile::TempDir;
use tokio::sync::oneshot;

/// What keeps the plugin on a node, in directories of the test's own.
struct Keeper {
    root: TempDir,
    dirs: CniDirs,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Keeper {
    fn start() -> Self {
        let root = temp_dir("cni");
        let place = |name: &str| root.path().join(name);
        let dirs = CniDirs {
            cni_bin_dir: place("bin"),
            cni_conf_dir: place("conf"),
        };
        for dir in [&dirs.cni_bin_dir, &dirs.cni_conf_dir] {
            fs::create_dir(dir).expect("a new directory");
        }
        fs::write(place("plugin"), "the plugin").expect("a new file");
        let flags = CniFlags {
            dirs: dirs.clone(),
            cni_plugin: Some(place("plugin")),
            cni_socket: None,
            kubelet_dir: place("kubelet"),
            no_cni: false,
        };
        let installation = flags.installation(&place("shunt.sock")).expect("UTF-8");
        let (stop, stopped) = oneshot::channel();
        let keep = async move {
            let keeping = tokio::spawn(installation.expect("it is asked for").keep(Arc::default()));
            // The sender's end counts as well.
            let _ = stopped.await;
            keeping.abort();
        };
        let thread = thread::spawn(|| {
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime")
                .block_on(keep);
        });
        Self {
            root,
            dirs,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    fn conf(&self, name: &str) -> PathBuf {
        self.dirs.cni_conf_dir.join(name)
    }

    /// As other software does it: beside, then into place.
    fn write(&self, name: &str, text: &str) {
        let new = self.root.path().join("new");
        fs::write(&new, text).expect("a new file");
        fs::rename(&new, self.conf(name)).expect("the same file system");
    }

    #[track_caller]
    fn wait_for_entry(&self, name: &str, also: &str) {
        wait_until("the entry", || {
            let text = fs::read_to_string(self.conf(name)).unwrap_or_default();
            let is_there = text.contains("shunt-cni") && text.contains(also);
            if is_there { Ok(()) } else { Err(text) }
        });
    }

    fn end(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.end();
    }
}

fn list(kind: &str) -> String {
    format!(
        "{{\"cniVersion\": \"1.0.0\", \"name\": \"n\", \"plugins\": [{{\"type\": \"{kind}\"}}]}}"
    )
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("a directory");
    let name = |entry: std::io::Result<fs::DirEntry>| {
        let name = entry.expect("an entry").file_name();
        name.to_string_lossy().into_owned()
    };
    let mut names: Vec<String> = entries.map(name).collect();
    names.sort();
    names
}

#[test]
fn the_entry_is_put_back_whenever_others_write() {
    let mut keeper = Keeper::start();
    // The network of the node comes later than the agent.
    keeper.write("10-net.conflist", &list("first"));
    keeper.wait_for_entry("10-net.conflist", "first");
    assert_eq!(names(&keeper.dirs.cni_bin_dir), ["shunt-cni"]);
    for kind in ["second", "third"] {
        keeper.write("10-net.conflist", &list(kind));
        keeper.wait_for_entry("10-net.conflist", kind);
    }
    // In place.
    fs::write(keeper.conf("10-net.conflist"), list("fourth")).expect("an own file");
    keeper.wait_for_entry("10-net.conflist", "fourth");
    fs::remove_file(keeper.conf("10-net.conflist")).expect("an own file");
    keeper.write(
        "05-other.conf",
        &list("fifth").replace(
            "\"plugins\": [{\"type\": \"fifth\"}]",
            "\"type\": \"fifth\"",
        ),
    );
    keeper.wait_for_entry("05-other.conflist", "fifth");

    // What is no JSON stays, and what comes after it is right again.
    keeper.write("00-broken.conflist", "{");
    keeper.write("00-broken.conflist", &list("sixth"));
    keeper.wait_for_entry("00-broken.conflist", "sixth");

    keeper.end();
    remove(&keeper.dirs).expect("it can be removed");
    assert_eq!(names(&keeper.dirs.cni_bin_dir), [""; 0]);
    assert_eq!(
        names(&keeper.dirs.cni_conf_dir),
        ["00-broken.conflist", "05-other.conf"]
    );
    let left = fs::read_to_string(keeper.conf("00-broken.conflist")).expect("it is there");
    assert_eq!(left, list("sixth"));
}
