//! What is kept of a pod of the API.

use std::collections::BTreeMap;

use k8s_openapi::{api::core::v1 as api, apimachinery::pkg::apis::meta::v1::ObjectMeta};

use super::PodRef;
use crate::settings::Mesh;

/// A pod, trimmed to what decides whether and how it is redirected.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    /// Which one.
    pub id: PodRef,
    /// Its labels, as far as they are of a mesh or of shunt.
    pub labels: BTreeMap<String, String>,
    /// Its annotations, as far as they are of a mesh or of shunt.
    pub annotations: BTreeMap<String, String>,
    /// It has the network of the node.
    pub host_network: bool,
    /// All of its containers have ended for good, and with them its network.
    pub finished: bool,
    /// Its containers and native sidecars with the name of a mesh's sidecar.
    pub sidecars: Vec<Container>,
    /// Where it gets its nameservers from.
    pub dns: Dns,
}

/// A container that may be a sidecar.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Container {
    /// Its name.
    pub name: String,
    /// Its arguments, the first two.
    pub args: Vec<String>,
    /// Its environment, as far as it is given in the manifest itself and is looked
    /// at.
    pub env: BTreeMap<String, String>,
    /// `runAsUser` of the container.
    pub user: Option<i64>,
    /// `runAsGroup` of the container.
    pub group: Option<i64>,
}

/// What a pod says of its resolvers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dns {
    /// Where the first of them come from.
    pub policy: DnsPolicy,
    /// `dnsConfig.nameservers`: behind those, as they were written.
    pub nameservers: Vec<String>,
}

/// `dnsPolicy`, as far as it makes a difference for a pod with a network of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DnsPolicy {
    /// Those of the cluster.
    #[default]
    Cluster,
    /// Those of the node.
    Node,
    /// None but those of `dnsConfig`.
    None,
}

/// The environment variables of a sidecar that are looked at.
pub(super) const SIDECAR_ENV: [&str; 5] = [
    "DISABLE_ENVOY",
    "INVALID_DROP",
    "ISTIO_DUAL_STACK",
    "ISTIO_META_DNS_CAPTURE",
    "ISTIO_META_INTERCEPTION_MODE",
];

impl Pod {
    /// Trims a pod as the API gives it. `None` for one without namespace, name or
    /// uid, which the API never gives.
    pub fn trimmed(pod: api::Pod) -> Option<Self> {
        let id = reference(&pod.metadata)?;
        let spec = pod.spec.unwrap_or_default();
        let phase = pod.status.and_then(|status| status.phase);
        let native = spec.init_containers.into_iter().flatten();
        let native = native.filter(|one| one.restart_policy.as_deref() == Some("Always"));
        Some(Self {
            id,
            labels: of_meshes(pod.metadata.labels),
            annotations: of_meshes(pod.metadata.annotations),
            host_network: spec.host_network == Some(true),
            finished: matches!(phase.as_deref(), Some("Succeeded" | "Failed")),
            sidecars: spec
                .containers
                .into_iter()
                .chain(native)
                .filter(|one| is_sidecar(&one.name))
                .map(container)
                .collect(),
            dns: Dns {
                policy: match spec.dns_policy.as_deref() {
                    Some("None") => DnsPolicy::None,
                    Some("Default") => DnsPolicy::Node,
                    _ => DnsPolicy::Cluster,
                },
                nameservers: spec
                    .dns_config
                    .and_then(|config| config.nameservers)
                    .unwrap_or_default(),
            },
        })
    }
}

/// Which pod it is that has this metadata.
pub(super) fn reference(metadata: &ObjectMeta) -> Option<PodRef> {
    Some(PodRef {
        namespace: metadata.namespace.clone()?,
        name: metadata.name.clone()?,
        uid: metadata.uid.clone()?,
    })
}

fn is_sidecar(name: &str) -> bool {
    Mesh::ALL.into_iter().any(|mesh| mesh.sidecar() == name)
}

fn of_meshes(all: Option<BTreeMap<String, String>>) -> BTreeMap<String, String> {
    let kept = |name: &str| Mesh::ALL.into_iter().any(|mesh| mesh.heeds(name));
    let all = all.into_iter().flatten();
    all.filter(|(name, _)| kept(name)).collect()
}

fn container(container: api::Container) -> Container {
    let context = container.security_context.unwrap_or_default();
    let env = container.env.into_iter().flatten();
    Container {
        name: container.name,
        args: container.args.into_iter().flatten().take(2).collect(),
        env: env
            .filter(|one| SIDECAR_ENV.contains(&one.name.as_str()))
            .filter_map(|one| Some((one.name, one.value?)))
            .collect(),
        user: context.run_as_user,
        group: context.run_as_group,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::tests::{manifest, pod};

    #[test]
    fn nothing_is_kept_that_is_not_looked_at() {
        let mut full = manifest("istio");
        full["metadata"]["annotations"]["kubectl.kubernetes.io/last-applied-configuration"] =
            "long".into();
        full["metadata"]["labels"]["app"] = "web".into();
        full["spec"]["containers"][1]["env"] = serde_json::json!([
            {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "ISTIO_DUAL_STACK", "value": "true"},
            {"name": "ISTIO_META_DNS_CAPTURE", "valueFrom": {"configMapKeyRef": {"key": "a"}}},
        ]);
        let trimmed = pod(&full);
        assert!(!format!("{trimmed:?}").contains("last-applied"));
        assert!(!trimmed.labels.contains_key("app"));
        let names: Vec<&str> = trimmed.sidecars.iter().map(|one| &*one.name).collect();
        assert_eq!(names, ["istio-proxy"]);
        let env = BTreeMap::from([("ISTIO_DUAL_STACK".to_owned(), "true".to_owned())]);
        assert_eq!(trimmed.sidecars[0].env, env);
        assert_eq!(trimmed.sidecars[0].args, ["proxy", "sidecar"]);
    }

    #[test]
    fn a_status_alone_changes_nothing() {
        let mut changed = manifest("istio");
        let before = pod(&changed);
        changed["metadata"]["resourceVersion"] = "99".into();
        changed["status"] = serde_json::json!({"phase": "Running", "podIP": "10.0.0.7"});
        assert_eq!(pod(&changed), before);
    }

    #[test]
    fn a_pod_without_identity_is_none() {
        for field in ["namespace", "name", "uid"] {
            let mut full = manifest("istio");
            full["metadata"][field] = serde_json::Value::Null;
            let full = serde_json::from_value(full).expect("a pod");
            assert_eq!(Pod::trimmed(full), None, "{field}");
        }
    }

    #[test]
    fn dns_is_read_as_kubelet_does() {
        let rows = [
            (serde_json::json!("ClusterFirst"), DnsPolicy::Cluster),
            (serde_json::Value::Null, DnsPolicy::Cluster),
            (serde_json::json!("Default"), DnsPolicy::Node),
            (serde_json::json!("None"), DnsPolicy::None),
        ];
        for (policy, expected) in rows {
            let mut full = manifest("istio");
            full["spec"]["dnsPolicy"] = policy;
            full["spec"]["dnsConfig"] = serde_json::json!({"nameservers": ["192.0.2.53"]});
            let dns = pod(&full).dns;
            assert_eq!(dns.policy, expected);
            assert_eq!(dns.nameservers, ["192.0.2.53"]);
        }
    }
}
