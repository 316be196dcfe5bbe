//! Programs of others on the hooks that shunt uses.

use std::path::Path;

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
        let Neighbour { hook, name, id } = one;
        format!("{name} on {hook} (id {id}, {})", whose(name))
    });
    each.collect::<Vec<_>>().join(", ")
}

/// Those that see, or rewrite, the same connections.
pub(super) fn on_cgroup(root: &Path) -> Finding {
    let subject = "neighbours";
    match datapath::neighbours(root) {
        Ok(found) if found.is_empty() => {
            Finding::ok(subject, format!("nobody else hangs on {}", root.display()))
        }
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

/// Those that splice sockets: a socket can be in one such map at a time.
pub(super) fn splicers() -> Finding {
    let subject = "other splicers";
    match datapath::splicers() {
        Ok(found) if found.is_empty() => Finding::ok(subject, "none"),
        Ok(found) => Finding::warning(
            subject,
            described(&found),
            "a socket that they hold is not spliced by shunt",
        ),
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
}
