//! Programs of others on the hooks that shunt uses.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::Result;

use super::Finding;
use crate::datapath::{self, Neighbour};

/// How the names of their programs begin.
const KNOWN: [(&str, &str); 9] = [
    ("cil_", "Cilium"),
    ("mb_", "Merbridge"),
    ("beyla_", "Beyla"),
    ("obi_", "OpenTelemetry eBPF instrumentation"),
    ("calico_", "Calico"),
    ("cali_", "Calico"),
    ("kmesh_", "Kmesh"),
    ("sd_", "systemd"),
    ("shunt_", "another shunt agent"),
];

/// Who a program belongs to, by its name.
fn whose(name: &str) -> &'static str {
    KNOWN
        .iter()
        .find(|(prefix, _)| name.starts_with(prefix))
        .map_or("somebody else", |(_, owner)| owner)
}

/// Each program once, however often it is loaded: some are for every unit or pod. Those that
/// hang on all of the cgroup are told apart.
fn described(neighbours: &[Neighbour]) -> String {
    let mut each: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for one in neighbours {
        let key = (one.hook, &one.name, one.below.is_empty());
        each.entry(key).or_default().push(one);
    }
    let each = each.into_iter().map(|((hook, name, _), them)| {
        let below: Vec<_> = them.iter().flat_map(|one| one.below.clone()).collect();
        let ids: Vec<_> = them.iter().map(|one| one.id.to_string()).collect();
        format!(
            "{name} on {hook}{} (id {}, {})",
            place(&below),
            some(&ids),
            whose(name)
        )
    });
    each.collect::<Vec<_>>().join(", ")
}

/// Where they hang, when that is not the whole cgroup.
fn place(below: &[PathBuf]) -> String {
    let below: Vec<_> = below
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    if below.is_empty() {
        String::new()
    } else {
        format!(" of {}", some(&below))
    }
}

/// The first of them, and how many more there are.
fn some(all: &[String]) -> String {
    match all {
        [] => String::new(),
        [only] => only.clone(),
        [first, others @ ..] => format!("{first} and {} more", others.len()),
    }
}

/// Those that see, or rewrite, the same connections.
pub(super) fn on_cgroup(root: &Path) -> Finding {
    let subject = "neighbours";
    match datapath::neighbours(root) {
        Ok(found) if found.is_empty() => Finding::ok(
            subject,
            format!("nobody else hangs on {} or below", root.display()),
        ),
        Ok(found) => Finding::warning(
            subject,
            format!("on {}: {}", root.display(), described(&found)),
            "they run beside shunt's, each after the other; one that rewrites destinations of \
             enrolled pods, as Merbridge and Cilium's socket load balancer do, has to be turned \
             off for them",
        ),
        Err(error) => Finding::warning(
            subject,
            format!("cannot tell what hangs on {}: {error:#}", root.display()),
            "look with `bpftool cgroup tree`",
        ),
    }
}

/// Those that choose who gets an incoming connection.
pub(super) fn lookups() -> Finding {
    loaded(
        "other lookups",
        datapath::lookups(),
        "where they choose a socket for a connection to an enrolled pod it may not come to the \
         proxy; detach them from the network namespaces of these pods (`bpftool link` says which \
         those are)",
    )
}

/// Those that splice sockets: a socket can be in one such map at a time.
pub(super) fn splicers() -> Finding {
    loaded(
        "other splicers",
        datapath::splicers(),
        "a socket that they hold goes by TCP, and is counted as no_room (`shunt status`); stop \
         them if shunt is to splice it, or run shunt with `--splice off`",
    )
}

/// What is found where the kernel tells only what is loaded.
fn loaded(subject: &str, found: Result<Vec<Neighbour>>, remedy: &str) -> Finding {
    match found {
        Ok(found) if found.is_empty() => Finding::ok(subject, "none"),
        Ok(found) => Finding::warning(subject, described(&found), remedy),
        Err(error) => Finding::warning(
            subject,
            format!("cannot tell: {error:#}"),
            "look with `bpftool prog`",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_known_by_their_names() {
        assert_eq!(whose("cil_sock4_connect"), "Cilium");
        assert_eq!(whose("mb_sock_connect4"), "Merbridge");
        assert_eq!(whose("my_own"), "somebody else");
    }

    #[test]
    fn a_program_that_is_loaded_often_is_named_once() {
        let loaded = |id, below: &[&str]| Neighbour {
            hook: "bind4",
            name: "sd_bind4".to_owned(),
            id,
            below: below.iter().map(PathBuf::from).collect(),
        };
        let [one, other] = [loaded(7, &["a.service"]), loaded(9, &["b.service"])];
        assert_eq!(
            described(&[one, other, loaded(5, &[])]),
            "sd_bind4 on bind4 of a.service and 1 more (id 7 and 1 more, systemd), \
             sd_bind4 on bind4 (id 5, systemd)"
        );
    }

    #[test]
    fn places_are_named() {
        let [pod, job] = ["kubepods/pod", "kubepods/job"].map(PathBuf::from);
        assert_eq!(place(&[]), "");
        assert_eq!(place(std::slice::from_ref(&pod)), " of kubepods/pod");
        assert_eq!(place(&[pod, job]), " of kubepods/pod and 1 more");
    }
}
