//! The settings that a pod asks for.

use super::{Pod, Sidecar};
use crate::settings::{
    Capture, Field, Inputs, Mesh, Origin, PortSet, Problem, Settings, SettingsError, Written,
    annotations,
};

/// What Istio's sidecar is told by its environment, and its `istio-init` by flags.
const ISTIO_ENV: [(Field, &str); 4] = [
    (Field::Mode, "ISTIO_META_INTERCEPTION_MODE"),
    (Field::RedirectDns, "ISTIO_META_DNS_CAPTURE"),
    (Field::DualStack, "ISTIO_DUAL_STACK"),
    (Field::DropInvalid, "INVALID_DROP"),
];

/// Annotations that change what is redirected in a way that shunt has nothing for.
const NOT_FOLLOWED: [(Mesh, Field, &str); 3] = [
    (
        Mesh::Linkerd,
        Field::OutboundExclude,
        "config.linkerd.io/skip-subnets",
    ),
    (
        Mesh::Kuma,
        Field::InboundExclude,
        "traffic.kuma.io/exclude-inbound-ips",
    ),
    (
        Mesh::Kuma,
        Field::OutboundPortsExclude,
        "traffic.kuma.io/exclude-outbound-ports-for-uids",
    ),
];

/// Where Linkerd's control plane finds the API server: its own injector spares these
/// ports in its own pods, which have to work before there is any identity.
const LINKERD_API_PORTS: [u16; 2] = [443, 6443];

/// The settings of a pod: the defaults of its mesh, what its annotations say, and
/// what its sidecar's container says of the proxy.
///
/// # Errors
///
/// The first of them that means nothing, or that shunt cannot do.
pub fn desired(pod: &Pod, sidecar: Sidecar<'_>) -> Result<Settings, SettingsError> {
    let mesh = sidecar.mesh;
    refuse_what_is_not_followed(pod, mesh)?;
    let mut inputs = Inputs::default();
    inputs.extend([written(Field::Mesh, "the mesh of the sidecar", mesh.name())]);
    inputs.extend(environment(sidecar));
    inputs.extend(annotations(&pod.annotations, mesh));
    inputs.extend(owner(sidecar));
    if mesh == Mesh::Kuma {
        inputs.extend(kuma_dns(pod));
    }
    let mut settings = Settings::parse(&inputs)?;
    let own_ports = mesh.own_ports().iter().copied();
    settings.inbound_exclude = settings.inbound_exclude.iter().chain(own_ports).collect();
    if mesh == Mesh::Linkerd && pod.label("linkerd.io/control-plane-component").is_some() {
        let spared = settings.outbound_ports_exclude.iter();
        settings.outbound_ports_exclude = spared.chain(LINKERD_API_PORTS).collect();
    }
    if mesh == Mesh::Kuma && pod.annotation("kuma.io/gateway") == Some("enabled") {
        // A gateway of somebody else's takes its connections itself.
        settings.inbound_include = Capture::Listed(PortSet::default());
    }
    Ok(settings)
}

fn written(field: Field, place: &str, text: &str) -> Written {
    Written {
        field,
        origin: Origin::Manifest(place.to_owned()),
        text: text.to_owned(),
    }
}

fn refuse_what_is_not_followed(pod: &Pod, mesh: Mesh) -> Result<(), SettingsError> {
    let of_mesh = NOT_FOLLOWED.iter().filter(|(of, ..)| *of == mesh);
    for &(_, field, name) in of_mesh {
        if let Some(text) = pod.annotation(name).filter(|text| !text.trim().is_empty()) {
            return Err(SettingsError {
                written: Box::new(Written {
                    field,
                    origin: Origin::Annotation(name.to_owned()),
                    text: text.to_owned(),
                }),
                problem: Problem::NotFollowed,
            });
        }
    }
    Ok(())
}

fn environment(sidecar: Sidecar<'_>) -> impl Iterator<Item = Written> {
    let names = match sidecar.mesh {
        Mesh::Istio => ISTIO_ENV.as_slice(),
        Mesh::Linkerd | Mesh::Kuma => &[],
    };
    names.iter().filter_map(move |&(field, name)| {
        let place = format!("{name} of container {}", sidecar.container.name);
        let text = sidecar.container.env.get(name)?;
        Some(written(field, &place, text))
    })
}

/// Whom the proxy runs as. Nobody, or root, means that the injector left it to the
/// image: then it is whom the mesh says.
fn owner(sidecar: Sidecar<'_>) -> impl Iterator<Item = Written> {
    let container = sidecar.container;
    // Linkerd and Kuma look at the uid alone.
    let group = match sidecar.mesh {
        Mesh::Istio => Some(container.group.filter(|&id| id != 0).unwrap_or(1337)),
        Mesh::Linkerd | Mesh::Kuma => None,
    };
    let ids = [
        (Field::ProxyUids, "runAsUser", container.user),
        (Field::ProxyGids, "runAsGroup", group),
    ];
    ids.into_iter().filter_map(move |(field, name, id)| {
        let place = format!("{name} of container {}", container.name);
        let id = id.filter(|&id| id != 0)?;
        Some(written(field, &place, &id.to_string()))
    })
}

