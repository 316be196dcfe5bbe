//! The pods stay, to be played with.

use std::{fs, io, path::Path, thread, time::Duration};

use shunt_tests::{Agent, MeshPod, Node, Owner, envoy, interrupt::Interrupt};

/// Writes what a shell needs to know, as a script that it reads: the agent's socket, and
/// a function for each pod that runs a command in it, as its application would.
pub(crate) fn describe(
    file: &Path,
    node: &Node,
    agent: &Agent,
    pods: &[&MeshPod],
) -> io::Result<()> {
    let cgroup = node.cgroup().path().join("cgroup.procs");
    let mut script = format!(
        "export SHUNT_SOCKET={}\nSERVICE={}\n",
        agent.place().socket().display(),
        envoy::SERVICE
    );
    for pod in pods {
        let netns = pod.pod().netns();
        let (name, path) = (netns.purpose(), netns.path());
        let Owner { uid, gid } = Owner::APP;
        script.push_str(&format!(
            "{name}() {{ (echo $BASHPID >{} && exec nsenter --net={} --setgid {gid} --setuid {uid} \"$@\"); }}\n{}={}\n",
            cgroup.display(),
            path.display(),
            name.to_uppercase(),
            pod.address()
        ));
    }
    // Who waits for the file finds all of it.
    let partial = file.with_extension("partial");
    fs::write(&partial, script)?;
    fs::rename(&partial, file)
}

/// Waits until somebody wants an end.
pub(crate) fn until(interrupt: &Interrupt) {
    while !interrupt.is_wanted() {
        thread::sleep(Duration::from_millis(200));
    }
}
