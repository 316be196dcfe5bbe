//! What the runtime executes: `shunt-cni`.
//!
//! It is called once for each step of a pod's life, does what the CNI specification says,
//! and ends. All that it knows comes by its environment and its standard input.

use std::{
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::mpsc,
    thread,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::{
    CHECK_SINCE, DEFAULT_KUBELET_DIR, GC_SINCE, VERSIONS,
    protocol::{Attachment, CniRequest, PodNetwork},
    sidecar::{self, Annotations},
    version_numbers,
};
use crate::{
    control::{DEFAULT_SOCKET, Reply, Request, ask_once},
    pods::PodRef,
    settings::process_env,
};

/// How long the agent may take for an answer. Kubelet gives the runtime 4 minutes for a
/// pod's sandbox, and tries again.
const LONGEST_ANSWER: Duration = Duration::from_secs(30);

/// The newest version: that of answers to who names none.
const NEWEST: &str = VERSIONS[VERSIONS.len() - 1];

/// Serves one call of the runtime.
pub fn main() -> ExitCode {
    let mut config = Vec::new();
    let read = std::io::stdin().read_to_end(&mut config);
    let done = read
        .map_err(|error| Refusal::new(Code::Io, format!("cannot read standard input: {error}")))
        .and_then(|_length| run(&process_env, &config));
    let (text, exit) = match done {
        Ok(text) => (text, ExitCode::SUCCESS),
        Err(refusal) => (refusal.written(&config), ExitCode::FAILURE),
    };
    // Nobody is left to be told when that fails.
    let written = std::io::stdout().write_all(text.as_bytes());
    if written.is_ok() {
        exit
    } else {
        ExitCode::FAILURE
    }
}

/// Why a call fails, as runtimes sort it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum Code {
    Version = 1,
    Environment = 4,
    Io = 5,
    Decode = 6,
    Config = 7,
    TryAgain = 11,
    NotAvailable = 50,
    /// The plugin's own: the agent could not do it.
    Agent = 100,
}

/// A call that fails.
#[derive(Debug)]
struct Refusal {
    code: Code,
    message: String,
    details: String,
}

impl Refusal {
    fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            details: String::new(),
        }
    }

    fn with_details(mut self, details: impl Into<String>) -> Self {
        self.details = details.into();
        self
    }

    /// As the runtime reads it, of the version that `config` names.
    fn written(&self, config: &[u8]) -> String {
        #[derive(Serialize)]
        struct Written<'a> {
            #[serde(rename = "cniVersion")]
            version: &'a str,
            code: u32,
            msg: &'a str,
            #[serde(skip_serializing_if = "str::is_empty")]
            details: &'a str,
        }
        let named = serde_json::from_slice::<VersionOnly>(config).ok();
        let version = named.and_then(|named| named.version);
        let written = Written {
            version: version.as_deref().unwrap_or(NEWEST),
            code: self.code as u32,
            msg: &self.message,
            details: &self.details,
        };
        // Texts and a number cannot fail to be JSON.
        serde_json::to_string(&written).unwrap_or_default() + "\n"
    }
}

type Result<T> = std::result::Result<T, Refusal>;

#[derive(Deserialize)]
struct VersionOnly {
    #[serde(rename = "cniVersion")]
    version: Option<String>,
}

/// What comes by standard input, as far as it matters here.
#[derive(Deserialize)]
struct Config<'a> {
    /// Who names none speaks 0.1.0.
    #[serde(rename = "cniVersion", default = "oldest")]
    version: String,
    #[serde(default)]
    name: String,
    #[serde(default = "default_socket")]
    socket: PathBuf,
    #[serde(rename = "kubeletDir", default = "default_kubelet_dir")]
    kubelet_dir: PathBuf,
    /// What the plugins before this one have made, handed on as it is written.
    #[serde(rename = "prevResult", default, borrow)]
    previous: Option<&'a RawValue>,
    #[serde(rename = "runtimeConfig", default)]
    runtime: Option<RuntimeConfig>,
    #[serde(rename = "cni.dev/valid-attachments")]
    valid: Option<Vec<Valid>>,
}

