//! What has to be true before anything is loaded.

use anyhow::{Context as _, Result, bail};

/// The oldest kernel that has everything: `bpf_set_retval` in `sock_addr`
/// programs came last (5.18). What shunt is tested on starts at 6.1.
const OLDEST: (u32, u32) = (5, 18);

/// Checks that this process may load programs, and that the kernel can.
///
/// # Errors
///
/// With the first thing that is missing, and what to do.
pub fn check() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("loading BPF programs takes root; run this as root, or with sudo");
    }
    let name = nix::sys::utsname::uname().context("cannot ask for the kernel's version")?;
    let release = name.release().to_string_lossy().into_owned();
    if let Some(version) = version(&release)
        && version < OLDEST
    {
        bail!(
            "Linux {release} is too old: shunt needs {}.{} (bpf_set_retval) and is tested from \
             6.1 on; update the node's kernel",
            OLDEST.0,
            OLDEST.1
        );
    }
    Ok(())
}

/// Major and minor number of a release such as `6.1.0-18-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_told_apart() {
        assert_eq!(version("6.1.0-18-amd64"), Some((6, 1)));
        assert_eq!(version("5.15.0"), Some((5, 15)));
        assert_eq!(version("6.18.44-fc-v669"), Some((6, 18)));
        assert_eq!(version("strange"), None);
        assert!(version("5.15.0") < Some(OLDEST));
        assert!(version("10.0.1") > Some(OLDEST));
    }
}
