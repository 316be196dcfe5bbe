//! Which pods are redirected, and why the others are not.

use std::{collections::BTreeSet, fmt};

use serde::Serialize;

use super::{Container, Pod};
use crate::settings::{Mesh, truth};

/// The sidecar of a pod that is redirected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sidecar<'a> {
    /// Whose it is.
    pub mesh: Mesh,
    /// Its container.
    pub container: &'a Container,
}

/// Why a pod is not redirected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum NotRedirected {
    /// Its namespace is left out of the whole node.
    NamespaceExcluded,
    /// It has the network of the node.
    HostNetwork,
    /// Its containers have ended for good.
    Finished,
    /// It is in ambient mode: its connections are the node proxy's.
    Ambient,
    /// It has no container of a mesh.
    NoSidecar,
    /// The proxy is switched off (`DISABLE_ENVOY`).
    ProxyDisabled,
    /// The proxy is something other than a sidecar: a gateway, a waypoint.
    NotASidecar,
    /// Injection is switched off for this pod.
    InjectionOff,
    /// The container is there, but no injector put it there.
    NotInjected,
    /// The pod asks for no redirection.
    InterceptionOff,
}

impl fmt::Display for NotRedirected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NamespaceExcluded => "its namespace is excluded",
            Self::HostNetwork => "it is on the host network",
            Self::Finished => "its containers have ended",
            Self::Ambient => "it is in ambient mode",
            Self::NoSidecar => "it has no container of a mesh",
            Self::ProxyDisabled => "its proxy is switched off (DISABLE_ENVOY)",
            Self::NotASidecar => "its proxy is not a sidecar but a gateway or waypoint",
            Self::InjectionOff => "injection is switched off for it",
            Self::NotInjected => "its sidecar was not injected by a mesh",
            Self::InterceptionOff => "it asks for no redirection",
        })
    }
}

impl Mesh {
    /// The name of its sidecar's container.
    pub(super) const fn sidecar(self) -> &'static str {
        match self {
            Self::Istio => "istio-proxy",
            Self::Linkerd => "linkerd-proxy",
            Self::Kuma => "kuma-sidecar",
        }
    }
}

/// The sidecar to which the pod's connections go.
///
/// # Errors
///
/// Why they go nowhere but where they are sent.
pub fn select<'a>(
    pod: &'a Pod,
    excluded_namespaces: &BTreeSet<String>,
) -> Result<Sidecar<'a>, NotRedirected> {
    let refuse_if = |is_so: bool, why| if is_so { Err(why) } else { Ok(()) };
    let namespace = &pod.id.namespace;
    refuse_if(
        excluded_namespaces.contains(namespace),
        NotRedirected::NamespaceExcluded,
    )?;
    refuse_if(pod.host_network, NotRedirected::HostNetwork)?;
    refuse_if(pod.finished, NotRedirected::Finished)?;
    refuse_if(is_ambient(pod), NotRedirected::Ambient)?;
    let sidecar = sidecar_of(pod).ok_or(NotRedirected::NoSidecar)?;
    match sidecar.mesh {
        Mesh::Istio => istio(pod, sidecar.container),
        Mesh::Linkerd => linkerd(pod),
        Mesh::Kuma => kuma(pod),
    }?;
    Ok(sidecar)
}

fn sidecar_of(pod: &Pod) -> Option<Sidecar<'_>> {
    Mesh::ALL.into_iter().find_map(|mesh| {
        let mut sidecars = pod.sidecars.iter();
        let container = sidecars.find(|one| one.name == mesh.sidecar())?;
        Some(Sidecar { mesh, container })
    })
}

/// The node's CNI of Istio writes it when a pod is enrolled there, and "pending"
/// while it is under way.
fn is_ambient(pod: &Pod) -> bool {
    matches!(
        pod.annotation("ambient.istio.io/redirection"),
        Some("enabled" | "pending")
    )
}

fn istio(pod: &Pod, proxy: &Container) -> Result<(), NotRedirected> {
    const INJECT: &str = "sidecar.istio.io/inject";
    let env = |name: &str| proxy.env.get(name).map(String::as_str);
    if env("DISABLE_ENVOY").is_some_and(|text| truth(text.trim()) == Ok(true)) {
        return Err(NotRedirected::ProxyDisabled);
    }
    if !is_istio_sidecar(&proxy.args) {
        return Err(NotRedirected::NotASidecar);
    }
    let inject = pod.label(INJECT).or_else(|| pod.annotation(INJECT));
    if inject.is_some_and(|text| truth(text.trim()) == Ok(false)) {
        return Err(NotRedirected::InjectionOff);
    }
    if pod.annotation("sidecar.istio.io/status").is_none() {
        return Err(NotRedirected::NotInjected);
    }
    let mode = pod.annotation("sidecar.istio.io/interceptionMode");
    if mode.or(env("ISTIO_META_INTERCEPTION_MODE")) == Some("NONE") {
        return Err(NotRedirected::InterceptionOff);
    }
    Ok(())
}

