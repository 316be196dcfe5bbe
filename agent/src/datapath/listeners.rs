//! Which program looks for listeners that were there before their namespace was
//! enrolled.

/// The first kernel whose iterator over TCP sockets does not hold the spin lock of the
/// socket that it shows: adding that socket to a map takes the same lock.
const UNLOCKED: (u32, u32) = (6, 5);

/// An iterator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Visitor {
    /// The program.
    pub(super) program: &'static str,
    /// What the kernel calls the iterator.
    pub(super) target: &'static str,
}

/// Over the TCP sockets of a namespace.
const SOCKETS: Visitor = Visitor {
    program: "shunt_listeners",
    target: "tcp",
};

/// Over the open files of all tasks: slower, and it holds no lock of a socket.
const FILES: Visitor = Visitor {
    program: "shunt_open_listeners",
    target: "task_file",
};

/// The one for the running kernel. One whose version cannot be read gets the one that
/// is right on every kernel.
pub(super) fn visitor() -> Visitor {
    let release = nix::sys::utsname::uname();
    release.map_or(FILES, |name| for_release(&name.release().to_string_lossy()))
}

/// A distribution may have repaired an older kernel: that is not seen, and costs time
/// only.
fn for_release(release: &str) -> Visitor {
    match version(release) {
        Some(version) if version >= UNLOCKED => SOCKETS,
        _ => FILES,
    }
}

/// Major and minor number of a release such as `6.1.0-18-amd64`.
pub(crate) fn version(release: &str) -> Option<(u32, u32)> {
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
    }

    #[test]
    fn older_kernels_look_at_files() {
        for (release, visitor) in [
            ("6.1.0-18-amd64", FILES),
            ("6.4.16", FILES),
            ("6.5.0", SOCKETS),
            ("7.2.12+deb13-cloud-amd64", SOCKETS),
            ("strange", FILES),
        ] {
            assert_eq!(for_release(release), visitor, "{release}");
        }
    }
}
