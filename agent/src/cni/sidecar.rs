//! Whether a mesh has given a pod a sidecar, told without the agent and without the API.
//!
//! Only asked while the agent does not answer or cannot tell. It errs on the side of the
//! mesh: a pod that is taken for one of a mesh waits, the other way round it would run
//! without redirection.

use std::{collections::BTreeMap, fs, io, path::Path};

use anyhow::{Context as _, Result, bail};

use crate::pods::PodRef;

/// What kubelet and injectors write on a pod, key and value.
pub type Annotations = BTreeMap<String, String>;

/// The mesh whose sidecar a pod has, if it has one. Goes by the annotations where the
/// runtime passes them, or else by the volumes, which kubelet has made below `kubelet_dir`
/// before it asks for the pod's network.
///
/// # Errors
///
/// When neither is to be had.
pub fn mesh_of(
    pod: &PodRef,
    annotations: &Annotations,
    kubelet_dir: &Path,
) -> Result<Option<&'static str>> {
    // Kubelet itself annotates every pod: without one, they have not been passed.
    if annotations.is_empty() {
        Ok(by_volumes(&volumes(&pod.uid, kubelet_dir)?))
    } else {
        Ok(by_annotations(annotations))
    }
}

/// Whether [`mesh_of`] can tell on this node, whatever the runtime passes.
pub fn can_tell(kubelet_dir: &Path) -> bool {
    fs::read_dir(kubelet_dir.join("pods")).is_ok()
}

/// By what an injector says that it has done.
fn by_annotations(annotations: &Annotations) -> Option<&'static str> {
    let value = |key: &str| annotations.get(key).map(|text| text.trim());
    if value("sidecar.istio.io/status").is_some() {
        return (!is_left_alone_by_istio(&value)).then_some("Istio");
    }
    if value("linkerd.io/proxy-version").is_some() {
        return Some("Linkerd");
    }
    (value("kuma.io/sidecar-injected") == Some("true")).then_some("Kuma")
}

/// Pods in which Istio's injector puts a proxy, and whose connections stay direct.
fn is_left_alone_by_istio<'a>(value: &impl Fn(&str) -> Option<&'a str>) -> bool {
    let is_gateway = value("inject.istio.io/templates").is_some_and(|templates| {
        let mut names = templates.split(',').map(str::trim);
        names.clone().any(|name| name == "gateway") && names.all(|name| name != "sidecar")
    });
    is_gateway
        || value("sidecar.istio.io/inject") == Some("false")
        || value("sidecar.istio.io/interceptionMode") == Some("NONE")
        || value("ambient.istio.io/redirection") == Some("enabled")
}

/// Volumes that a sidecar has in every release, and nothing else: what a control plane
/// mounts as well (Istio's `istio-token`) says nothing.
const VOLUMES: [(&str, &str); 3] = [
    ("istio-envoy", "Istio"),
    ("linkerd-identity-end-entity", "Linkerd"),
    ("kuma-sidecar-tmp", "Kuma"),
];

fn by_volumes(names: &[String]) -> Option<&'static str> {
    let mesh = |name: &String| VOLUMES.iter().find(|(volume, _)| volume == name);
    names.iter().find_map(mesh).map(|(_, mesh)| *mesh)
}

/// The names of a pod's volumes, as kubelet keeps them: a directory for each kind, and in
/// it one for each volume.
fn volumes(uid: &str, kubelet_dir: &Path) -> Result<Vec<String>> {
    if uid.is_empty() || !uid.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') {
        bail!("{uid:?} is no uid of a pod");
    }
    let kinds = kubelet_dir.join("pods").join(uid).join("volumes");
    let listed = names_in(&kinds).and_then(|names| {
        let volumes = names.iter().map(|kind| names_in(&kinds.join(kind)));
        Ok(volumes.collect::<io::Result<Vec<_>>>()?.concat())
    });
    listed.with_context(|| {
        format!(
            "cannot list the volumes in {}; if kubelet's directory is another one, name it with \
             --kubelet-dir",
            kinds.display()
        )
    })
}

