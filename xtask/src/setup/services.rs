//! Packages that bring a service: the tests want the program, and nothing that
//! runs on the machine by itself.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use crate::exec::{Step, find_program};

/// What Debian's packages ask before they start a service (its policy, section
/// 9.3.3.1): 101 means no.
const POLICY: &str = "/usr/sbin/policy-rc.d";
const NO: &str = "#!/bin/sh\nexit 101\n";

/// Where PostgreSQL's packages read whether to make a database cluster when
/// they are installed.
const CLUSTERS: &str = "/etc/postgresql-common/createcluster.conf";
const NO_CLUSTER: &str = "create_main_cluster = false\n";

/// While this lives, no package that is installed starts its service.
#[derive(Debug)]
pub(super) struct Quiet {
    /// To be removed at the end; `None` where the machine has its own.
    policy: Option<PathBuf>,
}

impl Quiet {
    pub(super) fn begin() -> Result<Self> {
        write_if_absent(Path::new(CLUSTERS), NO_CLUSTER, 0o644)?;
        let policy = Path::new(POLICY);
        let written = write_if_absent(policy, NO, 0o755)?;
        Ok(Self {
            policy: written.then(|| policy.to_owned()),
        })
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        if let Some(policy) = &self.policy {
            // Somebody may have been quicker.
            let _ = fs::remove_file(policy);
        }
    }
}

/// Says whether it was absent.
fn write_if_absent(path: &Path, text: &str, mode: u32) -> Result<bool> {
    let doing = || format!("writing {}, so that no service is started", path.display());
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(doing)?;
    }
    match fs::File::create_new(path) {
        Ok(_) => {
            fs::write(path, text).with_context(doing)?;
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).with_context(doing)?;
            Ok(true)
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error).with_context(doing),
    }
}

/// Keeps a service that was just installed from being started at the next boot.
pub(super) fn disable(service: &str) -> Result<()> {
    let script = Path::new("/etc/init.d").join(service).exists();
    let Some((program, args)) =
        how_to_disable(service, script, find_program("systemctl").is_some())
    else {
        return Ok(());
    };
    Step::new(program, "disabling a service that the tests do not need")
        .args(args)
        .remedy(format!(
            "Look at `systemctl status {service}`; the tests start a server of their own."
        ))
        .run()
}

/// `update-rc.d` disables the unit as well, but fails for a service without a
/// script of System V, as containerd. Of such a one there is only the unit,
/// which `systemctl disable` also takes away where systemd does not run, and
/// which nothing starts where it is not installed.
fn how_to_disable(
    service: &str,
    has_script: bool,
    has_systemd: bool,
) -> Option<(&'static str, [&str; 2])> {
    match (has_script, has_systemd) {
        (true, _) => Some(("update-rc.d", [service, "disable"])),
        (false, true) => Some(("systemctl", ["disable", service])),
        (false, false) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_without_a_script_has_only_its_unit() {
        let etcd = Some(("update-rc.d", ["etcd", "disable"]));
        assert_eq!(how_to_disable("etcd", true, true), etcd);
        assert_eq!(how_to_disable("etcd", true, false), etcd);
        assert_eq!(
            how_to_disable("containerd", false, true),
            Some(("systemctl", ["disable", "containerd"]))
        );
        assert_eq!(how_to_disable("containerd", false, false), None);
    }

    #[test]
    fn what_the_machine_has_is_left_alone() {
        let dir = std::env::temp_dir().join(format!("xtask-services-{}", std::process::id()));
        let path = dir.join("deeper/policy");
        let first = write_if_absent(&path, NO, 0o755).expect("a directory in /tmp");
        let second = write_if_absent(&path, "another", 0o644).expect("a directory in /tmp");
        let text = fs::read_to_string(&path).expect("it was written");
        let mode = fs::metadata(&path).expect("it was written").permissions();
        fs::remove_dir_all(&dir).expect("it is mine");
        assert!(first && !second);
        assert_eq!(text, NO);
        assert_eq!(mode.mode() & 0o777, 0o755);
    }
}
