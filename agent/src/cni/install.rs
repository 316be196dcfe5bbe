//! The plugin on the node: its binary in the runtime's directory, its entry in the list of
//! plugins that the runtime uses.
//!
//! Other software writes there too, whenever it likes. So every step is looked at anew: what
//! is there, what is missing, and one file replaced at once by `rename`. Between looking and
//! renaming somebody else may write; the kernel has no way to rename on a condition, so the
//! file is compared once more just before.

use std::{
    ffi::{OsStr, OsString},
    fs,
    io::{self, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use futures_util::StreamExt as _;
use inotify::{EventStream, Inotify, WatchMask};

use super::{
    DEFAULT_KUBELET_DIR, TYPE,
    conflist::{entry, listed, with_entry, without_entry},
};
use crate::observe::{Readiness, health::CNI_INSTALLED};

/// Where the runtime of the node has its network plugins.
#[derive(Args, Clone, Debug)]
pub struct CniDirs {
    /// Where the container runtime looks for CNI plugins
    #[arg(
        long,
        env = "SHUNT_CNI_BIN_DIR",
        value_name = "PATH",
        default_value = "/opt/cni/bin"
    )]
    pub cni_bin_dir: PathBuf,
    /// Where the container runtime looks for its list of CNI plugins
    #[arg(
        long,
        env = "SHUNT_CNI_CONF_DIR",
        value_name = "PATH",
        default_value = "/etc/cni/net.d"
    )]
    pub cni_conf_dir: PathBuf,
}

/// How the agent keeps the plugin on the node.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "CNI plugin, with --kubernetes")]
pub struct CniFlags {
    /// The directories
    #[command(flatten)]
    pub dirs: CniDirs,
    /// The plugin to install [default: shunt-cni beside this program]
    #[arg(long, env = "SHUNT_CNI_PLUGIN", value_name = "PATH")]
    pub cni_plugin: Option<PathBuf>,
    /// The control socket as the node sees it, when this agent runs in a container that has
    /// it elsewhere [default: that of --socket]
    #[arg(long, env = "SHUNT_CNI_SOCKET", value_name = "PATH")]
    pub cni_socket: Option<PathBuf>,
    /// Kubelet's directory as the node sees it
    #[arg(
        long,
        env = "SHUNT_KUBELET_DIR",
        value_name = "PATH",
        default_value = DEFAULT_KUBELET_DIR
    )]
    pub kubelet_dir: PathBuf,
    /// Leaves the node's CNI plugins alone: pods are redirected when they have started
    #[arg(long, env = "SHUNT_NO_CNI")]
    pub no_cni: bool,
}

/// What is put on the node, and where.
#[derive(Clone, Debug)]
pub struct Installation {
    dirs: CniDirs,
    plugin: PathBuf,
    entry: String,
}

/// What a look at the node has led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// There is no list of plugins yet.
    Waiting,
    /// Everything was as it should be.
    Unchanged,
    /// The entry is in the list now.
    Written,
}

/// How long after a failure the next try is made, if nothing changes before.
const RETRY: Duration = Duration::from_secs(10);

impl CniFlags {
    /// What these flags ask for, with the agent at `socket`; nothing with `--no-cni`.
    ///
    /// # Errors
    ///
    /// When a path cannot be told, or cannot be written in JSON.
    pub fn installation(&self, socket: &Path) -> Result<Option<Installation>> {
        if self.no_cni {
            return Ok(None);
        }
        let plugin = match &self.cni_plugin {
            Some(path) => path.clone(),
            None => std::env::current_exe()
                .context("cannot tell where this program is; name the plugin with --cni-plugin")?
                .with_file_name(TYPE),
        };
        let socket = self.cni_socket.as_deref().unwrap_or(socket);
        let socket = std::path::absolute(socket).context("cannot tell where the socket is")?;
        Ok(Some(Installation {
            dirs: self.dirs.clone(),
            plugin,
            entry: entry(&socket, &self.kubelet_dir)
                .context("cannot write the plugin's entry in the list")?,
        }))
    }
}

impl Installation {
    /// Puts the plugin where it is missing: first the binary, then the entry that has the
    /// runtime call it.
    ///
    /// # Errors
    ///
    /// When a file cannot be read or written, or is none that may be edited.
    pub fn put(&self) -> Result<Put> {
        self.put_binary()?;
        let conf_dir = &self.dirs.cni_conf_dir;
        let Some(path) = configurations(conf_dir)?.into_iter().next() else {
            return Ok(Put::Waiting);
        };
        let text = read(&path)?;
        if !is_list(&path) {
            return self.convert(&path, &text);
        }
        match with_entry(&text, &self.entry).with_context(|| path.display().to_string())? {
            Some(edited) => replace(&path, Some(&text), &edited).map(|()| Put::Written),
            None => Ok(Put::Unchanged),
        }
    }

