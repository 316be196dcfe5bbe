//! The pods stay, to be played with: in a shell that knows them.

use std::{
    fs, io,
    path::Path,
    process::{Command, ExitStatus},
};

use shunt_tests::{Agent, MeshPod, Node, Owner, agent, envoy, leftovers::temp_dir};

/// Runs a shell, or the commands in the file `commands`. It has the agent's socket in its
/// environment, and a function for each pod that runs a command there as the pod's
/// application would.
///
/// # Errors
///
/// When it cannot be started.
pub(crate) fn shell(
    node: &Node,
    agent: &Agent,
    pods: [&MeshPod; 2],
    commands: Option<&Path>,
) -> io::Result<ExitStatus> {
    let directory = temp_dir("shell");
    let file = directory.path().join("pods");
    fs::write(&file, description(node, agent, pods))?;
    let mut shell = Command::new("bash");
    match commands {
        Some(commands) => shell.env("BASH_ENV", &file).arg(commands),
        None => shell.arg("--rcfile").arg(&file).arg("-i"),
    };
    shell.status()
}

/// What the shell reads first.
fn description(node: &Node, agent: &Agent, pods: [&MeshPod; 2]) -> String {
    let directory = agent::binary();
    let directory = directory.parent().unwrap_or(Path::new("/"));
    let cgroup = node.cgroup().path().join("cgroup.procs");
    let functions = pods.map(|pod| function(pod, &cgroup));
    format!(
        "export SHUNT_SOCKET={}\n\
         PATH={}:$PATH\n\
         SERVICE={}\n\
         {}\
         {PROMPT}",
        agent.place().socket().display(),
        directory.display(),
        envoy::SERVICE,
        functions.concat(),
    )
}

/// The function and the address of a pod, called as the pod is.
fn function(pod: &MeshPod, cgroup: &Path) -> String {
    let netns = pod.pod().netns();
    let name = netns.purpose();
    let Owner { uid, gid } = Owner::APP;
    format!(
        "{name}() {{ ( echo $BASHPID >{} && \
         exec nsenter --net={} --setgid {gid} --setuid {uid} -- \"$@\" ); }}\n\
         {}={}\n",
        cgroup.display(),
        netns.path().display(),
        name.to_uppercase(),
        pod.address()
    )
}

/// Only for somebody who types.
const PROMPT: &str = r#"
if [[ $- == *i* ]]; then
    PS1='shunt# '
    echo "
The agent runs, and both pods are enrolled. For example:

  shunt status
  client curl -s http://$SERVER/     # as the application of the pod client
  client curl -s http://$SERVICE/    # a service whose endpoint is its own pod
  client ss -tn
  shunt explain --help

exit ends it."
fi
"#;
