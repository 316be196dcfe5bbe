//! What a container runtime does with the plugin.

use std::{
    ffi::OsString,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
};

use serde_json::{Value, json};
use shunt::pods::PodRef;
use shunt_tests::{Netns, agent::binary, leftovers::temp_dir};
use std::sync::Arc;
use tempfile::TempDir;

/// The plugin under test, beside the agent.
fn plugin() -> PathBuf {
    let path = binary().with_file_name("shunt-cni");
    assert!(
        path.is_file(),
        "there is no CNI plugin at {}: `cargo xtask build` makes it",
        path.display()
    );
    path
}

/// What the runtime passes of a pod of a mesh.
pub(super) fn mesh_annotations() -> Value {
    json!({ "io.kubernetes.cri.pod-annotations": { "sidecar.istio.io/status": "{}" } })
}

/// A pod's sandbox, as the runtime speaks of it.
#[derive(Clone)]
pub(super) struct Sandbox {
    pod: String,
    container: String,
    netns: OsString,
    config: Value,
    kubelet: Arc<TempDir>,
}

impl Sandbox {
    /// The sandbox of a pod in the namespace `default`, of no mesh by its annotations.
    pub(super) fn new(netns: &Netns, pod: &str) -> Self {
        let kubelet = Arc::new(temp_dir("kubelet"));
        let config = json!({
            "cniVersion": "1.1.0",
            "name": "pods",
            "type": "shunt-cni",
            "kubeletDir": kubelet.path(),
            "runtimeConfig": {
                "io.kubernetes.cri.pod-annotations": { "kubernetes.io/config.source": "api" }
            },
            "prevResult": {
                "cniVersion": "1.1.0",
                "interfaces": [{ "name": "eth0", "sandbox": netns.path() }],
                "ips": [{ "address": "10.42.0.2/24", "interface": 0 }],
            },
        });
        Self {
            pod: pod.to_owned(),
            container: format!("sandbox-of-{pod}"),
            netns: netns.path().into(),
            config,
            kubelet,
        }
    }

    pub(super) fn pod(&self) -> PodRef {
        PodRef {
            namespace: "default".to_owned(),
            name: self.pod.clone(),
            uid: format!("uid-of-{}", self.pod),
        }
    }

    /// What the plugins before have made.
    pub(super) fn previous(&self) -> Value {
        self.config["prevResult"].clone()
    }

    /// As GC lists it.
    pub(super) fn attachment(&self) -> Value {
        json!({ "containerID": self.container, "ifname": "eth0" })
    }

    /// Where kubelet has the volumes of this pod.
    pub(super) fn kubelet_volumes(&self) -> PathBuf {
        let pods = self.kubelet.path().join("pods");
        pods.join(self.pod().uid).join("volumes")
    }

    /// The same with another field in the configuration.
    pub(super) fn with(&self, field: &str, value: Value) -> Self {
        let mut other = self.clone();
        other.config[field] = value;
        other
    }

    pub(super) fn at_socket(&self, socket: impl AsRef<Path>) -> Self {
        self.with("socket", json!(socket.as_ref()))
    }

    pub(super) fn of_container(&self, container: &str) -> Self {
        Self {
            container: container.to_owned(),
            ..self.clone()
        }
    }

    pub(super) fn in_netns(&self, netns: &str) -> Self {
        Self {
            netns: netns.into(),
            ..self.clone()
        }
    }

    pub(super) fn without_netns(&self) -> Self {
        self.in_netns("")
    }

    /// Calls the plugin.
    pub(super) fn call(&self, command: &str) -> Called {
        let PodRef {
            namespace,
            name,
            uid,
        } = self.pod();
        let arguments = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};\
             K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={uid}",
            self.container
        );
        let mut child = Command::new(plugin())
            .env_clear()
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", &self.container)
            .env("CNI_NETNS", &self.netns)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_ARGS", arguments)
            .env("CNI_PATH", "/opt/cni/bin")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the plugin can be started");
        let mut stdin = child.stdin.take().expect("it was asked for");
        let written = stdin.write_all(self.config.to_string().as_bytes());
        written.expect("the plugin reads its input");
        drop(stdin);
        let output = child.wait_with_output().expect("a child can be waited for");
        assert!(
            output.stderr.is_empty(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        Called {
            status: output.status,
            stdout: String::from_utf8(output.stdout).expect("it is text"),
        }
    }
}

/// What a call of the plugin gave.
#[derive(Debug)]
pub(super) struct Called {
    status: ExitStatus,
    stdout: String,
}

impl Called {
    #[track_caller]
    pub(super) fn succeeded(&self) -> bool {
        assert!(self.status.success(), "{}", self.stdout);
        true
    }

    #[track_caller]
    pub(super) fn succeeded_silently(&self) -> bool {
        self.succeeded() && self.stdout.is_empty()
    }

    /// What it hands on to the next plugin.
    #[track_caller]
    pub(super) fn result(&self) -> Value {
        assert!(self.succeeded());
        serde_json::from_str(&self.stdout).expect("a result is JSON")
    }

    /// The code, and the message with its details.
    #[track_caller]
    pub(super) fn error(&self) -> (u64, String) {
        assert_eq!(self.status.code(), Some(1), "{}", self.stdout);
        let error: Value = serde_json::from_str(&self.stdout).expect("an error is JSON");
        assert_eq!(error["cniVersion"], "1.1.0");
        let text = |field: &str| error[field].as_str().unwrap_or_default().to_owned();
        let says = format!("{}; {}", text("msg"), text("details"));
        (error["code"].as_u64().expect("a code"), says)
    }
}
