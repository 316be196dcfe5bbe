//! A cluster of one node: etcd, Kubernetes' own programs, containerd, and a chain of
//! CNI plugins.

use std::{
    cell::RefCell,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::{Value, json};
use shunt_tests::{
    Process,
    command::output_of,
    deadline::{DEADLINE, wait_until},
    netns::node_command,
};

use crate::{
    api::{Api, is_ready},
    image::Image,
    isolation::{FILES, HOSTNAME},
    network,
};

/// Where Debian's package has the CNI plugins.
const PLUGINS: &str = "/usr/lib/cni";
/// Where the container runtime looks for CNI plugins.
pub(crate) const CNI_BIN: &str = "/opt/cni/bin";
/// Where it looks for their configuration.
pub(crate) const CNI_CONF: &str = "/etc/cni/net.d";
/// The configuration of the cluster's network.
pub(crate) const CONFLIST: &str = "/etc/cni/net.d/10-cluster.conflist";

/// The port of the API server.
pub(crate) const API_PORT: u16 = 6443;
const ETCD: &str = "http://127.0.0.1:2379";
const CONTAINERD: &str = "/run/containerd/containerd.sock";

/// Who may do everything, and who is the node.
const ADMIN_TOKEN: &str = "admin-token";
const KUBELET_TOKEN: &str = "kubelet-token";

/// The running cluster. Its processes end with this one; everything else goes with
/// the namespaces.
pub(crate) struct Cluster {
    etcd: Process,
    apiserver: RefCell<Option<Process>>,
    others: Vec<Process>,
    containerd: Process,
    kubelet: RefCell<Option<Process>>,
    api: Api,
}

impl Cluster {
    /// Starts one, and waits until its node is ready.
    ///
    /// # Panics
    ///
    /// When a program is missing or does not become ready.
    pub(crate) fn start() -> Self {
        network::make();
        write_network();
        write_keys();
        let etcd = start_etcd();
        let containerd = start_containerd();
        let apiserver = start_apiserver();
        let api = Api::connect(&server(), &file("apiserver.crt"), ADMIN_TOKEN);
        wait_for_api(&api, &apiserver);
        for (name, token) in [("admin.conf", ADMIN_TOKEN), ("kubelet.conf", KUBELET_TOKEN)] {
            write_json(&file(name), &kubeconfig(token));
        }
        let cluster = Self {
            etcd,
            apiserver: RefCell::new(Some(apiserver)),
            others: vec![start_controllers(), start_scheduler()],
            containerd,
            kubelet: RefCell::new(None),
            api,
        };
        cluster.start_kubelet();
        cluster.wait_for_node();
        cluster.wait_for_account();
        cluster
    }

    /// The API, as an administrator.
    pub(crate) fn api(&self) -> &Api {
        &self.api
    }

    /// Makes `image` known to the node under its name.
    pub(crate) fn import(&self, image: &Image) {
        let archive = image.archive(&file("image.tar"));
        output_of(
            Command::new("ctr")
                .args(["--namespace", "k8s.io", "images", "import"])
                .arg(&archive),
        );
        fs::remove_file(&archive).expect("it was made here");
    }

    /// Kills the API server, without a warning.
    pub(crate) fn kill_apiserver(&self) {
        self.apiserver.take().expect("it runs").kill();
    }

    /// Starts the API server once more.
    pub(crate) fn restart_apiserver(&self) {
        let apiserver = start_apiserver();
        wait_for_api(&self.api, &apiserver);
        self.apiserver.replace(Some(apiserver));
    }

    /// Ends kubelet and starts it again, as its upgrade does.
    pub(crate) fn restart_kubelet(&self) {
        self.kubelet.take().expect("it runs").stop();
        self.start_kubelet();
    }

    fn start_kubelet(&self) {
        self.kubelet.replace(Some(start_kubelet()));
    }

    /// Drops what etcd remembers of the past, so that a watch from there gets 410.
    pub(crate) fn forget_the_past(&self) {
        let etcdctl = || {
            let mut command = Command::new("etcdctl");
            command.env("ETCDCTL_API", "3").args(["--endpoints", ETCD]);
            command
        };
        let status = output_of(etcdctl().args(["endpoint", "status", "--write-out", "json"]));
        let status: Value = serde_json::from_str(&status).expect("JSON was asked for");
        let revision = status[0]["Status"]["header"]["revision"].to_string();
        output_of(etcdctl().args(["compact", &revision]));
    }

    /// What the programs of the cluster have written, for a failure nobody
    /// understands.
    pub(crate) fn logs(&self) -> String {
        let (apiserver, kubelet) = (self.apiserver.borrow(), self.kubelet.borrow());
        let mut named = vec![
            ("etcd", Some(&self.etcd)),
            ("kube-apiserver", apiserver.as_ref()),
            ("containerd", Some(&self.containerd)),
            ("kubelet", kubelet.as_ref()),
        ];
        named.extend(
            self.others
                .iter()
                .map(|process| ("controllers, scheduler", Some(process))),
        );
        named
            .into_iter()
            .filter_map(|(name, process)| {
                let output = process?.output();
                let lines: Vec<_> = output.lines().collect();
                let last = lines.len().saturating_sub(40);
                Some(format!("--- {name}\n{}\n", lines[last..].join("\n")))
            })
            .collect()
    }

    /// Takes away what a scenario that has failed has left.
    pub(crate) fn clear(&self) {
        if self.apiserver.borrow().is_none() {
            self.restart_apiserver();
        }
        let pods = self.api.list("v1", "Pod", Some("default"));
        for pod in pods.expect("the API server answers") {
            let name = pod["metadata"]["name"].as_str().unwrap_or_default();
            self.api.delete("v1", "Pod", Some("default"), name, 0);
        }
    }

    /// Ends it at once: nothing of it is to be kept, and the API server would wait a
    /// minute for those who watch.
    pub(crate) fn end(self) {
        let Self {
            etcd,
            apiserver,
            others,
            containerd,
            kubelet,
            api: _,
        } = self;
        let running = [
            kubelet.take(),
            apiserver.take(),
            Some(containerd),
            Some(etcd),
        ];
        others
            .into_iter()
            .chain(running.into_iter().flatten())
            .for_each(Process::kill);
    }

    fn wait_for_node(&self) {
        wait_until("the node to be ready", || {
            let node = self.api.get("v1", "Node", None, HOSTNAME)?;
            is_ready(&node)
                .then_some(())
                .ok_or_else(|| node["status"]["conditions"].to_string())
        });
    }

    /// No pod is admitted before the account that it runs under has its token.
    fn wait_for_account(&self) {
        wait_until("the account of the pods", || {
            let account = self
                .api
                .get("v1", "ServiceAccount", Some("default"), "default")?;
            account["secrets"]
                .is_array()
                .then_some(())
                .ok_or_else(|| account.to_string())
        });
    }
}

/// A file of the cluster.
pub(crate) fn file(name: &str) -> PathBuf {
    Path::new(FILES).join(name)
}

/// The URL of the API server.
fn server() -> String {
    format!("https://{}:{API_PORT}", network::NODE)
}

fn write_network() {
    fs::create_dir_all(CNI_BIN).expect("the node's own directory");
    fs::create_dir_all(CNI_CONF).expect("the node's own directory");
    for plugin in ["bridge", "host-local", "loopback", "portmap"] {
        let from = Path::new(PLUGINS).join(plugin);
        fs::copy(&from, Path::new(CNI_BIN).join(plugin)).unwrap_or_else(|error| {
            panic!(
                "there is no {}: {error}; `cargo xtask test --kubernetes` installs it",
                from.display()
            )
        });
    }
    let list = json!({
        "cniVersion": "0.4.0",
        "name": "cluster",
        "plugins": [
            {
                "type": "bridge",
                "bridge": "cni0",
                "isGateway": true,
                "hairpinMode": true,
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{"subnet": network::PODS}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    });
    write_json(Path::new(CONFLIST), &list);
}

/// Who is who, and what accounts' tokens are signed with.
fn write_keys() {
    let tokens = format!(
        "{ADMIN_TOKEN},admin,admin,system:masters\n\
         {KUBELET_TOKEN},system:node:{HOSTNAME},kubelet,system:nodes\n"
    );
    fs::write(file("tokens.csv"), tokens).expect("the node's own directory");
    output_of(
        Command::new("openssl")
            .args(["genrsa", "-out"])
            .arg(file("accounts.key"))
            .arg("2048"),
    );
}

fn kubeconfig(token: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{
            "name": "here",
            "cluster": {"server": server(), "certificate-authority": file("apiserver.crt")},
        }],
        "users": [{"name": "user", "user": {"token": token}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "user"}}],
        "current-context": "here",
    })
}

