//! shunt on the cluster: the chart, rendered by Helm and applied.

use std::{path::PathBuf, process::Command};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use shunt_tests::{
    agent,
    command::{output_of, output_with_input},
    deadline::wait_until,
};

use crate::{cluster::Cluster, image::Image, network, pods::Pod};

/// The release, and the DaemonSet in it.
const NAME: &str = "shunt";
const NAMESPACE: &str = "shunt-system";
/// The image as `cargo xtask image` names it, without its tag.
const REPOSITORY: &str = "localhost/shunt";
/// The agent's control socket, where the chart mounts it from.
pub(crate) const SOCKET: &str = "/run/shunt/shunt.sock";

/// What the values of the chart are, beside those of every installation here.
#[derive(Clone, Debug)]
pub(crate) struct Values {
    /// The tag of the image.
    pub(crate) tag: &'static str,
    /// Whether the agent takes the redirection away when it ends.
    pub(crate) uninstall_on_stop: bool,
}

impl Values {
    /// As one would install it.
    pub(crate) const USUAL: Self = Self {
        tag: "usual",
        uninstall_on_stop: false,
    };

    fn to_json(&self) -> Value {
        json!({
            "image": {"repository": REPOSITORY, "tag": self.tag, "pullPolicy": "Never"},
            "node": {"cgroup": shunt_tests::cgroup::root()},
            "log": {"format": "text"},
            "uninstallOnStop": self.uninstall_on_stop,
            // There is no kube-proxy, so the address of the service leads nowhere.
            "extraEnv": [
                {"name": "KUBERNETES_SERVICE_HOST", "value": network::NODE.to_string()},
                {"name": "KUBERNETES_SERVICE_PORT", "value": crate::cluster::API_PORT.to_string()},
            ],
        })
    }
}

/// The tag of the agent whose maps have another layout.
pub(crate) const OTHER: &str = "other";

/// Makes the images known to the node: the one under test, and the other one.
///
/// # Panics
///
/// When there is no image.
pub(crate) fn import(cluster: &Cluster) {
    let archive = variable("SHUNT_IMAGE");
    let ctr = || {
        let mut command = Command::new("ctr");
        command.args(["--namespace", "k8s.io", "images"]);
        command
    };
    output_of(ctr().arg("import").arg(archive));
    let names = output_of(ctr().args(["list", "--quiet"]));
    let imported = names
        .lines()
        .find(|name| name.starts_with(&format!("{REPOSITORY}:")))
        .unwrap_or_else(|| panic!("the archive has no image {REPOSITORY}: {names}"));
    let usual = format!("{REPOSITORY}:{}", Values::USUAL.tag);
    output_of(ctr().args(["tag", imported, &usual]));

    let plugin = agent::binary().with_file_name("shunt-cni");
    cluster.import(
        &Image::new(&format!("{REPOSITORY}:{OTHER}"), &["/shunt"])
            .with_program(&agent::other_binary(), "/shunt")
            .with_program(&plugin, "/shunt-cni")
            .with_directory("/run")
            .with_link("../run", "/var/run"),
    );
}

/// Installs the chart, or changes what is installed; returns when the agent of the
/// node is ready and has these values.
///
/// # Panics
///
/// When it does not become ready.
pub(crate) fn install(cluster: &Cluster, values: &Values) {
    cluster.api().apply(&json!({
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": NAMESPACE},
    }));
    for document in rendered(values) {
        cluster.api().apply(&document);
    }
    wait_until_rolled_out(cluster);
}

/// Waits until the DaemonSet's pods are those of its newest template, and ready.
pub(crate) fn wait_until_rolled_out(cluster: &Cluster) {
    wait_until("the agent to be ready", || {
        let set = cluster
            .api()
            .get("apps/v1", "DaemonSet", Some(NAMESPACE), NAME)?;
        let number = |pointer: &str| set.pointer(pointer).and_then(Value::as_u64).unwrap_or(0);
        let is_seen = number("/status/observedGeneration") == number("/metadata/generation");
        let is_new = number("/status/updatedNumberScheduled") == 1;
        let is_ready = number("/status/numberReady") == 1 && number("/status/numberAvailable") == 1;
        if is_seen && is_new && is_ready {
            return Ok(());
        }
        Err(format!("{}\n{}", set["status"], log(cluster).join("\n")))
    });
}