/// The arguments are `proxy sidecar …`; `proxy` alone, or with flags behind it, is a
/// sidecar, too.
fn is_istio_sidecar(args: &[String]) -> bool {
    match args {
        [command, role, ..] if command == "proxy" => role == "sidecar" || role.starts_with('-'),
        _ => true,
    }
}

/// Linkerd's injector labels what it injects with the namespace of its control plane,
/// and notes the version of its proxy.
fn linkerd(pod: &Pod) -> Result<(), NotRedirected> {
    if pod.annotation("linkerd.io/inject") == Some("disabled") {
        return Err(NotRedirected::InjectionOff);
    }
    let labelled = pod.label("linkerd.io/control-plane-ns");
    if labelled
        .or_else(|| pod.annotation("linkerd.io/proxy-version"))
        .is_none()
    {
        return Err(NotRedirected::NotInjected);
    }
    Ok(())
}

fn kuma(pod: &Pod) -> Result<(), NotRedirected> {
    let says = |name, texts: &[&str]| {
        pod.annotation(name)
            .is_some_and(|text| texts.contains(&text))
    };
    if says("kuma.io/gateway", &["builtin"]) {
        return Err(NotRedirected::NotASidecar);
    }
    if !says("kuma.io/sidecar-injected", &["true", "yes", "enabled"]) {
        return Err(NotRedirected::NotInjected);
    }
    if says("kuma.io/transparent-proxying", &["disabled", "false", "no"]) {
        return Err(NotRedirected::InterceptionOff);
    }
    Ok(())
}

impl Pod {
    /// The annotation of this name.
    pub(super) fn annotation(&self, name: &str) -> Option<&str> {
        self.annotations.get(name).map(String::as_str)
    }

