//! What this kernel is and can do.

use std::{fs, path::Path};

use nix::sys::resource::{Resource, getrlimit};

use super::Finding;
use crate::{
    datapath::{self, Feature, Tried},
    settings::Splice,
};

/// The oldest kernel that has everything: `bpf_set_retval` in `sock_addr`
/// programs came last (5.18).
const OLDEST: (u32, u32) = (5, 18);

/// The oldest kernel that distributions still keep up among those that are likely
/// to be met.
const USUAL: (u32, u32) = (6, 1);

/// The kernels that the tests ran on: `docs/kernels.md` says which tests, and where.
const TESTED: [(u32, u32); 4] = [(6, 1), (6, 12), (6, 18), (7, 2)];

/// Its version.
pub(super) fn release() -> Finding {
    match nix::sys::utsname::uname() {
        Ok(name) => judge_release(&name.release().to_string_lossy()),
        Err(errno) => Finding::warning(
            "kernel",
            format!("cannot ask for the version: {errno}"),
            "compare `uname -r` with the README",
        ),
    }
}

fn judge_release(release: &str) -> Finding {
    let subject = "kernel";
    let found = format!("Linux {release}");
    match version(release) {
        None => Finding::warning(
            subject,
            format!("{found}, a version that cannot be read"),
            format!("make sure that it is {} or newer", dotted(OLDEST)),
        ),
        Some(version) if version < OLDEST => Finding::failure(
            subject,
            format!(
                "{found} is too old: shunt needs {} (bpf_set_retval)",
                dotted(OLDEST)
            ),
            "update the node's kernel",
        ),
        Some(version) if version < USUAL => Finding::warning(
            subject,
            format!(
                "{found} should do, and was never tried; {} were tested",
                tested()
            ),
            format!("prefer {} or newer", dotted(USUAL)),
        ),
        Some(version) if TESTED.contains(&version) => Finding::ok(subject, found),
        Some(_) => Finding::ok(
            subject,
            format!(
                "{found}; {} were tested, what other verifiers say is not known",
                tested()
            ),
        ),
    }
}

fn dotted((major, minor): (u32, u32)) -> String {
    format!("{major}.{minor}")
}

/// The kernels of [`TESTED`], in words.
fn tested() -> String {
    let [before @ .., last] = TESTED.map(dotted);
    format!("{} and {last}", before.join(", "))
}

/// Major and minor number of a release such as `6.1.0-18-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Whether programs may read kernel memory: the owner of a socket is there.
pub(super) fn lockdown(state: &Path) -> Finding {
    let subject = "lockdown";
    match fs::read_to_string(state) {
        Ok(text) if text.contains("[confidentiality]") => Finding::failure(
            subject,
            "the kernel is locked down for confidentiality, and lets no program read the owner \
             of a socket (bpf_probe_read_kernel)",
            "boot with lockdown=integrity, or none",
        ),
        Ok(text) => Finding::ok(subject, text.trim().to_owned()),
        // Without the security module, or without securityfs.
        Err(_) => Finding::ok(subject, "none"),
    }
}

/// Whether the kernel says where its structures have which fields.
pub(super) fn btf() -> Finding {
    match datapath::offsets_are_known() {
        Ok(()) => Finding::ok("BTF", "every field that the programs read is found"),
        Err(error) => Finding::failure(
            "BTF",
            format!("{error:#}"),
            "run a kernel with CONFIG_DEBUG_INFO_BTF=y",
        ),
    }
}

/// Since Linux 5.11 maps are charged to the cgroup's memory, not to this limit.
pub(super) fn memlock() -> Finding {
    let subject = "memlock";
    match getrlimit(Resource::RLIMIT_MEMLOCK) {
        Ok((nix::libc::RLIM_INFINITY, _)) => Finding::ok(subject, "no limit"),
        Ok((soft, _)) => Finding::ok(
            subject,
            format!(
                "{soft} bytes, which do not count: since Linux 5.11 maps are charged to the cgroup's memory"
            ),
        ),
        Err(errno) => Finding::warning(
            subject,
            format!("cannot ask for the limit: {errno}"),
            "none is needed since Linux 5.11",
        ),
    }
}