/// Takes the DaemonSet away, and what else the chart has made; returns when its pods
/// are gone.
pub(crate) fn remove(cluster: &Cluster, values: &Values) {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    for document in rendered(values) {
        let metadata = &document["metadata"];
        cluster.api().delete(
            &text(&document["apiVersion"]),
            &text(&document["kind"]),
            metadata["namespace"].as_str(),
            &text(&metadata["name"]),
            30,
        );
    }
    wait_until("the agent to be gone", || {
        let pods = cluster.api().list("v1", "Pod", Some(NAMESPACE))?;
        if pods.is_empty() {
            Ok(())
        } else {
            Err(format!("{} pods", pods.len()))
        }
    });
}

/// The chart's documents.
fn rendered(values: &Values) -> Vec<Value> {
    let chart = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/chart.py");
    let yaml = output_of(
        python()
            .args([chart, "render", NAME, NAMESPACE, "1.25"])
            .arg(values.to_json().to_string()),
    );
    let to_json = "import json, sys, yaml; print(json.dumps([d for d in yaml.safe_load_all(sys.stdin) if d]))";
    let documents = output_with_input(python().args(["-c", to_json]), &yaml);
    serde_json::from_str(&documents).expect("JSON was asked for")
}

fn python() -> Command {
    let mut command = Command::new("python3");
    command
        .env("PYTHONPATH", variable("SHUNT_HELM"))
        .env("PYTHONDONTWRITEBYTECODE", "1");
    command
}

/// What the agent says of itself.
///
/// # Panics
///
/// When it does not answer within the deadline.
pub(crate) fn status() -> Value {
    wait_until("the agent to answer", try_status)
}

fn try_status() -> Result<Value, String> {
    let mut command = Command::new(agent::binary());
    command.args(["--socket", SOCKET, "status", "--output", "json"]);
    let ran = agent::run(&mut command);
    if !ran.status.success() {
        return Err(ran.stderr);
    }
    serde_json::from_str(&ran.stdout).map_err(|error| format!("{error}: {}", ran.stdout))
}

/// Whether a pod is among the enrolled.
pub(crate) fn is_enrolled(status: &Value, uid: &str) -> bool {
    let pods = status["pods"].as_array();
    pods.into_iter()
        .flatten()
        .any(|pod| pod["pod"]["uid"] == uid)
}

/// Waits until it is.
pub(crate) fn wait_until_enrolled(pod: &Pod<'_>) {
    let uid = pod.uid();
    wait_until("the pod to be enrolled", || {
        let status = try_status()?;
        is_enrolled(&status, &uid)
            .then_some(())
            .ok_or_else(|| status.to_string())
    });
}

/// Kills the agent without a warning, and returns when another is ready.
pub(crate) fn kill_agent(cluster: &Cluster) {
    let agent = agent_pid();
    kill(agent, Signal::SIGKILL).expect("it runs");
    wait_until("another agent to answer", || {
        if find_agent().is_none_or(|found| found == agent) {
            return Err("there is none".to_owned());
        }
        try_status().map(drop)
    });
    wait_until_rolled_out(cluster);
}

/// The process id of the agent.
///
/// # Panics
///
/// When there is none.
pub(crate) fn agent_pid() -> Pid {
    wait_until("the agent's process", || {
        find_agent().ok_or_else(|| "there is none".to_owned())
    })
}

/// The program that the agent runs, byte by byte.
///
/// # Panics
///
/// When there is no agent.
pub(crate) fn agent_program() -> Vec<u8> {
    let link = format!("/proc/{}/exe", agent_pid());
    std::fs::read(&link).unwrap_or_else(|error| panic!("cannot read {link}: {error}"))
}

/// By its command line; processes of the node alone are seen.
fn find_agent() -> Option<Pid> {
    let entries = std::fs::read_dir("/proc")
        .expect("/proc is mounted")
        .flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .find(|pid| {
            std::fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| line.starts_with(b"/shunt\0run\0"))
        })
        .map(Pid::from_raw)
}

/// The last lines of the agents' logs.
pub(crate) fn log(cluster: &Cluster) -> Vec<String> {
    let events = cluster
        .api()
        .list("v1", "Event", Some(NAMESPACE))
        .unwrap_or_default();
    let mut lines: Vec<_> = events
        .iter()
        .map(|event| format!("event {}: {}", event["reason"], event["message"]))
        .collect();
    // A pod that ends takes its log away meanwhile.
    let find = "find /var/log/pods -path '*shunt-system*' -name '*.log' | sort \
                | xargs -r tail -n 60 2>/dev/null; true";
    lines.extend(
        output_of(Command::new("sh").args(["-c", find]))
            .lines()
            .map(str::to_owned),
    );
    lines
}

fn variable(name: &str) -> PathBuf {
    std::env::var_os(name)
        .unwrap_or_else(|| panic!("{name} is not set: run `cargo xtask test --kubernetes`"))
        .into()
}
