//! What this process may do.

use caps::{CapSet, Capability};

use super::Finding;

/// The capabilities that an agent needs, and what for.
const NEEDED: [(Capability, &str); 6] = [
    (Capability::CAP_BPF, "to load programs and maps"),
    (
        Capability::CAP_PERFMON,
        "to let programs read kernel structures",
    ),
    (
        Capability::CAP_NET_ADMIN,
        "to attach programs to cgroups, namespaces and interfaces",
    ),
    (
        Capability::CAP_NET_BROADCAST,
        "to hear of changes in the pods' networks",
    ),
    (
        Capability::CAP_SYS_ADMIN,
        "to enter the pods' network namespaces, and for BPF in general before Linux 5.8",
    ),
    (
        Capability::CAP_SYS_PTRACE,
        "to find the pods' user namespaces in /proc",
    ),
];

pub(super) fn root() -> Finding {
    if nix::unistd::geteuid().is_root() {
        Finding::ok("user", "root")
    } else {
        Finding::failure(
            "user",
            "loading BPF programs takes root",
            "run this as root, or with sudo",
        )
    }
}

pub(super) fn capabilities() -> Finding {
    let subject = "capabilities";
    let effective = match caps::read(None, CapSet::Effective) {
        Ok(effective) => effective,
        Err(error) => {
            return Finding::warning(
                subject,
                format!("cannot tell: {error}"),
                "look at CapEff in /proc/self/status",
            );
        }
    };
    let missing: Vec<String> = NEEDED
        .iter()
        .filter(|(one, _)| !effective.contains(one))
        .map(|(one, why)| format!("{one} ({why})"))
        .collect();
    if missing.is_empty() {
        return Finding::ok(subject, NEEDED.map(|(one, _)| one.to_string()).join(", "));
    }
    Finding::failure(
        subject,
        format!("this process lacks {}", missing.join(", ")),
        "add them to the container's securityContext.capabilities, or run it privileged",
    )
}
