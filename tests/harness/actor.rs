//! A test in two processes: the test binary is started once more, to run the
//! same test in another role.

use crate::{Netns, Owner, Process};

/// Holds the role of a process that is an actor.
const ROLE: &str = "SHUNT_TEST_ROLE";

/// Starts this binary in `netns`, as root, to run `test` (its full name, such as
/// `sockets::owners::a_test`) in `role`: there [`role`] tells it so.
///
/// # Panics
///
/// When it cannot be started.
pub fn start(netns: &Netns, test: &str, role: &str) -> Process {
    let binary = std::env::current_exe().expect("this binary");
    let mut command = netns.command(binary, Owner::ROOT);
    command
        .args(["--exact", test, "--nocapture"])
        .env(ROLE, role);
    Process::spawn(&format!("the actor {role}"), &mut command)
}

/// The role of this process; `None` in the test itself.
///
/// # Panics
///
/// When the role is no text.
pub fn role() -> Option<String> {
    let role = std::env::var_os(ROLE)?;
    Some(role.into_string().expect("roles are named in ASCII"))
}