/// What the entry's capabilities ask the runtime for.
#[derive(Default, Deserialize)]
struct RuntimeConfig {
    #[serde(rename = "io.kubernetes.cri.pod-annotations", default)]
    annotations: Option<Annotations>,
}

#[derive(Deserialize)]
struct Valid {
    #[serde(rename = "containerID")]
    container: String,
    #[serde(rename = "ifname")]
    interface: String,
}

fn oldest() -> String {
    "0.1.0".to_owned()
}

fn default_socket() -> PathBuf {
    DEFAULT_SOCKET.into()
}

fn default_kubelet_dir() -> PathBuf {
    DEFAULT_KUBELET_DIR.into()
}

impl<'a> Config<'a> {
    fn read(json: &'a [u8]) -> Result<Self> {
        let config: Self = serde_json::from_slice(json).map_err(|error| {
            Refusal::new(
                Code::Decode,
                "the network configuration on standard input cannot be understood; look at \
                 shunt-cni's entry in the list of plugins",
            )
            .with_details(error.to_string())
        })?;
        if !VERSIONS.contains(&config.version.as_str()) {
            let says = format!("CNI {:?} is not spoken here", config.version);
            return Err(Refusal::new(Code::Version, says)
                .with_details(format!("shunt-cni speaks {}", VERSIONS.join(", "))));
        }
        if config.name.is_empty() {
            return Err(Refusal::new(Code::Config, "the network has no name"));
        }
        Ok(config)
    }

    /// Refuses a command that the configuration's version does not have yet.
    fn since(&self, version: &str, command: &str) -> Result<()> {
        if version_numbers(&self.version) >= version_numbers(version) {
            return Ok(());
        }
        Err(Refusal::new(
            Code::Version,
            format!(
                "CNI {} has no {command}; it came with {version}",
                self.version
            ),
        ))
    }

    fn previous(&self) -> Result<&'a RawValue> {
        self.previous.ok_or_else(|| {
            Refusal::new(
                Code::Config,
                "there is no prevResult: shunt-cni makes no network, so it has to come after \
                 a plugin that does, in one list",
            )
        })
    }
}

/// What comes by the environment.
struct Environment<'a>(&'a dyn Fn(&str) -> Option<String>);

impl Environment<'_> {
    fn optional(&self, name: &str) -> Option<String> {
        (self.0)(name).filter(|text| !text.is_empty())
    }

    fn required(&self, name: &str) -> Result<String> {
        self.optional(name)
            .ok_or_else(|| Refusal::new(Code::Environment, format!("{name} is not set")))
    }

    fn attachment(&self, network: &str) -> Result<Attachment> {
        let container = self.required("CNI_CONTAINERID")?;
        let is_alphanumeric = |c: char| c.is_ascii_alphanumeric();
        let may_follow = |c| is_alphanumeric(c) || "_.-".contains(c);
        if !container.starts_with(is_alphanumeric) || !container.chars().all(may_follow) {
            let says = format!("CNI_CONTAINERID={container:?} is no container id");
            return Err(Refusal::new(Code::Environment, says));
        }
        let interface = self.required("CNI_IFNAME")?;
        let is_name = interface.len() < 16
            && ![".", ".."].contains(&interface.as_str())
            && !interface.contains(|c: char| "/:".contains(c) || c.is_whitespace());
        if !is_name {
            let says = format!("CNI_IFNAME={interface:?} is no name of an interface");
            return Err(Refusal::new(Code::Environment, says));
        }
        Ok(Attachment {
            network: network.to_owned(),
            container,
            interface,
        })
    }

    /// The pod that a container belongs to; `None` when it is none of Kubernetes'.
    fn pod(&self) -> Result<Option<PodRef>> {
        let arguments = self.optional("CNI_ARGS").unwrap_or_default();
        let value = |wanted: &str| {
            let mut pairs = arguments.split(';').filter_map(|pair| pair.split_once('='));
            let found = pairs.find(|(key, _)| key.trim() == wanted);
            found.map(|(_, value)| value.trim().to_owned())
        };
        let (Some(namespace), Some(name)) = (value("K8S_POD_NAMESPACE"), value("K8S_POD_NAME"))
        else {
            return Ok(None);
        };
        let uid = value("K8S_POD_UID").filter(|uid| !uid.is_empty());
        let uid = uid.ok_or_else(|| {
            Refusal::new(
                Code::Environment,
                "CNI_ARGS has no K8S_POD_UID; it takes a runtime that passes it, as containerd \
                 and CRI-O do since 2021",
            )
        })?;
        Ok(Some(PodRef {
            namespace,
            name,
            uid,
        }))
    }
}

