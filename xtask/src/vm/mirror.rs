//! Where kernels, QEMU and programs come from: Debian's suites, on the mirror that this
//! machine's apt uses.

use anyhow::{Context as _, Result};

use crate::exec::Step;

/// The suites that are looked through for kernels.
const SUITES: [&str; 4] = ["bookworm", "trixie", "trixie-backports", "sid"];

/// The suite that has a newer QEMU for Debian 12. What that needs is in [`PROGRAMS`].
pub(super) const BACKPORTS: &str = "bookworm-backports";

/// With which the lists are signed, unless the machine's sources name another.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The suite of the programs in a VM, those of Debian 12 as on the machine itself.
const PROGRAMS: &str = "bookworm";

/// The sources of an apt that knows the kernels: a file and its text.
pub(super) fn kernels() -> Result<(String, String)> {
    Ok(("kernels.list".to_owned(), lines(&mirror()?, &SUITES)))
}

/// The sources of an apt that knows the programs of another kind of machine.
pub(super) fn programs() -> Result<(String, String)> {
    Ok(("programs.list".to_owned(), lines(&mirror()?, &[PROGRAMS])))
}

/// The sources of an apt that knows a newer QEMU.
pub(super) fn emulator() -> Result<(String, String)> {
    let suites = [PROGRAMS, BACKPORTS];
    Ok(("emulator.list".to_owned(), lines(&mirror()?, &suites)))
}

/// Where Debian's archive is, and with what it is signed.
#[derive(Debug, PartialEq, Eq)]
struct Mirror {
    uri: String,
    keyring: String,
}

/// The mirror of this machine's own sources.
fn mirror() -> Result<Mirror> {
    let targets = Step::new("apt-get", "asking apt for its mirror of Debian")
        .args([
            "indextargets",
            "--format",
            "$(LABEL)|$(COMPONENT)|$(CREATED_BY)|$(REPO_URI)|$(SIGNED_BY)",
        ])
        .remedy("Run `apt-get update`.")
        .output()?;
    targets.lines().find_map(mirror_of).context(
        "this machine's apt has no source of Debian's main archive, from which the kernels come; \
         run `apt-get update` if it has",
    )
}

/// The mirror in one line of apt's answer, if it is one of Debian's archive.
fn mirror_of(line: &str) -> Option<Mirror> {
    let mut fields = line.split('|');
    let mut next = || fields.next();
    let wanted = next()? == "Debian" && next()? == "main" && next()? == "Packages";
    let (uri, keyring) = (next()?, next()?);
    // A field that is not set is given back as it was asked for.
    let keyring = if keyring.starts_with('/') {
        keyring
    } else {
        KEYRING
    };
    wanted.then(|| Mirror {
        uri: uri.to_owned(),
        keyring: keyring.to_owned(),
    })
}

fn lines(mirror: &Mirror, suites: &[&str]) -> String {
    let Mirror { uri, keyring } = mirror;
    let line = |suite| format!("deb [signed-by={keyring} target=Packages] {uri} {suite} main\n");
    suites.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_the_machines_own() {
        assert_eq!(
            mirror_of("Debian|main|Packages|http://mirror.example/debian/|$(SIGNED_BY)"),
            Some(Mirror {
                uri: "http://mirror.example/debian/".to_owned(),
                keyring: KEYRING.to_owned(),
            })
        );
        let signed = mirror_of("Debian|main|Packages|http://mirror.example/|/etc/keys.gpg");
        assert_eq!(signed.expect("a mirror").keyring, "/etc/keys.gpg");
        for other in [
            "",
            "Debian-Security|main|Packages|http://mirror.example/|$(SIGNED_BY)",
            "Debian|contrib|Packages|http://mirror.example/|$(SIGNED_BY)",
            "Debian|main|DEP-11|http://mirror.example/|$(SIGNED_BY)",
        ] {
            assert_eq!(mirror_of(other), None, "{other}");
        }
    }

    #[test]
    fn every_suite_has_its_line() {
        let mirror = Mirror {
            uri: "http://mirror.example/".to_owned(),
            keyring: KEYRING.to_owned(),
        };
        let lines = lines(&mirror, &SUITES);
        assert_eq!(lines.lines().count(), SUITES.len());
        assert!(
            lines.ends_with("http://mirror.example/ sid main\n"),
            "{lines}"
        );
    }
}
