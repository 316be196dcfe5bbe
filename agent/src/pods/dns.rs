//! Which nameservers a pod will have, before kubelet has written its resolv.conf.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
};

use super::{Dns, DnsPolicy};
use crate::settings::read_resolv_conf;

/// Where nameservers are looked up.
#[derive(Clone, Debug)]
pub(crate) struct Resolvers {
    /// Those of the cluster: the agent's own, because its DaemonSet has the policy
    /// `ClusterFirstWithHostNet`.
    cluster: PathBuf,
    /// Those of the node: the first of these files that names one that is not on
    /// loopback, where a resolver of the node listens that no pod can reach. It is
    /// how kubelet is set up on such nodes.
    node: [PathBuf; 2],
}

impl Resolvers {
    /// They are looked up in the agent's own file system and in that of the node's
    /// first process.
    pub(crate) fn new(proc: &Path) -> Self {
        let root = proc.join("1/root");
        Self {
            cluster: "/etc/resolv.conf".into(),
            node: [
                root.join("etc/resolv.conf"),
                root.join("run/systemd/resolve/resolv.conf"),
            ],
        }
    }

    /// The nameservers of a pod. What cannot be read counts as none.
    pub(crate) fn of(&self, dns: &Dns) -> Vec<IpAddr> {
        let mut found = match dns.policy {
            DnsPolicy::Cluster => read(&self.cluster),
            DnsPolicy::Node => self.of_node(),
            DnsPolicy::None => Vec::new(),
        };
        let own = dns.nameservers.iter().filter_map(|text| text.parse().ok());
        for ip in own.map(|ip: IpAddr| ip.to_canonical()) {
            if !found.contains(&ip) {
                found.push(ip);
            }
        }
        found
    }

    fn of_node(&self) -> Vec<IpAddr> {
        let [usual, behind_a_stub] = &self.node;
        let found = read(usual);
        if !found.is_empty() && found.iter().all(IpAddr::is_loopback) && behind_a_stub.exists() {
            return read(behind_a_stub);
        }
        found
    }
}

fn read(path: &Path) -> Vec<IpAddr> {
    read_resolv_conf(path).unwrap_or_else(|error| {
        tracing::debug!("no nameservers: {error}");
        Vec::new()
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn each_policy_has_its_place() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            fs::write(&path, text).expect("a file");
            path
        };
        let resolvers = Resolvers {
            cluster: file("cluster", "nameserver 10.96.0.10\n"),
            node: [
                file("node", "nameserver 127.0.0.53\n"),
                file("stub", "nameserver 192.0.2.1\n"),
            ],
        };
        let of = |policy, own: &[&str]| {
            let nameservers = own.iter().map(|ip| (*ip).to_owned()).collect();
            let found = resolvers.of(&Dns {
                policy,
                nameservers,
            });
            found.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(of(DnsPolicy::Cluster, &[]), ["10.96.0.10"]);
        assert_eq!(of(DnsPolicy::Node, &[]), ["192.0.2.1"]);
        assert_eq!(of(DnsPolicy::None, &[]), [""; 0]);
        assert_eq!(
            of(DnsPolicy::None, &["192.0.2.7", "none", "::ffff:192.0.2.8"]),
            ["192.0.2.7", "192.0.2.8"]
        );
        assert_eq!(
            of(DnsPolicy::Cluster, &["10.96.0.10", "192.0.2.7"]),
            ["10.96.0.10", "192.0.2.7"]
        );
        fs::remove_file(&resolvers.node[1]).expect("it is there");
        assert_eq!(of(DnsPolicy::Node, &[]), ["127.0.0.53"]);
    }
}
