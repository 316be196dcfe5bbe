//! Programs of others on the hooks that shunt uses.

use std::path::{Path, PathBuf};

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

fn described(neighbours: &[Neighbour]) -> String {
    let each = neighbours.iter().map(|one| {
        let Neighbour { hook, name, id, .. } = one;
        format!(
            "{name} on {hook}{} (id {id}, {})",
            place(&one.below),
            whose(name)
        )
    });
    each.collect::<Vec<_>>().join(", ")
}

/// Where it hangs, when that is not the whole cgroup: one of the places, and how many more
/// there are.
fn place(below: &[PathBuf]) -> String {
    match below {
        [] => String::new(),
        [only] => format!(" of {}", only.display()),
        [first, others @ ..] => format!(" of {} and {} more", first.display(), others.len()),
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
        "where they choose a socket for a connection to an enrolled pod it may not come to the          proxy; detach them from the network namespaces of these pods (`bpftool net` in a pod, or          `bpftool link`, says which those are)",
    )
}

/// Those that splice sockets: a socket can be in one such map at a time.
pub(super) fn splicers() -> Finding {
    loaded(
        "other splicers",
        datapath::splicers(),
        "a socket that they hold goes by TCP, and is counted as no_room (`shunt status`); stop          them if shunt is to splice it, or run shunt with `--splice off`",
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
    fn places_are_named() {
        let [pod, job] = ["kubepods/pod", "kubepods/job"].map(PathBuf::from);
        assert_eq!(place(&[]), "");
        assert_eq!(place(std::slice::from_ref(&pod)), " of kubepods/pod");
        assert_eq!(place(&[pod, job]), " of kubepods/pod and 1 more");
    }
}