fn start_etcd() -> Process {
    let mut command = node_command("etcd");
    let peers = "http://127.0.0.1:2380";
    command
        .args(["--data-dir", "/var/lib/etcd"])
        .args([
            "--listen-client-urls",
            ETCD,
            "--advertise-client-urls",
            ETCD,
        ])
        .args([
            "--listen-peer-urls",
            peers,
            "--initial-advertise-peer-urls",
            peers,
        ])
        .args(["--initial-cluster", &format!("default={peers}")]);
    let etcd = Process::spawn("etcd", &mut command);
    etcd.wait_for_line("ready to serve client requests", DEADLINE);
    etcd
}

fn start_apiserver() -> Process {
    let mut command = kubernetes("kube-apiserver");
    command
        .arg(format!("--etcd-servers={ETCD}"))
        .arg(format!("--cert-dir={FILES}"))
        .arg(format!("--secure-port={API_PORT}"))
        .arg(format!("--advertise-address={}", network::NODE))
        .arg(flag("--token-auth-file", "tokens.csv"))
        .arg("--authorization-mode=Node,RBAC")
        .arg("--enable-admission-plugins=NodeRestriction")
        .arg("--service-account-issuer=https://kubernetes.default.svc")
        .arg(flag("--service-account-key-file", "accounts.key"))
        .arg(flag("--service-account-signing-key-file", "accounts.key"))
        .arg("--service-cluster-ip-range=10.96.0.0/16")
        .arg("--kubelet-preferred-address-types=InternalIP")
        .arg("--allow-privileged");
    Process::spawn("kube-apiserver", &mut command)
}