fn names_in(directory: &Path) -> io::Result<Vec<String>> {
    fs::read_dir(directory)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn annotations(written: &[(&str, &str)]) -> Annotations {
        let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        let seen = ("kubernetes.io/config.source", "api");
        written.iter().chain([&seen]).map(owned).collect()
    }

    fn pod(uid: &str) -> PodRef {
        PodRef {
            namespace: "shop".to_owned(),
            name: "cart".to_owned(),
            uid: uid.to_owned(),
        }
    }

    #[test]
    fn injectors_say_what_they_have_done() {
        let status = ("sidecar.istio.io/status", "{}");
        for (written, mesh) in [
            (&[][..], None),
            (&[status], Some("Istio")),
            (&[status, ("inject.istio.io/templates", "gateway")], None),
            (
                &[
                    status,
                    ("inject.istio.io/templates", "grpc, sidecar,gateway"),
                ],
                Some("Istio"),
            ),
            (
                &[status, ("inject.istio.io/templates", "custom")],
                Some("Istio"),
            ),
            (&[status, ("sidecar.istio.io/inject", "false")], None),
            (
                &[status, ("sidecar.istio.io/interceptionMode", "NONE")],
                None,
            ),
            (
                &[status, ("sidecar.istio.io/interceptionMode", "REDIRECT")],
                Some("Istio"),
            ),
            (&[status, ("ambient.istio.io/redirection", "enabled")], None),
            (&[("sidecar.istio.io/inject", "true")], None),
            (&[("linkerd.io/proxy-version", "2.14")], Some("Linkerd")),
            (&[("kuma.io/sidecar-injected", "true")], Some("Kuma")),
            (&[("kuma.io/sidecar-injected", "false")], None),
        ] {
            // Volumes are not looked at.
            let found = mesh_of(&pod("a"), &annotations(written), Path::new("/nowhere"));
            assert_eq!(found.expect("no volumes are needed"), mesh, "{written:?}");
        }
    }

    #[test]
    fn without_annotations_the_volumes_decide() {
        let kubelet = tempfile::tempdir().expect("a directory");
        let none = Annotations::new();
        for (uid, kind, volume, mesh) in [
            (
                "a-1",
                "kubernetes.io~empty-dir",
                "istio-envoy",
                Some("Istio"),
            ),
            ("a-2", "kubernetes.io~projected", "istio-token", None),
            (
                "a-3",
                "kubernetes.io~empty-dir",
                "linkerd-identity-end-entity",
                Some("Linkerd"),
            ),
            (
                "a-4",
                "kubernetes.io~empty-dir",
                "kuma-sidecar-tmp",
                Some("Kuma"),
            ),
            ("a-5", "kubernetes.io~configmap", "settings", None),
        ] {
            let volumes = kubelet.path().join("pods").join(uid).join("volumes");
            fs::create_dir_all(volumes.join("kubernetes.io~projected/kube-api-access-x"))
                .expect("a new directory");
            fs::create_dir_all(volumes.join(kind).join(volume)).expect("a new directory");
            let found = mesh_of(&pod(uid), &none, kubelet.path()).expect("it can be listed");
            assert_eq!(found, mesh, "{uid}");
        }
        assert!(can_tell(kubelet.path()));
    }

    #[test]
    fn a_pod_that_is_not_known_is_not_guessed_at() {
        let kubelet = tempfile::tempdir().expect("a directory");
        for uid in ["a-1", "", "..", "a/b"] {
            let error = mesh_of(&pod(uid), &Annotations::new(), kubelet.path());
            let said = format!("{:#}", error.expect_err("there is nothing"));
            assert!(
                said.contains("uid of a pod") || said.contains("--kubelet-dir"),
                "{said}"
            );
        }
        assert!(!can_tell(kubelet.path()));
    }
}
