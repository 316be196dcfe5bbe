//! A node: a bridge with pods on it, and the world outside.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
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
    /// [`GATEWAY`](Self::GATEWAY) over IPv6.
    pub const GATEWAY6: IpAddr = v6(0xfd00, 0x42, 1);
    /// [`OUTSIDE`](Self::OUTSIDE) over IPv6.
    pub const OUTSIDE6: IpAddr = v6(0x2001, 0xdb8, 7);
    /// [`FAR_OUTSIDE`](Self::FAR_OUTSIDE) over IPv6.
    pub const FAR_OUTSIDE6: IpAddr = v6(0x3fff, 0x113, 9);
    /// [`PRIVATE`](Self::PRIVATE) over IPv6.
    pub const PRIVATE6: IpAddr = v6(0xfd00, 0x172, 5);

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
             addr add {}/64 dev br0 nodad\n\
             addr add {}/128 dev lo\n\
             addr add {}/128 dev lo\n\
             addr add {}/128 dev lo\n\
             link set br0 up\n",
            Self::GATEWAY,
            Self::OUTSIDE,
            Self::FAR_OUTSIDE,
            Self::PRIVATE,
            Self::GATEWAY6,
            Self::OUTSIDE6,
            Self::FAR_OUTSIDE6,
            Self::PRIVATE6,
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

    /// A new pod on the bridge, of IPv4 alone: the first has the address
    /// [`FIRST_POD`](Self::FIRST_POD), the others those after it.
    ///
    /// # Panics
    ///
    /// When it cannot be made.
    pub fn pod(&self, name: &str) -> Pod {
        self.pod_with(name, Stack::V4)
    }

    /// A new pod with addresses of these families.
    ///
    /// # Panics
    ///
    /// When it cannot be made.
    pub fn pod_with(&self, name: &str, stack: Stack) -> Pod {
        let number = self.pods.fetch_add(1, Ordering::Relaxed);
        let ip4 = (v4(10, 42, 0, 2 + number), 24, Self::GATEWAY);
        let ip6 = (v6(0xfd00, 0x42, 2 + u16::from(number)), 64, Self::GATEWAY6);
        let addresses: &[_] = match stack {
            Stack::V4 => &[ip4],
            Stack::V6 => &[ip6],
            Stack::Dual => &[ip4, ip6],
        };
        let netns = Netns::new(name, Arc::clone(&self.cgroup));
        self.netns.ip(&format!(
            "link add pod{number} type veth peer name eth0 netns {}\n\
             link set pod{number} master br0 up\n",
            netns.name()
        ));
        netns.ip("link set eth0 up\n");
        for (ip, length, gateway) in addresses {
            // `nodad` is for IPv6; the kernel passes over it for IPv4.
            netns.ip(&format!(
                "addr add {ip}/{length} dev eth0 nodad\n\
                 route add default via {gateway}\n"
            ));
        }
        Pod {
            netns: Arc::new(netns),
            addresses: addresses.iter().map(|(ip, ..)| *ip).collect(),
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

/// Of which families a pod has global addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stack {
    /// IPv4
    V4,
    /// IPv6
    V6,
    /// Both; the first is of IPv4.
    Dual,
}

/// A pod: a namespace with an address on the node's bridge, or one of each
/// family.
#[derive(Debug)]
pub struct Pod {
    netns: Arc<Netns>,
    addresses: Vec<IpAddr>,
}

impl Pod {
    /// Its namespace.
    pub fn netns(&self) -> &Arc<Netns> {
        &self.netns
    }

    /// Its address, the first where it has two.
    pub fn ip(&self) -> IpAddr {
        self.addresses[0]
    }

    /// Its addresses.
    pub fn addresses(&self) -> &[IpAddr] {
        &self.addresses
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

/// `FIRST:SECOND::LAST`
const fn v6(first: u16, second: u16, last: u16) -> IpAddr {
    IpAddr::V6(Ipv6Addr::new(first, second, 0, 0, 0, 0, 0, last))
}