/// Whether it takes the types of programs and maps and the helpers that are used:
/// one finding when it does, else one for each that it does not.
pub(super) fn features() -> Vec<Finding> {
    let subject = "features";
    let tried = datapath::features();
    let all = Finding::ok(subject, listed(&tried));
    let lacking: Vec<Finding> = tried
        .iter()
        .filter_map(|Feature { kind, name, found }| match found {
            Ok(true) => None,
            Ok(false) => Some(Finding::failure(
                subject,
                format!("this kernel has no {kind} {name}"),
                "it is left out by its configuration; run a distribution's kernel, 6.1 or newer",
            )),
            Err(error) => Some(Finding::warning(
                subject,
                format!("cannot tell whether there is the {kind} {name}: {error:#}"),
                "start the agent: it says what the kernel refuses",
            )),
        })
        .collect();
    if lacking.is_empty() {
        vec![all]
    } else {
        lacking
    }
}

/// By kinds, each named once.
fn listed(features: &[Feature]) -> String {
    let kinds = features.chunk_by(|one, next| one.kind == next.kind);
    let lists = kinds.map(|same| {
        let names: Vec<&str> = same.iter().map(|feature| feature.name.as_str()).collect();
        let kind = same.first().map_or("", |feature| feature.kind);
        format!("{kind}s {}", names.join(", "))
    });
    lists.collect::<Vec<_>>().join("; ")
}

/// How far connections can be spliced: tried out in a network namespace of its own,
/// which is gone again afterwards.
pub(super) fn splicing() -> Finding {
    let subject = "splicing";
    match datapath::try_out() {
        Ok(tried) => {
            let (mode, reason) = tried.strongest();
            let mode = Splice::from(mode);
            let what = format!(
                "--splice auto would be {}: {reason}{}",
                mode.name(),
                failing(&tried)
            );
            match mode {
                Splice::Off => Finding::warning(
                    subject,
                    what,
                    "the agent runs without splicing; another kernel may do it (docs/splicing.md)",
                ),
                Splice::Auto | Splice::Between | Splice::Proxy | Splice::All => {
                    Finding::ok(subject, what)
                }
            }
        }
        Err(error) => Finding::warning(
            subject,
            format!("it cannot be tried out: {error:#}"),
            "run the agent with --splice off",
        ),
    }
}

/// The trials that fail, where there is more than the one that decides.
fn failing(tried: &Tried) -> String {
    let failed = tried.trials.iter().filter(|trial| trial.failed.is_some());
    let names: Vec<&str> = failed.map(|trial| trial.name.as_str()).collect();
    match names.as_slice() {
        [] | [_] => String::new(),
        names => format!(
            "; of {} trials these fail: {}",
            tried.trials.len(),
            names.join(", ")
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::preflight::Level;

    #[test]
    fn releases_are_told_apart() {
        assert_eq!(version("6.1.0-18-amd64"), Some((6, 1)));
        assert_eq!(version("5.15.0"), Some((5, 15)));
        assert_eq!(version("6.18.44-fc-v669"), Some((6, 18)));
        assert_eq!(version("strange"), None);
    }

    #[test]
    fn old_kernels_are_refused_and_untried_ones_named() {
        let level = |release| judge_release(release).level;
        assert_eq!(level("5.15.0-91-generic"), Level::Failure);
        assert_eq!(level("5.18.0"), Level::Warning);
        assert_eq!(level("6.1.0-18-amd64"), Level::Ok);
        assert_eq!(level("10.0.1"), Level::Ok);
        assert_eq!(level("strange"), Level::Warning);
        let found = |release| judge_release(release).found;
        for tested in ["6.1.0-18-amd64", "6.12.107", "6.18.44", "7.2.13"] {
            assert_eq!(found(tested), format!("Linux {tested}"));
        }
        for untested in ["5.18.0", "6.2.0", "6.17.1", "6.19.0", "7.0.0"] {
            let found = found(untested);
            assert!(found.contains("6.1, 6.12, 6.18 and 7.2 were"), "{found}");
        }
    }

    #[test]
    fn features_are_listed_by_their_kinds() {
        let feature = |kind, name: &str| Feature {
            kind,
            name: name.to_owned(),
            found: Ok(true),
        };
        let features = [
            feature("map type", "hash"),
            feature("map type", "array"),
            feature("helper", "bpf_bind"),
        ];
        assert_eq!(listed(&features), "map types hash, array; helpers bpf_bind");
    }

    #[test]
    fn only_confidentiality_locks_the_programs_out() {
        let dir = tempfile::tempdir().expect("a directory");
        let state = dir.path().join("lockdown");
        assert_eq!(lockdown(&state).level, Level::Ok);
        for (text, level) in [
            ("[none] integrity confidentiality\n", Level::Ok),
            ("none [integrity] confidentiality\n", Level::Ok),
            ("none integrity [confidentiality]\n", Level::Failure),
        ] {
            fs::write(&state, text).expect("a file");
            assert_eq!(lockdown(&state).level, level, "{text}");
        }
    }
}
