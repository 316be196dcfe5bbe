//! The pods that run already are found by their processes, as they are on a node.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use shunt::{
    containers::{Found, scan},
    netns::Netns as OpenNetns,
};
use shunt_tests::{
    Cgroup, Netns, Owner, Process, cgroup, deadline::wait_until, leftovers::unique_name,
    netns::node_command,
};

/// The cgroup of a pod, as kubelet makes it for one driver or the other.
struct PodCgroup {
    top: PathBuf,
    path: PathBuf,
    uid: String,
}

impl PodCgroup {
    fn new(place: &str) -> Self {
        let number = unique_name("uid");
        let digits = number.bytes().fold(7_u64, |sum, byte| {
            sum.wrapping_mul(31).wrapping_add(u64::from(byte))
        });
        let uid = format!("0b6ff6f0-5ad0-4c7b-a2f5-{:012x}", digits & 0xffff_ffff_ffff);
        let top = cgroup::root().join(unique_name("kubelet"));
        let place = place
            .replace("UID", &uid)
            .replace("U_I_D", &uid.replace('-', "_"));
        let path = top.join(place);
        fs::create_dir_all(&path).expect("cgroups can be made");
        Self { top, path, uid }
    }

    /// Moves a process into a container's cgroup below.
    fn take(&self, container: &str, process: &Process) {
        let path = self.path.join(container);
        fs::create_dir_all(&path).expect("cgroups can be made");
        fs::write(path.join("cgroup.procs"), process.pid().to_string())
            .expect("a process can be moved");
    }

    fn scan(&self) -> Found {
        let wanted = BTreeSet::from([self.uid.clone()]);
        scan(Path::new("/proc"), &wanted).expect("processes can be listed")
    }
}

impl Drop for PodCgroup {
    fn drop(&mut self) {
        remove(&self.top);
    }
}

fn remove(path: &Path) {
    let below = fs::read_dir(path).into_iter().flatten().flatten();
    for child in below.filter(|child| child.path().is_dir()) {
        remove(&child.path());
    }
    let _ = fs::remove_dir(path);
}

fn sleep(mut command: Command) -> Process {
    Process::spawn("sleep", command.arg("600"))
}

fn pod() -> Netns {
    Netns::new("pod", Arc::new(Cgroup::new()))
}

#[test]
fn the_sandbox_is_the_oldest_process_with_a_network_of_its_own() {
    for place in [
        "kubepods/burstable/podUID",
        "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podU_I_D.slice",
    ] {
        let (netns, within) = (pod(), pod());
        let cgroup = PodCgroup::new(place);
        assert!(!cgroup.scan().running.contains(&cgroup.uid));
        // What watches the containers is in the pod's cgroup, on the node's network.
        let conmon = sleep(node_command("sleep"));
        cgroup.take("crio-conmon-1.scope", &conmon);
        let found = cgroup.scan();
        assert!(found.running.contains(&cgroup.uid));
        assert!(found.sandboxes.is_empty(), "{found:?}");

        let pause = sleep(netns.command("sleep", Owner::APP));
        cgroup.take("crio-2.scope", &pause);
        // An application that makes a network within its pod.
        let nested = sleep(within.command("sleep", Owner::APP));
        cgroup.take("crio-3.scope/inner", &nested);
        let cookie = OpenNetns::open(&netns.path())
            .expect("it is a namespace")
            .cookie();
        let found = cgroup.scan();
        let sandbox = &found.sandboxes[&cgroup.uid];
        assert_eq!(sandbox.cookie, cookie);
        assert_eq!(sandbox.netns, netns.path());
        assert!(sandbox.resolvers.is_some());

        // Where the runtime's mounts are out of sight, the process is named.
        let inode = fs::metadata(netns.path()).expect("it is there").ino();
        drop(netns);
        let found = cgroup.scan();
        let sandbox = &found.sandboxes[&cgroup.uid];
        assert_eq!(sandbox.cookie, cookie);
        let own = format!("/proc/{}/ns/net", pause.pid());
        assert_eq!(sandbox.netns, Path::new(&own));
        assert_eq!(fs::metadata(own).expect("it is there").ino(), inode);

        for process in [conmon, pause, nested] {
            process.kill();
        }
        wait_until("the pod has no process", || {
            match cgroup.scan().running.contains(&cgroup.uid) {
                false => Ok(()),
                true => Err("it has one".to_owned()),
            }
        });
    }
}

#[test]
fn who_is_not_asked_for_is_not_looked_at() {
    let (netns, cgroup) = (pod(), PodCgroup::new("kubepods/podUID"));
    let pause = sleep(netns.command("sleep", Owner::APP));
    cgroup.take("pause", &pause);
    let found = scan(Path::new("/proc"), &BTreeSet::new()).expect("processes can be listed");
    assert!(found.running.contains(&cgroup.uid));
    assert!(found.sandboxes.is_empty());
}

#[test]
fn without_processes_it_is_said() {
    let empty = shunt_tests::leftovers::temp_dir("proc");
    let missing = empty.path().join("missing");
    let error = scan(&missing, &BTreeSet::new()).expect_err("there is nothing");
    assert!(format!("{error:#}").contains("--proc names"), "{error:#}");
}
