//! Pods, with a sidecar and without.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use shunt_tests::{deadline::wait_until, envoy};

use crate::{api::is_ready, cluster::Cluster, image};

/// The port of applications.
pub(crate) const PORT: u16 = 8080;
/// A port that Istio's settings leave alone, for what the test itself wants of a pod.
pub(crate) const CONTROL: u16 = 15020;

const NAMESPACE: &str = "default";

/// What Envoy's clusters get, so that it puts a line of the PROXY protocol before
/// what it passes on from its application.
const HEADER: &str = "transport_socket: {name: header, typed_config: {\
    \"@type\": type.googleapis.com/envoy.extensions.transport_sockets.proxy_protocol.v3.ProxyProtocolUpstreamTransport, \
    config: {version: V1}, \
    transport_socket: {name: raw, typed_config: {\"@type\": type.googleapis.com/envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer}}}}";

/// The description of a pod.
#[derive(Clone)]
pub(crate) struct Manifest(Value);

impl Manifest {
    /// A pod of no mesh, whose application is the tool with these arguments.
    pub(crate) fn plain(name: &str, application: &[&str]) -> Self {
        Self(json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": NAMESPACE, "annotations": {}},
            "spec": {
                "terminationGracePeriodSeconds": 1,
                "dnsPolicy": "Default",
                "containers": [container("application", "/pod-tool", application, 1000)],
            },
        }))
    }

    /// The same with what Istio's injector adds: Envoy, before the application, which
    /// starts when Envoy listens.
    pub(crate) fn in_mesh(name: &str, application: &[&str]) -> Self {
        let mut manifest = Self::plain(name, application);
        let Self(pod) = &mut manifest;
        pod["metadata"]["annotations"]["sidecar.istio.io/status"] = json!("{}");
        let mut proxy = container(
            "istio-proxy",
            "/envoy",
            &[
                "--config-yaml",
                &proxy_config(),
                "--disable-hot-restart",
                "--concurrency",
                "2",
                "--log-level",
                "warning",
                "--file-flush-interval-msec",
                "10",
            ],
            1337,
        );
        proxy["lifecycle"] = json!({"postStart": {"exec": {
            "command": ["/pod-tool", "wait", &format!("127.0.0.1:{}", envoy::HEALTH_PORT)],
        }}});
        // By this volume the CNI plugin knows the pod when nobody can be asked.
        proxy["volumeMounts"] = json!([{"name": "istio-envoy", "mountPath": "/etc/istio/proxy"}]);
        pod["spec"]["volumes"] = json!([{"name": "istio-envoy", "emptyDir": {"medium": "Memory"}}]);
        let containers = pod["spec"]["containers"].as_array_mut();
        containers.expect("it was made above").insert(0, proxy);
        manifest
    }

    /// The same with the tool run to its end before any other container is started.
    pub(crate) fn first_running(mut self, arguments: &[&str]) -> Self {
        self.0["spec"]["initContainers"] =
            json!([container("first", "/pod-tool", arguments, 1000)]);
        self
    }

    fn name(&self) -> &str {
        self.0["metadata"]["name"].as_str().expect("it has a name")
    }
}

/// The sidecar's configuration, in which kubelet puts the pod's address.
fn proxy_config() -> String {
    let pod = "$(POD_IP)";
    let config = envoy::config_for(pod);
    let clusters = ["{name: pass, ", "name: service\n"];
    let [pass, service] = clusters.map(|begin| {
        assert_eq!(
            config.matches(begin).count(),
            1,
            "the fixture has one {begin:?}"
        );
        begin
    });
    config
        .replace(pass, &format!("{pass}{HEADER}, "))
        .replace(service, &format!("{service}    {HEADER}\n"))
}

fn container(name: &str, program: &str, arguments: &[&str], user: u32) -> Value {
    json!({
        "name": name,
        "image": image::TOOL,
        "imagePullPolicy": "Never",
        "command": [program],
        "args": arguments,
        "env": [{
            "name": "POD_IP",
            "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}},
        }],
        "securityContext": {
            "runAsUser": user,
            "runAsGroup": user,
            "capabilities": {"drop": ["ALL"]},
        },
    })
}

/// A pod that exists; on drop it is taken away.
pub(crate) struct Pod<'a> {
    cluster: &'a Cluster,
    name: String,
}

impl<'a> Pod<'a> {
    /// Makes the pod, and waits until it is ready.
    ///
    /// # Panics
    ///
    /// When it does not become ready.
    pub(crate) fn start(cluster: &'a Cluster, manifest: &Manifest) -> Self {
        let pod = Self::create(cluster, manifest);
        pod.wait_until_ready();
        pod
    }

    /// Makes the pod.
    pub(crate) fn create(cluster: &'a Cluster, manifest: &Manifest) -> Self {
        cluster.api().apply(&manifest.0);
        Self {
            cluster,
            name: manifest.name().to_owned(),
        }
    }

