//! Which processes this one sees.

use std::process;

use super::Finding;

/// Whether the node's are seen: the listeners of their proxies and the sockets that are
/// spliced are found by their open files.
pub(super) fn seen() -> Finding {
    seen_by(process::id())
}

/// The same for a process with this number in its own PID namespace.
fn seen_by(pid: u32) -> Finding {
    let subject = "processes";
    if pid != 1 {
        return Finding::ok(subject, "those of this PID namespace are seen");
    }
    // As a container begins that has not the namespace of its node.
    Finding::warning(
        subject,
        "this is the first process of a PID namespace of its own, in which none of the node's \
         is seen: a proxy that listened before its pod is enrolled is not found, and its \
         inbound connections are refused; nothing is spliced; what connections keep in the maps \
         is memory of the agent's cgroup",
        "give the agent's pod `hostPID: true`, or its container the node's PID namespace",
    )
}

#[cfg(test)]
mod tests {
    use super::{super::Level, seen_by};

    #[test]
    fn the_first_process_of_a_namespace_sees_nobody_else() {
        assert_eq!(seen_by(1).level, Level::Warning);
        assert_eq!(seen_by(4711).level, Level::Ok);
    }
}
