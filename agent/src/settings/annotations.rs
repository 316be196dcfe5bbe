//! What a pod's annotations ask for.

use std::collections::BTreeMap;

use super::{Field, Mesh, Origin, Written};

/// The settings that the annotations of a pod of this mesh write, to be understood
/// by [`Settings::parse`](super::Settings::parse). Of several names for one setting
/// the first in [`Field::annotations`] wins; other annotations, those of other meshes
/// among them, are nobody's mistake. An annotation that is empty is an empty list.
pub fn annotations(pod: &BTreeMap<String, String>, mesh: Mesh) -> impl Iterator<Item = Written> {
    Field::ALL.iter().filter_map(move |&field| {
        let mut names = field.annotations().iter();
        names.find_map(|&name| {
            if !mesh.heeds(name) {
                return None;
            }
            Some(Written {
                field,
                origin: Origin::Annotation(name.to_owned()),
                text: pod.get(name)?.clone(),
            })
        })
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::settings::{Inputs, Settings, SettingsError, tests::text};

    fn annotated(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        let owned = |(name, text): &(&str, &str)| ((*name).to_owned(), (*text).to_owned());
        pairs.iter().map(owned).collect()
    }

    fn parsed(pod: &BTreeMap<String, String>, mesh: Mesh) -> Result<Settings, SettingsError> {
        Settings::parse(&annotations(pod, mesh).collect::<Inputs>())
    }

    #[test]
    fn a_pod_heeds_the_annotations_of_its_own_mesh() {
        let pod = annotated(&[
            ("traffic.sidecar.istio.io/excludeOutboundPorts", "1"),
            ("config.linkerd.io/skip-outbound-ports", "2"),
            ("traffic.kuma.io/exclude-outbound-ports", "3"),
            ("shunt.io/splice", "proxy"),
            ("notkuma.io/sidecar-uid", "7"),
        ]);
        for (mesh, port) in Mesh::ALL.into_iter().zip(1..) {
            let found = parsed(&pod, mesh).expect("good annotations");
            assert_eq!(found.outbound_ports_exclude, [port].into_iter().collect());
            assert_eq!(found.splice, crate::settings::Splice::Proxy);
        }
        for name in names() {
            let heeding = Mesh::ALL.iter().filter(|mesh| mesh.heeds(name)).count();
            let own = name.starts_with("shunt.io/");
            assert_eq!(heeding, if own { 3 } else { 1 }, "{name}");
        }
    }

    #[test]
    fn annotations_say_what_flags_say() {
        let pod = annotated(&[
            ("traffic.sidecar.istio.io/includeInboundPorts", "*"),
            ("traffic.sidecar.istio.io/excludeInboundPorts", " 80, ,443 "),
            ("sidecar.istio.io/interceptionMode", "REDIRECT"),
            ("sidecar.istio.io/status", "{}"),
        ]);
        let flags = crate::settings::tests::settings("-b * -d 80,443 -m REDIRECT");
        assert_eq!(
            parsed(&pod, Mesh::Istio).expect("good annotations"),
            flags.expect("good flags")
        );
    }

    #[test]
    fn of_two_names_for_one_setting_the_newer_wins() {
        let pod = annotated(&[
            ("traffic.sidecar.istio.io/kubevirtInterfaces", "old0"),
            ("istio.io/reroute-virtual-interfaces", "new0"),
        ]);
        let found = parsed(&pod, Mesh::Istio).expect("good annotations");
        assert!(found.virtual_interfaces.contains("new0"));
        assert!(!found.virtual_interfaces.contains("old0"));
    }

    #[test]
    fn an_error_names_the_annotation_and_the_item() {
        let pod = annotated(&[("traffic.sidecar.istio.io/excludeOutboundPorts", "80,http")]);
        let error = parsed(&pod, Mesh::Istio).expect_err("http is no port");
        assert_eq!(
            error.to_string(),
            "annotation traffic.sidecar.istio.io/excludeOutboundPorts: 80,http: \
             \"http\" is not a port; ports are 1 to 65535"
        );
    }

    proptest! {
        #[test]
        fn no_annotation_is_too_strange(
            known in prop::sample::subsequence(names(), 0..names().len()),
            texts in prop::collection::vec(text(), names().len()),
            others in prop::collection::btree_map(".{0,40}", ".{0,40}", 0..4),
        ) {
            let mut pod: BTreeMap<String, String> =
                known.iter().map(|name| (*name).to_owned()).zip(texts).collect();
            for (name, text) in others {
                pod.entry(name).or_insert(text);
            }
            for error in Mesh::ALL.into_iter().filter_map(|mesh| parsed(&pod, mesh).err()) {
                let said = error.to_string();
                let named = known.iter().any(|name| said.starts_with(&format!("annotation {name}: ")));
                prop_assert!(named, "{said}");
                prop_assert!(!said.contains(char::is_control));
            }
        }
    }

    fn names() -> Vec<&'static str> {
        Field::ALL
            .iter()
            .flat_map(|field| field.annotations().iter().copied())
            .collect()
    }
}