    /// The label of this name.
    pub(super) fn label(&self, name: &str) -> Option<&str> {
        self.labels.get(name).map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::pods::tests::{manifest, pod};

    fn selected(manifest: &Value) -> Result<Mesh, NotRedirected> {
        let excluded = BTreeSet::from(["kube-system".to_owned()]);
        select(&pod(manifest), &excluded).map(|sidecar| sidecar.mesh)
    }

    /// The pod of this mesh, with another value at each of these places.
    fn with(mesh: &str, changes: &[(&str, Value)]) -> Value {
        let mut manifest = manifest(mesh);
        for (place, value) in changes {
            // An index of an object makes what is not there.
            let mut at = &mut manifest;
            for key in place.split(' ') {
                at = match key.parse::<usize>() {
                    Ok(index) => &mut at[index],
                    Err(_) => &mut at[key],
                };
            }
            *at = value.clone();
        }
        manifest
    }

    #[test]
    fn a_pod_of_each_mesh_is_redirected() {
        assert_eq!(selected(&manifest("istio")), Ok(Mesh::Istio));
        assert_eq!(selected(&manifest("linkerd")), Ok(Mesh::Linkerd));
        assert_eq!(selected(&manifest("kuma")), Ok(Mesh::Kuma));
    }

    #[test]
    fn each_condition_alone_keeps_a_pod_out() {
        use NotRedirected as Why;
        let inject = "sidecar.istio.io/inject";
        let rows: Vec<(&str, &str, Value, Why)> = vec![
            (
                "istio",
                "metadata namespace",
                json!("kube-system"),
                Why::NamespaceExcluded,
            ),
            ("istio", "spec hostNetwork", json!(true), Why::HostNetwork),
            ("istio", "status phase", json!("Succeeded"), Why::Finished),
            ("istio", "status phase", json!("Failed"), Why::Finished),
            (
                "istio",
                "metadata annotations ambient.istio.io/redirection",
                json!("enabled"),
                Why::Ambient,
            ),
            (
                "istio",
                "metadata annotations ambient.istio.io/redirection",
                json!("pending"),
                Why::Ambient,
            ),
            (
                "istio",
                "spec containers 1 name",
                json!("envoy"),
                Why::NoSidecar,
            ),
            (
                "istio",
                "spec containers 1 env",
                json!([{"name": "DISABLE_ENVOY", "value": "true"}]),
                Why::ProxyDisabled,
            ),
            (
                "istio",
                "spec containers 1 args",
                json!(["proxy", "router"]),
                Why::NotASidecar,
            ),
            (
                "istio",
                "spec containers 1 args",
                json!(["proxy", "waypoint", "--x"]),
                Why::NotASidecar,
            ),
            (
                "istio",
                "metadata labels sidecar.istio.io/inject",
                json!("false"),
                Why::InjectionOff,
            ),
            (
                "istio",
                "metadata annotations sidecar.istio.io/inject",
                json!("False"),
                Why::InjectionOff,
            ),
            (
                "istio",
                "metadata annotations sidecar.istio.io/status",
                Value::Null,
                Why::NotInjected,
            ),
            (
                "istio",
                "metadata annotations sidecar.istio.io/interceptionMode",
                json!("NONE"),
                Why::InterceptionOff,
            ),
            (
                "istio",
                "spec containers 1 env",
                json!([{"name": "ISTIO_META_INTERCEPTION_MODE", "value": "NONE"}]),
                Why::InterceptionOff,
            ),
            (
                "linkerd",
                "metadata annotations linkerd.io/inject",
                json!("disabled"),
                Why::InjectionOff,
            ),
            (
                "kuma",
                "metadata annotations kuma.io/sidecar-injected",
                json!("false"),
                Why::NotInjected,
            ),
            (
                "kuma",
                "metadata annotations kuma.io/transparent-proxying",
                json!("disabled"),
                Why::InterceptionOff,
            ),
            (
                "kuma",
                "metadata annotations kuma.io/gateway",
                json!("builtin"),
                Why::NotASidecar,
            ),
        ];
        for (mesh, place, value, why) in rows {
            // serde's null in a map of strings is no map of strings: it is left out.
            let changed = without_nulls(with(mesh, &[(place, value)]));
            assert_eq!(selected(&changed), Err(why), "{mesh}: {place}");
        }
        // The label is stronger than the annotation, whichever way.
        for (label, annotation, expected) in [
            ("true", "false", Ok(Mesh::Istio)),
            ("false", "true", Err(Why::InjectionOff)),
            ("nonsense", "false", Ok(Mesh::Istio)),
        ] {
            let changed = with(
                "istio",
                &[
                    (&format!("metadata labels {inject}"), json!(label)),
                    (&format!("metadata annotations {inject}"), json!(annotation)),
                ],
            );
            assert_eq!(selected(&changed), expected, "{label}, {annotation}");
        }
    }

    fn without_nulls(value: Value) -> Value {
        match value {
            Value::Object(fields) => fields
                .into_iter()
                .filter(|(_, value)| !value.is_null())
                .map(|(name, value)| (name, without_nulls(value)))
                .collect(),
            Value::Array(items) => items.into_iter().map(without_nulls).collect(),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => value,
        }
    }

    #[test]
    fn what_does_not_keep_a_pod_out() {
        let rows = [
            ("istio", "spec containers 1 args", json!(["proxy"])),
            (
                "istio",
                "spec containers 1 args",
                json!(["proxy", "--log_output_level"]),
            ),
            ("istio", "spec containers 1 args", json!([])),
            (
                "istio",
                "spec containers 1 env",
                json!([{"name": "DISABLE_ENVOY", "value": "false"}]),
            ),
            (
                "istio",
                "metadata annotations ambient.istio.io/redirection",
                json!("disabled"),
            ),
            (
                "istio",
                "metadata labels istio.io/dataplane-mode",
                json!("ambient"),
            ),
            ("istio", "spec hostNetwork", json!(false)),
            // Its rules are still there: both stand in one pod.
            (
                "istio",
                "spec initContainers",
                json!([{"name": "istio-init"}]),
            ),
            (
                "istio",
                "metadata annotations sidecar.istio.io/interceptionMode",
                json!("REDIRECT"),
            ),
            // It is refused, not left alone: its proxy waits for connections.
            (
                "istio",
                "metadata annotations sidecar.istio.io/interceptionMode",
                json!("TPROXY"),
            ),
            (
                "istio",
                "metadata ownerReferences",
                json!([
                {"apiVersion": "batch/v1", "kind": "Job", "name": "j", "uid": "u"}]),
            ),
            ("istio", "status phase", json!("Pending")),
            (
                "linkerd",
                "metadata annotations linkerd.io/inject",
                json!("ingress"),
            ),
            (
                "kuma",
                "metadata annotations kuma.io/gateway",
                json!("enabled"),
            ),
        ];
        for (mesh, place, value) in rows {
            let changed = with(mesh, &[(place, value)]);
            assert_eq!(selected(&changed).map(Mesh::name), Ok(mesh), "{place}");
        }
    }

    #[test]
    fn a_native_sidecar_counts_and_another_init_container_does_not() {
        for mesh in Mesh::ALL {
            let mut native = manifest(mesh.name());
            let mut sidecar = native["spec"]["containers"]
                .as_array_mut()
                .and_then(Vec::pop)
                .expect("the sidecar is the last one");
            sidecar["restartPolicy"] = json!("Always");
            native["spec"]["initContainers"] = json!([sidecar]);
            assert_eq!(selected(&native), Ok(mesh));
            native["spec"]["initContainers"][0]["restartPolicy"] = Value::Null;
            assert_eq!(selected(&native), Err(NotRedirected::NoSidecar));
        }
    }

    #[test]
    fn a_linkerd_pod_needs_one_trace_of_its_injector() {
        let mut bare = manifest("linkerd");
        bare["metadata"]["labels"] = json!({});
        assert_eq!(selected(&bare), Ok(Mesh::Linkerd));
        bare["metadata"]["annotations"] = json!({});
        assert_eq!(selected(&bare), Err(NotRedirected::NotInjected));
    }
}
