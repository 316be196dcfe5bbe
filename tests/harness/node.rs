//! A node: a bridge with pods on it, and the world outside.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
};

use crate::{Cgroup, Netns, Owner, command::output_of};

/// A namespace that stands for the node and for every host beyond it: pods hang
/// on its bridge, and remote hosts are addresses of it.
///
/// Every node has the same addresses, so that what was seen on two of them can
/// be compared as it is.
#[derive(Debug)]
pub struct Node {
    netns: Netns,
    cgroup: Arc<Cgroup>,
    pods: AtomicU8,
}

impl Node {
    /// The node's address on the bridge, the pods' gateway.
    pub const GATEWAY: IpAddr = v4(10, 42, 0, 1);
    /// A host outside of the mesh.
    pub const OUTSIDE: IpAddr = v4(198, 51, 100, 7);
    /// Another one, in another network.
    pub const FAR_OUTSIDE: IpAddr = v4(203, 0, 113, 9);
    /// A host in a private network.
    pub const PRIVATE: IpAddr = v4(172, 16, 5, 5);
    /// The address of the first pod.
    pub const FIRST_POD: IpAddr = v4(10, 42, 0, 2);

    /// A node without pods, in a cgroup of its own.
    ///
    /// # Panics
    ///
    /// When it cannot be made; this needs root.
    pub fn new() -> Self {
        let cgroup = Arc::new(Cgroup::new());
        let netns = Netns::new("node", Arc::clone(&cgroup));
        netns.ip(&format!(
            "link add br0 type bridge\n\
             addr add {}/24 dev br0\n\
             addr add {}/32 dev lo\n\
             addr add {}/32 dev lo\n\
             addr add {}/32 dev lo\n\
             link set br0 up\n",
            Self::GATEWAY,
            Self::OUTSIDE,
            Self::FAR_OUTSIDE,
            Self::PRIVATE,
        ));
        Self {
            netns,
            cgroup,
            pods: AtomicU8::new(0),
        }
    }

    /// The namespace of the hosts outside.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// The cgroup of everything on this node.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// A new pod on the bridge: the first has the address
    /// [`FIRST_POD`](Self::FIRST_POD), the others those after it.
    ///
    /// # Panics
    ///
    /// When it cannot be made.
    pub fn pod(&self, name: &str) -> Pod {
        let number = self.pods.fetch_add(1, Ordering::Relaxed);
        let ip = v4(10, 42, 0, 2 + number);
        let netns = Netns::new(name, Arc::clone(&self.cgroup));
        self.netns.ip(&format!(
            "link add pod{number} type veth peer name eth0 netns {}\n\
             link set pod{number} master br0 up\n",
            netns.name()
        ));
        netns.ip(&format!(
            "addr add {ip}/24 dev eth0\n\
             link set eth0 up\n\
             route add default via {}\n",
            Self::GATEWAY
        ));
        Pod {
            netns: Arc::new(netns),
            ip,
        }
    }
}

impl Node {
    /// A namespace with nothing but its loopback interface: a machine that hangs
    /// on something else than the bridge.
    ///
    /// # Panics
    ///
    /// When it cannot be made.
    pub fn machine(&self, purpose: &str) -> Netns {
        Netns::new(purpose, Arc::clone(&self.cgroup))
    }
}

impl Default for Node {
    fn default() -> Self {
        Self::new()
    }
}

/// A pod: a namespace with one address on the node's bridge.
#[derive(Debug)]
pub struct Pod {
    netns: Arc<Netns>,
    ip: IpAddr,
}

impl Pod {
    /// Its namespace.
    pub fn netns(&self) -> &Arc<Netns> {
        &self.netns
    }

    /// Its address.
    pub fn ip(&self) -> IpAddr {
        self.ip
    }

    /// Sets a kernel parameter of the pod, such as `net.ipv4.ip_forward`.
    ///
    /// # Panics
    ///
    /// When the kernel refuses.
    pub fn sysctl(&self, name: &str, value: &str) {
        self.netns.sysctl(name, value);
    }

    /// How many connections the connection tracking of this pod knows.
    ///
    /// # Panics
    ///
    /// When `conntrack` fails.
    pub fn conntrack_entries(&self) -> u64 {
        let count = output_of(self.netns.command("conntrack", Owner::ROOT).arg("-C"));
        count
            .trim()
            .parse()
            .unwrap_or_else(|_| panic!("`conntrack -C` wrote {count:?}"))
    }
}

const fn v4(a: u8, b: u8, c: u8, d: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(a, b, c, d))
}
