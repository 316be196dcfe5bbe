//! The pods that run on this node already, found by their processes.
//!
//! An agent that starts late was not asked by the CNI plugin. But kubelet gives each
//! pod a cgroup whose name has the pod's uid in it, so that every process in `/proc`
//! tells which pod it is of, whatever the runtime. The oldest one with a network of
//! its own is the sandbox (`pause`), and its network namespace is the pod's.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::Read as _,
    net::IpAddr,
    os::{
        fd::OwnedFd,
        unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    libc,
};
use shunt_abi::NetnsCookie;

use crate::{netns::Netns, settings::resolv_conf};

/// The network namespace of a pod that runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sandbox {
    /// Where it can be opened: where the runtime has mounted it, or else at one of
    /// the pod's processes.
    pub netns: PathBuf,
    /// The kernel's name of it.
    pub cookie: NetnsCookie,
    /// The nameservers of the pod's resolv.conf, if it could be read.
    pub resolvers: Option<Vec<IpAddr>>,
}

/// What `/proc` tells of the pods.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// The uids of all pods that have a process.
    pub running: BTreeSet<String>,
    /// The namespaces of those that were asked for, by uid.
    pub sandboxes: BTreeMap<String, Sandbox>,
}

/// A file of a file system, by device and inode.
type FileId = (u64, u64);

/// A process of a pod, with a network that is not the node's.
struct Process {
    pid: u32,
    /// In clock ticks since boot.
    started: u64,
    netns: FileId,
}

/// Looks through the processes at `proc`, and at the namespaces of the pods with
/// these uids.
///
/// # Errors
///
/// When the processes cannot be listed.
pub fn scan(proc: &Path, wanted: &BTreeSet<String>) -> Result<Found> {
    let entries = fs::read_dir(proc).with_context(|| {
        format!(
            "cannot list the processes at {}; --proc names where the node's are seen",
            proc.display()
        )
    })?;
    let host = own_networks(proc);
    let pids = entries
        .flatten()
        .filter_map(|entry| pid(&entry.file_name().to_string_lossy()));
    let mut found = Found::default();
    let mut processes: BTreeMap<String, Vec<Process>> = BTreeMap::new();
    for pid in pids {
        // A process that ends meanwhile is of no pod.
        let Some(uid) = pod_of(proc, pid) else {
            continue;
        };
        if wanted.contains(&uid)
            && let Some(process) = process(proc, pid)
            && !host.contains(&process.netns)
        {
            processes.entry(uid.clone()).or_default().push(process);
        }
        found.running.insert(uid);
    }
    let mounted = if processes.is_empty() {
        BTreeMap::new()
    } else {
        mounted_namespaces(Path::new(MOUNTED))
    };
    for (uid, mut processes) in processes {
        processes.sort_unstable_by_key(|process| (process.started, process.pid));
        let sandbox = processes
            .iter()
            .find_map(|process| sandbox(proc, &uid, process, &mounted));
        if let Some(sandbox) = sandbox {
            found.sandboxes.insert(uid, sandbox);
        }
    }
    Ok(found)
}

/// Where runtimes mount the namespaces of their pods.
const MOUNTED: &str = "/run/netns";

fn pid(name: &str) -> Option<u32> {
    name.parse().ok()
}

fn pod_of(proc: &Path, pid: u32) -> Option<String> {
    let cgroups = fs::read_to_string(proc.join(pid.to_string()).join("cgroup")).ok()?;
    pod_uid(&cgroups)
}

fn process(proc: &Path, pid: u32) -> Option<Process> {
    let dir = proc.join(pid.to_string());
    Some(Process {
        pid,
        started: start_time(&fs::read_to_string(dir.join("stat")).ok()?)?,
        netns: file_id(&dir.join("ns/net")).ok()?,
    })
}

/// The networks that are no pod's: the node's, which is also the agent's own. The
/// first process may be out of sight.
fn own_networks(proc: &Path) -> Vec<FileId> {
    let first = proc.join("1/ns/net");
    let places = [first.as_path(), Path::new("/proc/self/ns/net")];
    places
        .iter()
        .filter_map(|path| file_id(path).ok())
        .collect()
}

fn file_id(path: &Path) -> std::io::Result<FileId> {
    let found = fs::metadata(path)?;
    Ok((found.dev(), found.ino()))
}

/// The namespace of a process that is still there and still of this pod when its
/// namespace is open: its number may be another's by now.
fn sandbox(
    proc: &Path,
    uid: &str,
    process: &Process,
    mounted: &BTreeMap<FileId, PathBuf>,
) -> Option<Sandbox> {
    let dir = proc.join(process.pid.to_string());
    let at_process = dir.join("ns/net");
    let netns = mounted.get(&process.netns).unwrap_or(&at_process);
    let open = Netns::open(netns).or_else(|_gone| Netns::open(&at_process));
    let open = open
        .inspect_err(|error| tracing::debug!(uid, "no namespace: {error:#}"))
        .ok()?;
    let resolvers = resolvers(&dir.join("root"))
        .inspect_err(|error| tracing::debug!(uid, "no resolv.conf: {error:#}"))
        .ok()
        // A sandbox may have an empty one of its image; a pod has always somebody to ask.
        .filter(|resolvers| !resolvers.is_empty());
    (pod_of(proc, process.pid).as_deref() == Some(uid)).then(|| Sandbox {
        netns: open.path().to_owned(),
        cookie: open.cookie(),
        resolvers,
    })
}