    fn put_binary(&self) -> Result<()> {
        let shown = self.plugin.display();
        let own = fs::read(&self.plugin).with_context(|| {
            format!(
                "cannot read the CNI plugin {shown}; name it with --cni-plugin, or leave the \
                 node's plugins alone with --no-cni"
            )
        })?;
        let place = self.dirs.cni_bin_dir.join(TYPE);
        let is_there = fs::read(&place).is_ok_and(|there| there == own)
            && fs::metadata(&place).is_ok_and(|found| found.permissions().mode() & 0o111 == 0o111);
        if is_there {
            return Ok(());
        }
        write_atomically(&place, &own, 0o755).context(
            "cannot install the CNI plugin; --cni-bin-dir is where the container runtime looks \
             for plugins",
        )?;
        tracing::info!(path = %place.display(), "the CNI plugin is installed");
        Ok(())
    }

    /// Makes a list of a single plugin's configuration, and puts that one aside: runtimes
    /// would prefer it.
    fn convert(&self, path: &Path, text: &str) -> Result<Put> {
        let list = list_of(path);
        let saved = saved_of(path);
        if list.exists() && !saved.exists() {
            bail!(
                "{} and {} are both there, and runtimes use the first; take one of them away",
                path.display(),
                list.display()
            );
        }
        let edited = listed(text, &self.entry).with_context(|| path.display().to_string())?;
        let mode = mode_of(path)?;
        write_atomically(&list, edited.as_bytes(), mode)?;
        rename(path, &saved)?;
        Ok(Put::Written)
    }

    /// Keeps the plugin on the node until it is dropped. What fails is said in the log and
    /// by `readiness`, and tried again.
    pub async fn keep(self, readiness: Arc<Readiness>) {
        let mut log = Log::default();
        loop {
            // Watch first, then look: what changes in between is heard of.
            let watch = watch(&self.dirs.cni_conf_dir);
            let installation = self.clone();
            let put = tokio::task::spawn_blocking(move || installation.put()).await;
            let put = put
                .context("looking at the CNI configuration panicked")
                .flatten();
            let failed = put.as_ref().err().or(watch.as_ref().err());
            log.say(failed, put.as_ref().ok(), &self.dirs.cni_conf_dir);
            match (failed, &put) {
                (Some(error), _) => readiness.not_yet(CNI_INSTALLED, format!("{error:#}")),
                (None, Ok(Put::Waiting)) => {
                    readiness.not_yet(CNI_INSTALLED, "the node has no CNI configuration yet");
                }
                (None, _) => readiness.met(CNI_INSTALLED),
            }
            let failed = failed.is_some();
            let changed = async {
                match watch {
                    // Whatever it is, all is looked at.
                    Ok(mut events) => drop(events.next().await),
                    Err(_said) => std::future::pending().await,
                }
            };
            if failed {
                // Until something changes, or what failed may work again.
                let _ = tokio::time::timeout(RETRY, changed).await;
            } else {
                changed.await;
            }
        }
    }
}

/// Says how it stands, once for each change.
#[derive(Default)]
struct Log {
    said: String,
}

impl Log {
    fn say(&mut self, failed: Option<&anyhow::Error>, put: Option<&Put>, conf_dir: &Path) {
        let dir = conf_dir.display();
        let says = match (failed, put) {
            (Some(error), _) => format!(
                "the CNI plugin is not in place, so new pods may start before they are \
                 redirected: {error:#}"
            ),
            (None, Some(Put::Written)) => {
                format!("the CNI plugin is in the list of plugins in {dir}")
            }
            (None, Some(Put::Waiting)) => {
                format!("no CNI configuration is in {dir} yet, waits for one")
            }
            (None, Some(Put::Unchanged) | None) => String::new(),
        };
        if says == self.said {
            return;
        }
        if failed.is_some() {
            tracing::warn!("{says}");
        } else if !says.is_empty() {
            tracing::info!("{says}");
        }
        self.said = says;
    }
}