/// Serves a call; the text is for standard output.
fn run(env: &dyn Fn(&str) -> Option<String>, json: &[u8]) -> Result<String> {
    let env = Environment(env);
    let command = env.required("CNI_COMMAND")?;
    match command.as_str() {
        "ADD" => add(&env, &Config::read(json)?),
        "DEL" => delete(&env, &Config::read(json)?),
        "CHECK" => check(&env, &Config::read(json)?),
        "GC" => collect(&Config::read(json)?),
        "STATUS" => status(&Config::read(json)?),
        "VERSION" => Ok(version(json)),
        other => Err(Refusal::new(
            Code::Environment,
            format!("CNI_COMMAND={other:?} is no command"),
        )),
    }
}

fn add(env: &Environment<'_>, config: &Config<'_>) -> Result<String> {
    let attachment = env.attachment(&config.name)?;
    let netns = env.required("CNI_NETNS")?;
    let previous = config.previous()?;
    if let Some(pod) = env.pod()? {
        let network = PodNetwork {
            attachment,
            netns: netns.into(),
            pod: pod.clone(),
        };
        settle(config, &pod, CniRequest::Add(network))?;
    }
    Ok(format!("{}\n", previous.get()))
}

fn check(env: &Environment<'_>, config: &Config<'_>) -> Result<String> {
    config.since(CHECK_SINCE, "CHECK")?;
    let attachment = env.attachment(&config.name)?;
    let netns = env.required("CNI_NETNS")?;
    config.previous()?;
    if let Some(pod) = env.pod()? {
        let network = PodNetwork {
            attachment,
            netns: netns.into(),
            pod: pod.clone(),
        };
        settle(config, &pod, CniRequest::Check(network))?;
    }
    Ok(String::new())
}

/// Has the agent see to a pod. Where it cannot, a pod of a mesh has to wait, and no other.
fn settle(config: &Config<'_>, pod: &PodRef, request: CniRequest) -> Result<()> {
    let why = match ask(&config.socket, request) {
        Ok(Reply::Undecided(why)) => why,
        Ok(Reply::Failed(why)) => return Err(failed(pod, &why)),
        Ok(Reply::Done | Reply::Status(_)) => return Ok(()),
        Err(why) => why,
    };
    let no_annotations = Annotations::new();
    let runtime = config.runtime.as_ref();
    let annotations = runtime
        .and_then(|runtime| runtime.annotations.as_ref())
        .unwrap_or(&no_annotations);
    match sidecar::mesh_of(pod, annotations, &config.kubelet_dir) {
        Ok(None) => Ok(()),
        Ok(Some(mesh)) => Err(waits(pod, &format!("it has the sidecar of {mesh}"), &why)),
        Err(error) => Err(waits(
            pod,
            &format!("it may be of a mesh, which cannot be told without the agent: {error:#}"),
            &why,
        )),
    }
}

/// What kubelet shows of a pod that is held up.
fn waits(pod: &PodRef, because: &str, agent: &str) -> Refusal {
    Refusal::new(
        Code::TryAgain,
        format!(
            "shunt: {pod} waits for the node's shunt agent, so as not to run \
             without redirection; {because}. Look at the shunt pod of this node; kubelet tries \
             again by itself"
        ),
    )
    .with_details(agent)
}