/// The namespaces that are mounted in a directory.
fn mounted_namespaces(dir: &Path) -> BTreeMap<FileId, PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| Some((file_id(&entry.path()).ok()?, entry.path())))
        .collect()
}

/// No resolv.conf is longer, in bytes.
const LONGEST_RESOLV_CONF: u64 = 64 * 1024;

/// Reads the nameservers of a pod. Its root directory is in the pod's hands: a link
/// in it must not lead out of it, and what is there need not be a file.
fn resolvers(root: &Path) -> Result<Vec<IpAddr>> {
    let root = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
        .open(root)
        .context("cannot open the pod's root")?;
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let file: OwnedFd =
        openat2(&root, "etc/resolv.conf", how).context("cannot open the pod's resolv.conf")?;
    let file = File::from(file);
    anyhow::ensure!(
        file.metadata()?.is_file(),
        "the pod's resolv.conf is no file"
    );
    let mut text = String::new();
    file.take(LONGEST_RESOLV_CONF).read_to_string(&mut text)?;
    Ok(resolv_conf(&text)?)
}

/// When a process started, from its `/proc/PID/stat`: the 22nd field. The second one
/// is its name in parentheses, in which anything can stand.
fn start_time(stat: &str) -> Option<u64> {
    let (_, behind_name) = stat.rsplit_once(')')?;
    behind_name.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// The uid of the pod whose process has this `/proc/PID/cgroup`: one line for each
/// hierarchy, `number:controllers:path`.
///
/// A pod's directory is called `podUID` by the driver cgroupfs, and
/// `…-podUID.slice`, with `_` for `-`, by systemd; below it each runtime has its own
/// names for containers. What stands above is not looked at: the agent may see the
/// paths relative to a cgroup of its own, and kubelet may have been given another
/// root. Of nested clusters the outermost pod is meant, which is the one of this node.
pub fn pod_uid(cgroups: &str) -> Option<String> {
    cgroups.lines().find_map(|line| {
        let path = line.splitn(3, ':').nth(2)?;
        // One form of containerd's is "….slice:cri-containerd:ID".
        path.split(['/', ':']).find_map(pod_directory)
    })
}

fn pod_directory(name: &str) -> Option<String> {
    let uid = match name.strip_suffix(".slice") {
        Some(slice) => {
            let (before, uid) = slice.rsplit_once("pod")?;
            if !before.is_empty() && !before.ends_with('-') {
                return None;
            }
            uid.replace('_', "-")
        }
        None => name.strip_prefix("pod")?.to_owned(),
    };
    is_uid(&uid).then_some(uid)
}

/// A uid of the API, such as 0b6ff6f0-5ad0-4c7b-a2f5-0f4d5a3f2b11; or the 32 digits
/// that kubelet gives a pod of a file of its own.
fn is_uid(text: &str) -> bool {
    const DASHES: [usize; 4] = [8, 13, 18, 23];
    let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    match text.len() {
        36 => text.bytes().enumerate().all(|(at, byte)| {
            if DASHES.contains(&at) {
                byte == b'-'
            } else {
                is_digit(byte)
            }
        }),
        32 => text.bytes().all(is_digit),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const UID: &str = "0b6ff6f0-5ad0-4c7b-a2f5-0f4d5a3f2b11";
    const ID: &str = "4f2ac0ffee4f2ac0ffee4f2ac0ffee4f2ac0ffee4f2ac0ffee4f2ac0ffee4f2a";

    /// Every form, with U, S and I for the uid, the uid as systemd writes it, and
    /// the id of a container.
    const FORMS: [&str; 20] = [
        // containerd, CRI-O, Docker; systemd and v2.
        "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podS.slice/cri-containerd-I.scope",
        "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podS.slice/crio-I.scope",
        "0::/kubepods.slice/kubepods-podS.slice/docker-I.scope",
        "0::/kubepods.slice/kubepods-podS.slice/cri-containerd-I.scope/init.scope",
        "0::/kubepods.slice/kubepods-podS.slice/crio-I/container",
        // cgroupfs.
        "0::/kubepods/burstable/podU/I",
        "0::/kubepods/besteffort/podU/I",
        "0::/kubepods/podU/I",
        "0::/kubepods/podU/crio-I",
        // The sandbox of CRI-O's in the pod's own directory.
        "0::/kubepods/podU",
        // v1, and hybrid.
        "12:memory:/kubepods/burstable/podU/I\n11:cpu,cpuacct:/kubepods/burstable/podU/I\n0::/",
        "5:devices:/kubepods.slice/kubepods-podS.slice/docker-I.scope\n1:name=systemd:/x\n0::/system.slice/containerd.service",
        "1:name=systemd:/\n0::/kubepods/podU/I",
        // containerd without a driver in common with kubelet.
        "0::/system.slice/containerd.service/kubepods-burstable-podS.slice:cri-containerd:I",
        // kind, minikube, kubelet with a root of its own.
        "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-podS.slice/cri-containerd-I.scope",
        "0::/docker/I/kubelet/kubepods/besteffort/podU/I",
        "0::/own.slice/own-root.slice/own-root-kubepods.slice/own-root-kubepods-podS.slice/crio-I.scope",
        // Seen from a cgroup namespace.
        "0::/../../podU/I",
        "0::/../../../kubepods-burstable.slice/kubepods-burstable-podS.slice/cri-containerd-I.scope",
        // A cluster in a pod.
        "0::/kubepods/podU/I/kubepods/pod11111111-2222-3333-4444-555555555555/I",
    ];

    fn written(form: &str, uid: &str) -> String {
        form.replace('U', uid)
            .replace('S', &uid.replace('-', "_"))
            .replace('I', ID)
    }

    #[test]
    fn every_runtime_and_driver_is_understood() {
        for form in FORMS {
            assert_eq!(pod_uid(&written(form, UID)).as_deref(), Some(UID), "{form}");
        }
    }

    #[test]
    fn what_is_of_no_pod() {
        for text in [
            "",
            "0::/",
            "0::/init.scope",
            "0::/system.slice/podman.service",
            "0::/machine.slice/libpod-4f2ac0ffee.scope",
            "0::/user.slice/user-0.slice/podcast",
            "0::/kubepods.slice/kubepods-burstable.slice",
            "0::/kubepods/burstable/pod0b6ff6f0",
            "0::/kubepods/burstable/pod0B6FF6F0-5AD0-4C7B-A2F5-0F4D5A3F2B11/I",
            "0::/x/notpod0b6ff6f0-5ad0-4c7b-a2f5-0f4d5a3f2b11",
            "0::/x/notpod0b6ff6f0_5ad0_4c7b_a2f5_0f4d5a3f2b11.slice",
            "no cgroup at all",
        ] {
            assert_eq!(pod_uid(text), None, "{text}");
        }
    }

    #[test]
    fn a_pod_of_a_file_has_a_hash_for_a_uid() {
        let hash = "d6f3c1b2a4958677d6f3c1b2a4958677";
        let path = format!("0::/kubepods/burstable/pod{hash}/{ID}");
        assert_eq!(pod_uid(&path).as_deref(), Some(hash));
    }

    #[test]
    fn a_name_is_no_field() {
        let behind = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20 21";
        for name in ["pause", "a b", ") S 1 2", "((", ""] {
            let stat = format!("42 ({name}) {behind}");
            assert_eq!(start_time(&stat), Some(4711), "{name}");
        }
        assert_eq!(start_time("42 (pause) S 1"), None);
        assert_eq!(start_time(""), None);
    }

    #[test]
    fn a_link_does_not_lead_out_of_the_pod() {
        let dir = tempfile::tempdir().expect("a directory");
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("etc")).expect("directories");
        let conf = root.join("etc/resolv.conf");
        let secret = dir.path().join("secret");
        fs::write(&secret, "nameserver 192.0.2.9\n").expect("a file");
        std::os::unix::fs::symlink(&secret, &conf).expect("a link");
        assert!(resolvers(&root).is_err());
        fs::remove_file(&conf).expect("it is there");
        // Who opens a pipe waits for the other end.
        nix::unistd::mkfifo(&conf, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
        assert!(resolvers(&root).is_err());
        fs::remove_file(&conf).expect("it is there");
        std::os::unix::fs::symlink("/run/conf", &conf).expect("a link");
        fs::create_dir(root.join("run")).expect("a directory");
        fs::write(root.join("run/conf"), "nameserver 192.0.2.1\n").expect("a file");
        let expected: IpAddr = "192.0.2.1".parse().expect("a literal");
        assert_eq!(resolvers(&root).expect("within the root"), [expected]);
    }

    proptest! {
        #[test]
        fn every_uid_is_found_in_every_form(
            digits in "[0-9a-f]{32}",
            form in prop::sample::select(FORMS.to_vec()),
        ) {
            let parts = [&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]];
            let uid = parts.join("-");
            prop_assert_eq!(pod_uid(&written(form, &uid)), Some(uid));
        }

        #[test]
        fn no_text_is_too_strange(
            text in "(pod|kubepods|-|_|/|:|\\.slice|[0-9a-f]{4,36}|\n|\\PC){0,30}",
        ) {
            if let Some(uid) = pod_uid(&text) {
                prop_assert!(is_uid(&uid));
            }
            let _ = start_time(&text);
        }
    }
}