    /// Waits until all of its containers run.
    pub(crate) fn wait_until_ready(&self) {
        wait_until(&format!("pod {} to be ready", self.name), || {
            let pod = self.get()?;
            is_ready(&pod)
                .then_some(())
                .ok_or_else(|| format!("{}\n{}", pod["status"], self.events().join("\n")))
        });
    }

    /// Whether it is ready, as the API server has it.
    pub(crate) fn has_started(&self) -> bool {
        self.get()
            .is_ok_and(|pod| pod["status"]["podIP"].is_string())
    }

    /// Its unique id.
    pub(crate) fn uid(&self) -> String {
        let pod = self.get().expect("it exists");
        let uid = pod["metadata"]["uid"].as_str();
        uid.expect("the API server gives one").to_owned()
    }

    /// Its address.
    ///
    /// # Panics
    ///
    /// When it has none yet.
    pub(crate) fn ip(&self) -> IpAddr {
        let pod = self.get().expect("it exists");
        let ip = pod["status"]["podIP"].as_str();
        ip.and_then(|ip| ip.parse().ok()).expect("it is ready")
    }

    /// The address of its application.
    pub(crate) fn address(&self) -> SocketAddr {
        (self.ip(), PORT).into()
    }

    /// Reasons and messages of the events on it.
    pub(crate) fn events(&self) -> Vec<String> {
        let events = self.cluster.api().list("v1", "Event", Some(NAMESPACE));
        let of_this = events.unwrap_or_default().into_iter();
        of_this
            .filter(|event| event["involvedObject"]["name"] == self.name.as_str())
            .map(|event| {
                let text = |name: &str| event[name].as_str().unwrap_or_default().to_owned();
                format!("{}: {}", text("reason"), text("message"))
            })
            .collect()
    }

    /// What a container has written so far, as kubelet keeps it.
    pub(crate) fn log(&self, container: &str) -> Vec<String> {
        let directory = format!("/var/log/pods/{NAMESPACE}_{}_{}", self.name, self.uid());
        let mut files = files(&Path::new(&directory).join(container));
        files.sort();
        let texts = files
            .iter()
            .map(|file| fs::read_to_string(file).unwrap_or_default());
        // `TIME STREAM F text`
        texts
            .flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>())
            .filter_map(|line| Some(line.splitn(4, ' ').nth(3)?.to_owned()))
            .collect()
    }

    /// Waits for a line of a container's log that is JSON and about `server`.
    pub(crate) fn outcome(&self, container: &str, server: SocketAddr) -> Outcome {
        let to = server.to_string();
        wait_until(&format!("{} to have called {to}", self.name), || {
            let lines = self.log(container);
            let found = lines.iter().find_map(|line| {
                let value: Value = serde_json::from_str(line).ok()?;
                (value["to"] == to.as_str()).then_some(Outcome(value))
            });
            found.ok_or_else(|| lines.join("\n"))
        })
    }

    /// Wants it to be gone, and waits until it is.
    pub(crate) fn delete(self) {
        Self::delete_all([self]);
    }

    /// Wants all of them to be gone, and waits until they are. One at a time each would wait
    /// for kubelet to look, which it does every 10 seconds.
    pub(crate) fn delete_all(pods: impl IntoIterator<Item = Self>) {
        let leaving: Vec<_> = pods
            .into_iter()
            // Dropped, one is wanted to be gone.
            .map(|pod| (pod.cluster, pod.name.clone()))
            .collect();
        for (cluster, name) in leaving {
            wait_until(&format!("pod {name} to be gone"), || {
                match cluster.api().get("v1", "Pod", Some(NAMESPACE), &name) {
                    Ok(pod) => Err(pod["status"]["phase"].to_string()),
                    Err(_gone) => Ok(()),
                }
            });
        }
    }

    fn get(&self) -> Result<Value, String> {
        self.cluster
            .api()
            .get("v1", "Pod", Some(NAMESPACE), &self.name)
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.cluster
                .api()
                .delete("v1", "Pod", Some(NAMESPACE), &self.name, 1);
        }
    }
}

/// How a call of the tool has ended.
#[derive(Debug)]
pub(crate) struct Outcome(Value);

impl Outcome {
    /// Whether the client's proxy has passed it on, to where the client wanted.
    pub(crate) fn left_through_proxy(&self) -> bool {
        self.0["answer"]["header"].is_string()
    }

    /// Whether the server's proxy has.
    pub(crate) fn arrived_through_proxy(&self) -> bool {
        let peer = self.0["answer"]["peer"].as_str();
        peer.is_some_and(|peer| peer.starts_with("127.0.0.6:"))
    }

    /// Why there was no connection, if there was none.
    pub(crate) fn error(&self) -> Option<&str> {
        self.0["error"].as_str()
    }
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}