/// Takes the plugin off the node again: the entry wherever it is, then the binary. What was
/// put aside comes back.
///
/// # Errors
///
/// When a file cannot be read or written. What could be done is done.
pub fn remove(dirs: &CniDirs) -> Result<()> {
    let lists = configurations(&dirs.cni_conf_dir)?;
    let mut failed = Vec::new();
    for path in lists.iter().filter(|path| is_list(path)) {
        failed.extend(remove_entry(path).err());
    }
    for saved in files(&dirs.cni_conf_dir, |name| has_suffix(name, SAVED))? {
        failed.extend(restore(&saved).err());
    }
    // The runtime would fail to start pods with the entry there and the binary gone.
    if let Some(error) = failed.into_iter().next() {
        return Err(error);
    }
    remove_file(&dirs.cni_bin_dir.join(TYPE))
}

fn remove_entry(path: &Path) -> Result<()> {
    let text = read(path)?;
    match without_entry(&text) {
        Ok(Some(edited)) => replace(path, Some(&text), &edited),
        Ok(None) => Ok(()),
        Err(_) if !text.contains(TYPE) => Ok(()),
        Err(error) => Err(error).with_context(|| path.display().to_string()),
    }
}

/// Brings back what [`Installation::convert`] put aside, unless others have written on what
/// it was made into.
fn restore(saved: &Path) -> Result<()> {
    let Some(original) = without_suffix(saved, SAVED) else {
        return Ok(());
    };
    let list = list_of(&original);
    let made = listed(&read(saved)?, &format!("{{\"type\":\"{TYPE}\"}}"))
        .and_then(|list| without_entry(&list));
    let is_as_made =
        matches!(&made, Ok(Some(made)) if fs::read_to_string(&list).is_ok_and(|now| now == *made));
    if !is_as_made {
        return remove_file(saved);
    }
    if original.exists() {
        remove_file(saved)?;
    } else {
        rename(saved, &original)?;
    }
    remove_file(&list)
}

/// What a configuration is called while its list is in use.
const SAVED: &str = ".shunt-saved";

/// What a new text is called until it is in place. Runtimes pass over such names.
const NEW: &str = ".shunt-new";

/// The configurations in a directory, in the order in which runtimes look at them: they use
/// the first.
fn configurations(dir: &Path) -> Result<Vec<PathBuf>> {
    let suffixes = [".conf", ".conflist", ".json"];
    files(dir, |name| {
        suffixes.iter().any(|suffix| has_suffix(name, suffix))
    })
}

/// The files of a directory whose names are of interest, sorted; none when it is not there.
fn files(dir: &Path, is_wanted: impl Fn(&OsStr) -> bool) -> Result<Vec<PathBuf>> {
    let shown = dir.display();
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("cannot list {shown}")),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.with_context(|| format!("cannot list {shown}"))?;
        if is_wanted(&entry.file_name()) && !entry.path().is_dir() {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

fn has_suffix(name: &OsStr, suffix: &str) -> bool {
    name.as_encoded_bytes().ends_with(suffix.as_bytes())
}

fn is_list(path: &Path) -> bool {
    path.extension()
        .is_some_and(|extension| extension == "conflist")
}

/// What a single plugin's configuration is called as a list.
fn list_of(path: &Path) -> PathBuf {
    path.with_extension("conflist")
}

fn saved_of(path: &Path) -> PathBuf {
    with_suffix(path, SAVED)
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

fn without_suffix(path: &Path, suffix: &str) -> Option<PathBuf> {
    path.to_str()?.strip_suffix(suffix).map(PathBuf::from)
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| {
        format!(
            "cannot read {}, so it is left alone; is it text, and may this agent read it?",
            path.display()
        )
    })
}

fn mode_of(path: &Path) -> Result<u32> {
    let found = fs::metadata(path);
    let found = found.with_context(|| format!("cannot look at {}", path.display()))?;
    Ok(found.permissions().mode() & 0o7777)
}

/// Replaces what was read at `path` before, with the same mode. Where a link is, what it
/// leads to.
fn replace(path: &Path, former: Option<&str>, text: &str) -> Result<()> {
    let place = fs::canonicalize(path)
        .with_context(|| format!("cannot follow {} to its file", path.display()))?;
    let mode = mode_of(&place)?;
    if former.is_some_and(|former| fs::read_to_string(&place).is_ok_and(|now| now != former)) {
        bail!("{} has just been changed by somebody else", path.display());
    }
    write_atomically(&place, text.as_bytes(), mode)
}

/// Writes a file so that nobody ever sees a part of it.
fn write_atomically(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let new = with_suffix(path, NEW);
    let written = write_new(&new, bytes, mode).and_then(|()| fs::rename(&new, path));
    written
        .inspect_err(|_error| drop(fs::remove_file(&new)))
        .with_context(|| format!("cannot write {}", path.display()))
}

fn write_new(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut file = fs::File::create(path)?;
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to)
        .with_context(|| format!("cannot rename {} to {}", from.display(), to.display()))
}