/// With its own DNS, Kuma captures what goes to any server.
fn kuma_dns(pod: &Pod) -> Vec<Written> {
    const NAME: &str = "kuma.io/builtin-dns";
    let Some(text) = pod.annotation(NAME) else {
        return Vec::new();
    };
    let text = match text {
        "enabled" | "yes" => "true",
        "disabled" | "no" => "false",
        other => other,
    };
    let fields = [Field::RedirectDns, Field::CaptureAllDns];
    fields
        .map(|field| Written {
            field,
            origin: Origin::Annotation(NAME.to_owned()),
            text: text.to_owned(),
        })
        .to_vec()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::{
        pods::{
            select::select,
            tests::{manifest, pod},
        },
        settings::tests::{settings, text},
    };

    fn of(manifest: &Value) -> Result<Settings, SettingsError> {
        let pod = pod(manifest);
        let sidecar = select(&pod, &BTreeSet::new()).unwrap_or_else(|why| panic!("{why}"));
        desired(&pod, sidecar)
    }

    fn annotated(mesh: &str, annotations: &[(&str, &str)]) -> Value {
        let mut manifest = manifest(mesh);
        for (name, text) in annotations {
            manifest["metadata"]["annotations"][*name] = json!(text);
        }
        manifest
    }

    /// That a pod asks for what these flags say.
    fn assert_same(manifest: &Value, flags: &str) {
        assert_eq!(of(manifest), settings(flags), "{flags}");
    }

    #[test]
    fn a_bare_pod_has_the_preset_of_its_mesh() {
        for mesh in Mesh::ALL {
            assert_same(&manifest(mesh.name()), &format!("--mesh {}", mesh.name()));
        }
    }

    #[test]
    fn istios_annotations_are_its_flags() {
        let manifest = annotated(
            "istio",
            &[
                ("traffic.sidecar.istio.io/includeInboundPorts", "80,443"),
                ("traffic.sidecar.istio.io/excludeInboundPorts", "22, 9090"),
                (
                    "traffic.sidecar.istio.io/includeOutboundIPRanges",
                    "10.0.0.0/8",
                ),
                (
                    "traffic.sidecar.istio.io/excludeOutboundIPRanges",
                    "10.1.0.0/16",
                ),
                ("traffic.sidecar.istio.io/includeOutboundPorts", "5000"),
                ("traffic.sidecar.istio.io/excludeOutboundPorts", "3306"),
                ("traffic.sidecar.istio.io/excludeInterfaces", "eth1"),
                ("istio.io/reroute-virtual-interfaces", "tap+"),
                ("sidecar.istio.io/interceptionMode", "REDIRECT"),
            ],
        );
        assert_same(
            &manifest,
            "--mesh istio -b 80,443 -d 22,9090,15090,15021,15020 -i 10.0.0.0/8 -x 10.1.0.0/16 \
             -q 5000 -o 3306 -c eth1 -k tap+",
        );
    }

    #[test]
    fn istios_proxy_says_the_rest() {
        let mut manifest = manifest("istio");
        let proxy = &mut manifest["spec"]["containers"][1];
        proxy["env"] = json!([
            {"name": "ISTIO_META_DNS_CAPTURE", "value": "true"},
            {"name": "ISTIO_DUAL_STACK", "value": "true"},
            {"name": "INVALID_DROP", "value": "1"},
        ]);
        proxy["securityContext"] = json!({"runAsUser": 1338, "runAsGroup": 1339});
        assert_same(
            &manifest,
            "--mesh istio --redirect-dns --dual-stack --drop-invalid -u 1338 -g 1339",
        );
        for (context, flags) in [
            (json!({"runAsUser": 0, "runAsGroup": 0}), "-u 1337 -g 1337"),
            (json!({}), "-u 1337 -g 1337"),
            (json!({"runAsUser": 7}), "-u 7 -g 1337"),
            (json!({"runAsGroup": 7}), "-u 1337 -g 7"),
        ] {
            manifest["spec"]["containers"][1] =
                json!({"name": "istio-proxy", "securityContext": context});
            assert_same(&manifest, &format!("--mesh istio {flags}"));
        }
    }

    #[test]
    fn linkerds_annotations_are_what_its_init_container_gets() {
        let manifest = annotated(
            "linkerd",
            &[
                ("config.linkerd.io/skip-inbound-ports", "25,587-589"),
                ("config.linkerd.io/skip-outbound-ports", "3306"),
                ("config.linkerd.io/inbound-port", "5143"),
                ("config.linkerd.io/outbound-port", "5140"),
                // Of another mesh.
                ("traffic.sidecar.istio.io/excludeOutboundPorts", "nonsense"),
            ],
        );
        assert_same(
            &manifest,
            "--mesh linkerd -z 5143 -p 5140 -d 25,587-589,4190,4191 -o 3306",
        );
        let mut own = annotated("linkerd", &[("config.linkerd.io/proxy-uid", "3102")]);
        own["spec"]["containers"][1]["securityContext"] = json!({});
        own["metadata"]["labels"]["linkerd.io/control-plane-component"] = json!("destination");
        assert_same(&own, "--mesh linkerd -u 3102 -o 4567,4568,443,6443");
        own["spec"]["containers"][1]["securityContext"] = json!({"runAsUser": 4102});
        assert_same(&own, "--mesh linkerd -u 4102 -o 4567,4568,443,6443");
    }

    #[test]
    fn kumas_annotations_are_what_its_init_container_gets() {
        let manifest = annotated(
            "kuma",
            &[
                ("traffic.kuma.io/exclude-inbound-ports", "9901"),
                ("traffic.kuma.io/exclude-outbound-ports", "5432"),
                ("traffic.kuma.io/exclude-outbound-ips", "192.0.2.0/24"),
                ("kuma.io/transparent-proxying-inbound-port", "25006"),
                ("kuma.io/transparent-proxying-outbound-port", "25001"),
                ("kuma.io/builtin-dns", "enabled"),
                ("kuma.io/builtin-dns-port", "25053"),
            ],
        );
        assert_same(
            &manifest,
            "--mesh kuma -d 9901 -o 5432 -x 192.0.2.0/24 -z 25006 -p 25001 \
             --redirect-dns --capture-all-dns --dns-port 25053",
        );
        let gateway = annotated("kuma", &[("kuma.io/gateway", "enabled")]);
        assert_same(&gateway, "--mesh kuma -b ''");
    }

    #[test]
    fn a_pod_that_cannot_be_understood_is_refused_with_the_place() {
        let rows = [
            (
                annotated(
                    "istio",
                    &[("traffic.sidecar.istio.io/excludeInboundPorts", "80,http")],
                ),
                "annotation traffic.sidecar.istio.io/excludeInboundPorts: 80,http: \"http\" is",
            ),
            (
                annotated("istio", &[("sidecar.istio.io/interceptionMode", "TPROXY")]),
                "annotation sidecar.istio.io/interceptionMode: TPROXY: TPROXY needs",
            ),
            (
                annotated(
                    "linkerd",
                    &[("config.linkerd.io/skip-subnets", "10.0.0.0/8")],
                ),
                "annotation config.linkerd.io/skip-subnets: 10.0.0.0/8: shunt cannot do that",
            ),
            (
                annotated("kuma", &[("kuma.io/builtin-dns", "maybe")]),
                "annotation kuma.io/builtin-dns: maybe: \"maybe\" is neither true nor false",
            ),
        ];
        for (manifest, expected) in rows {
            let error = of(&manifest).expect_err(expected).to_string();
            assert!(error.starts_with(expected), "{error}");
        }
        let mut proxy = manifest("istio");
        proxy["spec"]["containers"][1]["securityContext"] = json!({"runAsUser": -1});
        let error = of(&proxy).expect_err("no uid").to_string();
        assert!(
            error.starts_with("runAsUser of container istio-proxy: -1: \"-1\" is not a uid"),
            "{error}"
        );
    }

    proptest! {
        /// Whatever stands in the annotations: settings that leave the sidecar's own
        /// ports alone, or an error that says where.
        #[test]
        fn no_annotation_is_too_strange(
            mesh in prop::sample::select(Mesh::ALL.to_vec()),
            names in prop::sample::subsequence(all_names(), 0..8),
            texts in prop::collection::vec(text(), 8),
        ) {
            let mut pod = pod(&manifest(mesh.name()));
            for (name, text) in names.iter().zip(&texts) {
                pod.annotations.insert((*name).to_owned(), text.clone());
            }
            let Ok(sidecar) = select(&pod, &BTreeSet::new()) else { return Ok(()) };
            match desired(&pod, sidecar) {
                Ok(found) => {
                    let spared = found.inbound_exclude.iter().collect::<BTreeSet<_>>();
                    prop_assert!(mesh.own_ports().iter().all(|port| spared.contains(port)));
                    prop_assert!(!found.proxy_uids.as_slice().is_empty());
                }
                Err(error) => {
                    let said = error.to_string();
                    let named = names.iter().any(|name| said.starts_with(&format!("annotation {name}: ")));
                    prop_assert!(named, "{said}");
                }
            }
        }
    }

    fn all_names() -> Vec<&'static str> {
        let fields = Field::ALL.iter().flat_map(|field| field.annotations());
        let others = NOT_FOLLOWED.iter().map(|(.., name)| name);
        fields
            .chain(others)
            .copied()
            .chain(["kuma.io/builtin-dns"])
            .collect()
    }
}