fn failed(pod: &PodRef, why: &str) -> Refusal {
    Refusal::new(
        Code::Agent,
        format!(
            "shunt: the agent cannot redirect {pod}, and the mesh has given it a \
             sidecar: {why}"
        ),
    )
}

/// Always succeeds when the call makes sense: with the agent away, what it has enrolled ends
/// with the namespace.
fn delete(env: &Environment<'_>, config: &Config<'_>) -> Result<String> {
    let attachment = env.attachment(&config.name)?;
    let netns = env.optional("CNI_NETNS").map(PathBuf::from);
    // The agent has logged what it could not do.
    let _ = ask(&config.socket, CniRequest::Del { attachment, netns });
    Ok(String::new())
}

fn collect(config: &Config<'_>) -> Result<String> {
    config.since(GC_SINCE, "GC")?;
    let Some(valid) = &config.valid else {
        return Err(Refusal::new(
            Code::Config,
            "there is no cni.dev/valid-attachments, so what is left over cannot be told",
        ));
    };
    let valid = valid.iter().map(|valid| Attachment {
        network: config.name.clone(),
        container: valid.container.clone(),
        interface: valid.interface.clone(),
    });
    let request = CniRequest::Gc {
        network: config.name.clone(),
        valid: valid.collect(),
    };
    // As with DEL.
    let _ = ask(&config.socket, request);
    Ok(String::new())
}

/// Whether ADD can be served. It can with the agent away, too, but for the pods of a mesh: a
/// runtime that hears otherwise takes the node out of service, and with it the pods that
/// need nothing of this plugin.
fn status(config: &Config<'_>) -> Result<String> {
    config.since(GC_SINCE, "STATUS")?;
    match ask(&config.socket, CniRequest::Status) {
        Ok(Reply::Done) => Ok(String::new()),
        Ok(_) | Err(_) if sidecar::can_tell(&config.kubelet_dir) => Ok(String::new()),
        Ok(reply) => Err(not_available(&format!("{reply:?}"))),
        Err(why) => Err(not_available(&why)),
    }
}

fn not_available(why: &str) -> Refusal {
    Refusal::new(
        Code::NotAvailable,
        "shunt: the node's agent does not serve, and which pods are of a mesh cannot be told \
         without it; look at the shunt pod of this node, and at --kubelet-dir",
    )
    .with_details(why)
}

fn version(json: &[u8]) -> String {
    #[derive(Serialize)]
    struct Written<'a> {
        #[serde(rename = "cniVersion")]
        version: &'a str,
        #[serde(rename = "supportedVersions")]
        supported: &'a [&'a str],
    }
    let named = serde_json::from_slice::<VersionOnly>(json).ok();
    let named = named.and_then(|named| named.version);
    let written = Written {
        version: named.as_deref().unwrap_or(NEWEST),
        supported: &VERSIONS,
    };
    // Texts cannot fail to be JSON.
    serde_json::to_string(&written).unwrap_or_default() + "\n"
}