fn start_controllers() -> Process {
    let mut command = kubernetes("kube-controller-manager");
    command
        .arg(flag("--kubeconfig", "admin.conf"))
        .arg(flag("--service-account-private-key-file", "accounts.key"))
        .arg(flag("--root-ca-file", "apiserver.crt"))
        // With the API server gone for a minute it is to go on, as another that
        // takes its place would.
        .arg("--leader-elect=false");
    Process::spawn("kube-controller-manager", &mut command)
}

fn start_scheduler() -> Process {
    let mut command = kubernetes("kube-scheduler");
    command
        .arg(flag("--kubeconfig", "admin.conf"))
        .arg("--leader-elect=false");
    Process::spawn("kube-scheduler", &mut command)
}

fn start_containerd() -> Process {
    let config = file("containerd.toml");
    // A pod's own container ("sandbox") needs nothing but a process that stays.
    let text = format!(
        "version = 2\n\
         [plugins.\"io.containerd.grpc.v1.cri\"]\n\
         sandbox_image = \"{}\"\n\
         restrict_oom_score_adj = true\n",
        crate::image::TOOL
    );
    fs::write(&config, text).expect("the node's own directory");
    let mut command = node_command("containerd");
    command.arg("--config").arg(config);
    let containerd = Process::spawn("containerd", &mut command);
    containerd.wait_for_line("containerd successfully booted", DEADLINE);
    containerd
}

fn start_kubelet() -> Process {
    let config = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "cgroupDriver": "cgroupfs",
        "failSwapOn": false,
        "authentication": {"anonymous": {"enabled": false}, "webhook": {"enabled": true}},
        "authorization": {"mode": "Webhook"},
        // How full the machine's disk is, is not the node's business.
        "evictionHard": {"memory.available": "0%", "nodefs.available": "0%", "imagefs.available": "0%"},
        "imageGCHighThresholdPercent": 100,
        // So that the node is ready soon.
        "nodeStatusUpdateFrequency": "1s",
    });
    write_json(&file("kubelet.yaml"), &config);
    let mut command = kubernetes("kubelet");
    command
        .arg(flag("--kubeconfig", "kubelet.conf"))
        .arg(flag("--config", "kubelet.yaml"))
        .arg("--container-runtime=remote")
        .arg(format!("--container-runtime-endpoint=unix://{CONTAINERD}"))
        .arg(format!("--node-ip={}", network::NODE))
        .arg(format!("--hostname-override={HOSTNAME}"));
    Process::spawn("kubelet", &mut command)
}

fn wait_for_api(api: &Api, apiserver: &Process) {
    wait_until("the API server to be ready", || {
        assert!(
            !apiserver.has_exited(),
            "it has ended: {}",
            apiserver.output()
        );
        // The API server makes it itself, last of all.
        api.get("v1", "Namespace", None, "default").map(drop)
    });
}

/// One of Kubernetes' own programs, as `cargo xtask test --kubernetes` has built it.
fn kubernetes(name: &str) -> Command {
    let directory = std::env::var_os("SHUNT_KUBERNETES").map_or_else(
        || PathBuf::from("/var/cache/shunt/kubernetes/1.20.2"),
        PathBuf::from,
    );
    let program = directory.join(name);
    assert!(
        program.is_file(),
        "there is no {}: `cargo xtask test --kubernetes` builds it, or SHUNT_KUBERNETES says where it is",
        program.display()
    );
    node_command(program)
}

fn flag(name: &str, path: &str) -> String {
    format!("{name}={}", file(path).display())
}

fn write_json(path: &Path, value: &Value) {
    fs::write(path, value.to_string())
        .unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
}
