//! The pods' networks and listeners change after the enrolment.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use shunt_abi::NetnsCookie;

use super::{Node, Pod};
use crate::{
    netns::Netns,
    network::{Changes, Network},
};

impl Node {
    /// Looks at the pods of which something has changed, and forgets those that
    /// are gone.
    pub(super) fn follow_networks(&mut self, changes: &Changes) {
        let concerned: Vec<NetnsCookie> = self
            .enrolled
            .iter()
            .filter(|(_, pod)| changes.concern(pod.nsid))
            .map(|(cookie, _)| *cookie)
            .collect();
        for cookie in concerned {
            self.follow_network(cookie, changes);
        }
        if changes.missed || !changes.gone.is_empty() {
            self.follow_kept();
        }
    }

    /// Looks again at a pod that could not be looked at. Meanwhile it may have
    /// gone, like any of which something was missed.
    pub(super) fn look_again(&mut self, cookie: NetnsCookie) {
        if let Some(pod) = self.enrolled.get_mut(&cookie) {
            pod.looks_again = false;
            self.follow_network(cookie, &Changes::missed());
        }
    }

    /// Brings what is known of a pod's network up to date.
    fn follow_network(&mut self, cookie: NetnsCookie, changes: &Changes) {
        let Some(pod) = self.enrolled.get(&cookie) else {
            return;
        };
        let netns = match same_netns(&pod.path, cookie) {
            Ok(netns) => netns,
            // Not there any more. That the id is free says less: the kernel says so a moment
            // after it is, when another namespace, this one, may have been given it.
            Err(_) if (changes.gone.contains(&pod.nsid) || changes.missed) && is_gone(pod) => {
                return self.forget_gone(cookie);
            }
            Err(error) => return self.keep_former(cookie, &error),
        };
        if let Err(error) = self.refresh(cookie, &netns) {
            self.keep_former(cookie, &error);
        }
    }

    /// Writes what has changed of a pod's network since it was last looked at.
    fn refresh(&mut self, cookie: NetnsCookie, netns: &Netns) -> Result<()> {
        let Some(pod) = self.enrolled.get_mut(&cookie) else {
            return Ok(());
        };
        let network = Network::read_with_proxy_source(netns, &pod.settings)?;
        let interfaces = network.marked(&pod.settings);
        if network.routes != pod.routes {
            self.pods
                .write_routes(cookie, &pod.routes, &network.routes)?;
            pod.routes.clone_from(&network.routes);
            tracing::debug!(netns = %pod.path.display(), cookie, "the routes have changed");
        }
        let version = &mut pod.version;
        if interfaces != version.interfaces {
            let list_set = version.compiled.pod.list_set;
            self.pods
                .write_interfaces(list_set, &version.interfaces, &interfaces)?;
            version.interfaces = interfaces;
            tracing::debug!(netns = %pod.path.display(), cookie, "the interfaces have changed");
        }
        self.datapath
            .follow_interfaces(netns, &mut pod.program, &version.interfaces)?;
        let settings = version
            .compiled
            .with_families(network.families(&pod.settings));
        if settings != version.compiled.pod {
            self.pods.put_in_force(cookie, &settings)?;
            version.compiled.pod = settings;
        }
        pod.complained = false;
        Ok(())
    }

    /// What was known of a pod's network stays in force: a connection to an
    /// address that is new is redirected as if it were another pod's. Says so
    /// once, and looks again after a while.
    fn keep_former(&mut self, cookie: NetnsCookie, why: &anyhow::Error) {
        let Some(pod) = self.enrolled.get_mut(&cookie) else {
            return;
        };
        if !pod.complained {
            pod.complained = true;
            tracing::warn!(
                cookie,
                "cannot follow a change of the network, goes by what was known before, \
                 and tries again every second: {why:#}"
            );
        }
        if !pod.looks_again {
            pod.looks_again = true;
            self.timer.look_again(cookie);
        }
    }

    /// Looks for listeners when the programs of one of these namespaces missed them; says how
    /// long it took.
    pub(super) fn find_listeners(&mut self, pods: &[NetnsCookie]) -> Duration {
        let start = Instant::now();
        let is_in_force =
            |cookie| self.enrolled.contains_key(cookie) || self.kept.contains_key(cookie);
        if !pods.iter().any(is_in_force) {
            return Duration::ZERO;
        }
        match self.datapath.scan_listeners() {
            Ok(()) => self.listeners_missed = false,
            // Somebody outside may ask for it again and again.
            Err(_) if self.listeners_missed => {}
            Err(error) => {
                self.listeners_missed = true;
                tracing::warn!("{error:#}; this is said once");
            }
        }
        start.elapsed()
    }
}

/// Opens the namespace at `path`, if it is still that with this cookie.
pub(super) fn same_netns(path: &Path, cookie: NetnsCookie) -> Result<Netns> {
    let netns = Netns::open(path)?;
    if netns.cookie() != cookie {
        bail!("another namespace is at {} now", path.display());
    }
    Ok(netns)
}

/// Whether the kernel says that a pod's namespace is gone. Where it does not say, it is not.
fn is_gone(pod: &Pod) -> bool {
    matches!(pod.program.is_left_over(), Ok(true))
}