/// Asks the agent, but not for ever. An error says why there is no answer.
fn ask(socket: &Path, request: CniRequest) -> std::result::Result<Reply, String> {
    let (answer, wait) = mpsc::channel();
    let place = socket.to_owned();
    thread::spawn(move || {
        let asked = ask_once(&place, &Request::Cni(request));
        // Nobody waits any more when it took too long.
        let _ = answer.send(asked.map_err(|error| format!("{error:#}")));
    });
    wait.recv_timeout(LONGEST_ANSWER).unwrap_or_else(|_late| {
        Err(format!(
            "the agent at {} has not answered in {LONGEST_ANSWER:?}",
            socket.display()
        ))
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::{Value, json};

    use super::*;

    const POD: &str = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart;K8S_POD_UID=u-1;\
                       K8S_POD_INFRA_CONTAINER_ID=abc";

    fn environment(command: &str) -> Vec<(&'static str, String)> {
        vec![
            ("CNI_COMMAND", command.to_owned()),
            ("CNI_CONTAINERID", "abc".to_owned()),
            ("CNI_NETNS", "/run/netns/shunt-none".to_owned()),
            ("CNI_IFNAME", "eth0".to_owned()),
            ("CNI_ARGS", POD.to_owned()),
            ("CNI_PATH", "/opt/cni/bin".to_owned()),
        ]
    }

    /// A configuration whose agent is away.
    fn config() -> Value {
        json!({
            "cniVersion": "1.1.0", "name": "net", "type": "shunt-cni",
            "socket": "/nowhere/shunt.sock", "kubeletDir": "/nowhere",
            "prevResult": { "cniVersion": "1.1.0", "ips": [{ "address": "10.0.0.2/24" }] },
            "runtimeConfig": { "io.kubernetes.cri.pod-annotations": { "any": "thing" } },
        })
    }

    fn called(env: &[(&str, String)], config: &Value) -> std::result::Result<String, Value> {
        let get = |name: &str| {
            let found = env.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| value.clone())
        };
        let json = config.to_string().into_bytes();
        run(&get, &json).map_err(|refusal| {
            serde_json::from_str(&refusal.written(&json)).expect("an error is JSON")
        })
    }

    #[track_caller]
    fn refused(env: &[(&str, String)], config: &Value, code: u32, says: &str) {
        let error = called(env, config).expect_err("it makes no sense");
        let text = error.to_string();
        assert_eq!(error["code"], code, "{text}");
        assert!(text.contains(says), "{text}");
    }

    fn with(field: &str, value: Value) -> Value {
        let mut config = config();
        config[field] = value;
        config
    }

    #[test]
    fn the_versions_are_told_in_the_asked_one() {
        let env = [("CNI_COMMAND", "VERSION".to_owned())];
        for (config, version) in [
            (json!({ "cniVersion": "0.4.0" }), "0.4.0"),
            (json!(null), "1.1.0"),
        ] {
            let text = called(&env, &config).expect("there is an answer");
            let told: Value = serde_json::from_str(&text).expect("it is JSON");
            assert_eq!(told["cniVersion"], version);
            assert_eq!(told["supportedVersions"], json!(VERSIONS));
        }
    }

    #[test]
    fn with_the_agent_away_only_pods_of_a_mesh_wait() {
        let env = environment("ADD");
        let text = called(&env, &config()).expect("it is of no mesh");
        let result: Value = serde_json::from_str(&text).expect("it is JSON");
        assert_eq!(result, config()["prevResult"]);

        let annotations =
            json!({ "io.kubernetes.cri.pod-annotations": { "sidecar.istio.io/status": "{}" } });
        let mesh = with("runtimeConfig", annotations);
        refused(
            &env,
            &mesh,
            11,
            "shop/cart waits for the node's shunt agent",
        );
        refused(&env, &mesh, 11, "no agent serves at /nowhere/shunt.sock");
        refused(&environment("CHECK"), &mesh, 11, "the sidecar of Istio");

        // Neither annotations nor a kubelet: it cannot be told.
        let unknown = with("runtimeConfig", json!(null));
        refused(&env, &unknown, 11, "--kubelet-dir");
        // Not a pod at all.
        let mut alone = environment("ADD");
        alone.retain(|(name, _)| *name != "CNI_ARGS");
        assert!(called(&alone, &unknown).is_ok());
    }

    #[test]
    fn what_is_there_before_is_handed_on_as_it_is_written() {
        let written = r#"{ "cniVersion" : "0.3.1", "big": 12345678901234567890123, "ips":[ ] }"#;
        let config = format!(
            r#"{{"cniVersion":"0.3.1","name":"n","socket":"/nowhere/s","prevResult": {written},
                "runtimeConfig":{{"io.kubernetes.cri.pod-annotations":{{"a":"b"}}}}}}"#
        );
        let env = environment("ADD");
        let get = |name: &str| {
            let found = env.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| value.clone())
        };
        let text = run(&get, config.as_bytes()).expect("it is of no mesh");
        assert_eq!(text.trim_end(), written);
    }

    #[test]
    fn with_the_agent_away_it_is_gone_all_the_same() {
        for netns in ["/run/netns/shunt-none", ""] {
            let mut env = environment("DEL");
            env.retain(|(name, _)| *name != "CNI_NETNS");
            env.push(("CNI_NETNS", netns.to_owned()));
            for _ in 0..5 {
                let mut config = config();
                config.as_object_mut().expect("fields").remove("prevResult");
                assert_eq!(called(&env, &config).expect("always"), "");
            }
        }
        let valid = json!([{ "containerID": "abc", "ifname": "eth0" }]);
        let config = with("cni.dev/valid-attachments", valid);
        assert_eq!(called(&environment("GC"), &config).expect("always"), "");
    }

    #[test]
    fn status_fails_only_when_nothing_can_be_told() {
        refused(&environment("STATUS"), &config(), 50, "no agent serves at");
        let kubelet = tempfile::tempdir().expect("a directory");
        fs::create_dir(kubelet.path().join("pods")).expect("a new directory");
        let config = with("kubeletDir", json!(kubelet.path()));
        assert_eq!(
            called(&environment("STATUS"), &config).expect("it can be told"),
            ""
        );
    }

    #[test]
    fn versions_have_what_they_have() {
        for (command, version, since) in [
            ("CHECK", "0.3.1", "0.4.0"),
            ("GC", "1.0.0", "1.1.0"),
            ("STATUS", "1.0.0", "1.1.0"),
        ] {
            let old = with("cniVersion", json!(version));
            refused(&environment(command), &old, 1, since);
        }
        for version in ["0.2.0", "1.2.0", "x"] {
            let config = with("cniVersion", json!(version));
            refused(&environment("ADD"), &config, 1, "speaks 0.3.0, 0.3.1");
        }
        let mut none = config();
        none.as_object_mut().expect("fields").remove("cniVersion");
        refused(&environment("ADD"), &none, 1, "0.1.0");
    }

    #[test]
    fn calls_that_make_no_sense_are_refused_by_their_code() {
        for (name, value, says) in [
            ("CNI_COMMAND", "", "CNI_COMMAND is not set"),
            ("CNI_COMMAND", "JUMP", "JUMP"),
            ("CNI_CONTAINERID", "", "CNI_CONTAINERID is not set"),
            ("CNI_CONTAINERID", "-a", "is no container id"),
            ("CNI_CONTAINERID", "a/b", "is no container id"),
            ("CNI_IFNAME", "", "CNI_IFNAME is not set"),
            (
                "CNI_IFNAME",
                "a-name-that-is-long",
                "is no name of an interface",
            ),
            ("CNI_IFNAME", "..", "is no name of an interface"),
            ("CNI_IFNAME", "a:0", "is no name of an interface"),
            ("CNI_NETNS", "", "CNI_NETNS is not set"),
            (
                "CNI_ARGS",
                "K8S_POD_NAMESPACE=a;K8S_POD_NAME=b",
                "K8S_POD_UID",
            ),
        ] {
            let mut env = environment("ADD");
            env.retain(|(key, _)| *key != name);
            env.push((name, value.to_owned()));
            refused(&env, &config(), 4, says);
        }
        for command in ["ADD", "CHECK"] {
            let alone = with("prevResult", json!(null));
            refused(&environment(command), &alone, 7, "prevResult");
        }
        refused(&environment("ADD"), &with("name", json!("")), 7, "no name");
        refused(&environment("GC"), &config(), 7, "valid-attachments");
        refused(
            &environment("ADD"),
            &json!("text"),
            6,
            "cannot be understood",
        );
        refused(&environment("DEL"), &with("socket", json!(7)), 6, "integer");
    }
}
