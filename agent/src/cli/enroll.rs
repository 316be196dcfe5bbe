//! `shunt enroll` and `shunt unenroll`.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::Args;

use super::ask;
use crate::{
    control::Request,
    node::EnrolRequest,
    settings::{Flags, process_env, read_resolv_conf},
};

/// Redirects a network namespace; returns when the redirection is in force.
/// Enrolling it again replaces its settings at once.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  As Istio's init container does:
    shunt enroll --netns /run/netns/pod -p 15001 -z 15006 -u 1337 -g 1337 -m REDIRECT \\
      -i '*' -x '' -b '*' -d 15090,15021,15020 -q '' -o '' -c '' -k ''
  The same in short, the database left alone:
    shunt enroll --netns /proc/4242/ns/net --mesh istio -o 5432
  With DNS:
    shunt enroll --netns /run/netns/pod --mesh istio --redirect-dns \\
      --resolv-conf /var/lib/pod/resolv.conf")]
pub struct Enroll {
    /// The namespace, such as /run/netns/NAME or /proc/PID/ns/net
    #[arg(long, env = "SHUNT_NETNS", value_name = "PATH")]
    netns: PathBuf,
    /// The pod's resolv.conf, for DNS capture [default: no resolver is known]
    #[arg(long, env = "SHUNT_RESOLV_CONF", value_name = "PATH")]
    resolv_conf: Option<PathBuf>,
    #[command(flatten)]
    flags: Flags,
}

impl Enroll {
    /// Asks the agent.
    ///
    /// # Errors
    ///
    /// With what is wrong in the input, or what kept the agent from it.
    pub fn run(&self, socket: &Path) -> Result<()> {
        let resolvers = match &self.resolv_conf {
            Some(path) => read_resolv_conf(path)?,
            None => Vec::new(),
        };
        let request = EnrolRequest {
            netns: absolute(&self.netns)?,
            resolvers,
            settings: self.flags.settings(&process_env)?,
            pod: None,
        };
        ask(socket, &Request::Enrol(Box::new(request))).map(drop)
    }
}

/// Ends the redirection of a network namespace.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Example:
    shunt unenroll --netns /run/netns/pod")]
pub struct Unenroll {
    /// The namespace, as it was enrolled
    #[arg(long, env = "SHUNT_NETNS", value_name = "PATH")]
    netns: PathBuf,
}

impl Unenroll {
    /// Asks the agent.
    ///
    /// # Errors
    ///
    /// When the namespace is not enrolled, or the agent is not to be reached.
    pub fn run(&self, socket: &Path) -> Result<()> {
        ask(socket, &Request::Unenrol(absolute(&self.netns)?)).map(drop)
    }
}

/// The path as the agent has to see it: it runs in another directory, and its
/// `/proc/self` is another process.
fn absolute(path: &Path) -> Result<PathBuf> {
    let path =
        std::path::absolute(path).with_context(|| format!("{} is no path", path.display()))?;
    Ok(match path.strip_prefix("/proc/self") {
        Ok(rest) => Path::new("/proc")
            .join(std::process::id().to_string())
            .join(rest),
        Err(_) => path,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_told_as_the_agent_sees_it() {
        let own = absolute(Path::new("/proc/self/ns/net")).expect("it is a path");
        assert_eq!(
            own,
            PathBuf::from(format!("/proc/{}/ns/net", std::process::id()))
        );
        let named = absolute(Path::new("/run/netns/a")).expect("it is a path");
        assert_eq!(named, PathBuf::from("/run/netns/a"));
        assert!(
            absolute(Path::new("here"))
                .expect("it is a path")
                .is_absolute()
        );
    }
}