/// Removes a file that may be gone already.
fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Hears of every file in a directory that is written, renamed or removed.
fn watch(dir: &Path) -> Result<EventStream<Vec<u8>>> {
    let events = WatchMask::CLOSE_WRITE
        | WatchMask::MOVED_TO
        | WatchMask::MOVED_FROM
        | WatchMask::DELETE
        | WatchMask::DELETE_SELF
        | WatchMask::MOVE_SELF;
    let shown = dir.display();
    let inotify = Inotify::init().context("cannot watch files; is max_user_instances used up?")?;
    inotify
        .watches()
        .add(dir, events)
        .with_context(|| format!("cannot watch {shown}; --cni-conf-dir names the directory"))?;
    inotify
        .into_event_stream(vec![0; 4096])
        .with_context(|| format!("cannot wait for changes in {shown}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str =
        "{\"cniVersion\":\"1.0.0\",\"name\":\"n\",\"plugins\":[{\"type\":\"ptp\"}]}\n";
    const SINGLE: &str = "{ \"cniVersion\": \"0.3.1\", \"name\": \"n\", \"type\": \"ptp\" }\n";

    /// A node's directories.
    struct Node {
        root: tempfile::TempDir,
        installation: Installation,
    }

    impl Node {
        fn new() -> Self {
            let root = tempfile::tempdir().expect("a directory");
            let place = |name: &str| root.path().join(name);
            for dir in ["bin", "conf"] {
                fs::create_dir(place(dir)).expect("a new directory");
            }
            fs::write(place("plugin"), "the plugin").expect("a new file");
            let flags = CniFlags {
                dirs: CniDirs {
                    cni_bin_dir: place("bin"),
                    cni_conf_dir: place("conf"),
                },
                cni_plugin: Some(place("plugin")),
                cni_socket: None,
                kubelet_dir: DEFAULT_KUBELET_DIR.into(),
                no_cni: false,
            };
            let installation = flags.installation(&place("shunt.sock"));
            Self {
                installation: installation.expect("it is UTF-8").expect("it is asked for"),
                root,
            }
        }

        fn conf(&self, name: &str) -> PathBuf {
            self.root.path().join("conf").join(name)
        }

        fn write(&self, name: &str, text: &str) {
            fs::write(self.conf(name), text).expect("a file");
        }

        fn read(&self, name: &str) -> String {
            fs::read_to_string(self.conf(name)).expect(name)
        }

        /// The names of all files in both directories.
        fn names(&self) -> Vec<String> {
            let mut names = Vec::new();
            for dir in ["bin", "conf"] {
                for path in files(&self.root.path().join(dir), |_| true).expect("a list") {
                    let name = path.file_name().expect("a file").to_string_lossy();
                    names.push(name.into_owned());
                }
            }
            names
        }

        #[track_caller]
        fn put(&self) -> Put {
            self.installation.put().expect("it can be put")
        }

        fn remove(&self) {
            remove(&self.installation.dirs).expect("it can be removed");
        }

        fn refused(&self) -> String {
            let error = self.installation.put().expect_err("it is left alone");
            format!("{error:#}")
        }
    }

    #[test]
    fn the_plugin_comes_and_goes_without_a_trace() {
        let node = Node::new();
        assert_eq!(node.put(), Put::Waiting);
        node.write("10-net.conflist", LIST);
        node.write("20-other.conflist", LIST);
        let mode = fs::Permissions::from_mode(0o640);
        fs::set_permissions(node.conf("10-net.conflist"), mode).expect("own file");
        assert_eq!(node.put(), Put::Written);
        assert_eq!(node.put(), Put::Unchanged);
        assert!(node.read("10-net.conflist").contains("shunt.sock"));
        assert_eq!(node.read("20-other.conflist"), LIST);
        assert_eq!(
            mode_of(&node.conf("10-net.conflist")).expect("there"),
            0o640
        );
        let binary = node.root.path().join("bin").join(TYPE);
        assert_eq!(mode_of(&binary).expect("there"), 0o755);

        // Another comes to stand before it.
        node.write("05-new.conflist", LIST);
        assert_eq!(node.put(), Put::Written);
        for _ in 0..2 {
            node.remove();
            for name in ["05-new.conflist", "10-net.conflist", "20-other.conflist"] {
                assert_eq!(node.read(name), LIST);
            }
            assert_eq!(
                node.names(),
                ["05-new.conflist", "10-net.conflist", "20-other.conflist"]
            );
        }
    }

    #[test]
    fn another_binary_is_replaced() {
        let node = Node::new();
        let binary = node.root.path().join("bin").join(TYPE);
        fs::write(&binary, "an older plugin").expect("a new file");
        assert_eq!(node.put(), Put::Waiting);
        assert_eq!(fs::read(&binary).expect("there"), b"the plugin");
        assert_eq!(mode_of(&binary).expect("there"), 0o755);
    }

    #[test]
    fn a_single_plugin_is_made_a_list_and_comes_back() {
        // Runtimes look at 10-net.conflist before the one, after the other.
        for (name, again) in [
            ("10-net.conf", Put::Written),
            ("10-net.json", Put::Unchanged),
        ] {
            let node = Node::new();
            node.write(name, SINGLE);
            assert_eq!(node.put(), Put::Written);
            let saved = format!("{name}.shunt-saved");
            let mut names = node.names();
            names.sort();
            let mut expected = vec![saved, "10-net.conflist".to_owned(), TYPE.to_owned()];
            expected.sort();
            assert_eq!(names, expected);
            assert_eq!(node.put(), Put::Unchanged);
            // Whoever wrote it writes it again.
            node.write(name, &SINGLE.replace("ptp", "bridge"));
            assert_eq!(node.put(), again);
            let is_taken_up = node.read("10-net.conflist").contains("bridge");
            assert_eq!(is_taken_up, again == Put::Written);
            node.remove();
            assert_eq!(node.names(), [name]);
            assert_eq!(node.read(name), SINGLE.replace("ptp", "bridge"));
        }
    }

    #[test]
    fn a_list_that_others_have_written_on_stays_one() {
        let node = Node::new();
        node.write("10-net.conf", SINGLE);
        node.put();
        let theirs = with_entry(&node.read("10-net.conflist"), "{\"type\":\"shunt-cni\"}");
        let theirs = theirs.expect("a list").expect("another entry");
        let theirs = theirs.replace(
            "{\"type\":\"shunt-cni\"}",
            "{\"type\":\"shunt-cni\"}, {\"type\":\"x\"}",
        );
        node.write("10-net.conflist", &theirs);
        node.remove();
        assert_eq!(node.names(), ["10-net.conflist"]);
        assert!(!node.read("10-net.conflist").contains(TYPE));
    }

    #[test]
    fn what_cannot_be_edited_is_left_alone() {
        let node = Node::new();
        node.write("05-broken.conflist", "plugins: none\n");
        node.write("10-net.conflist", LIST);
        let said = node.refused();
        assert!(
            said.contains("05-broken.conflist") && said.contains("left alone"),
            "{said}"
        );
        assert_eq!(node.read("05-broken.conflist"), "plugins: none\n");
        // Runtimes do not go on to the next one either.
        assert_eq!(node.read("10-net.conflist"), LIST);
        node.remove();
        assert_eq!(node.names(), ["05-broken.conflist", "10-net.conflist"]);

        let node = Node::new();
        node.write("10-net.conf", SINGLE);
        node.write("10-net.conflist", LIST);
        assert!(node.refused().contains("both there"));
        assert_eq!(node.read("10-net.conflist"), LIST);
    }

    #[test]
    fn a_link_stays_a_link() {
        let node = Node::new();
        let elsewhere = node.root.path().join("list");
        fs::write(&elsewhere, LIST).expect("a new file");
        std::os::unix::fs::symlink(&elsewhere, node.conf("10-net.conflist")).expect("a new link");
        assert_eq!(node.put(), Put::Written);
        let found = fs::symlink_metadata(node.conf("10-net.conflist")).expect("there");
        assert!(found.is_symlink());
        assert!(
            fs::read_to_string(&elsewhere)
                .expect("there")
                .contains(TYPE)
        );
        node.remove();
        assert_eq!(fs::read_to_string(&elsewhere).expect("there"), LIST);
    }

    #[test]
    fn what_somebody_else_has_just_written_is_not_overwritten() {
        let node = Node::new();
        node.write("10-net.conflist", LIST);
        let path = node.conf("10-net.conflist");
        let error = replace(&path, Some("what was there"), "new").expect_err("another text");
        assert!(error.to_string().contains("somebody else"), "{error}");
        assert_eq!(node.read("10-net.conflist"), LIST);
    }

    #[test]
    fn without_the_directories_it_is_said_which() {
        let node = Node::new();
        fs::remove_dir(node.root.path().join("bin")).expect("an empty directory");
        assert!(node.refused().contains("--cni-bin-dir"));
        fs::remove_dir(node.root.path().join("conf")).expect("an empty directory");
        let error = watch(&node.conf("")).expect_err("there is nothing");
        assert!(format!("{error:#}").contains("--cni-conf-dir"));
        node.remove();
    }
}
