//! The node's network: an interface of its own, and what lies beyond.

use std::{fs, net::Ipv4Addr, process::Command};

use shunt_tests::command::output_of;

/// The address of the node.
pub(crate) const NODE: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
/// An address that is neither of the node nor of a pod: that of a machine in no
/// cluster, on which the tool serves.
pub(crate) const OUTSIDE: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// The addresses of pods, for the CNI plugin `host-local`.
pub(crate) const PODS: &str = "10.244.0.0/16";

/// The name of the network namespace of [`OUTSIDE`].
pub(crate) const OUTSIDE_NETNS: &str = "outside";

/// Gives this network namespace a loopback interface, and a link to another one
/// that stands for the world.
pub(crate) fn make() {
    for line in [
        "link set lo up",
        &format!("netns add {OUTSIDE_NETNS}"),
        &format!("link add eth0 type veth peer name eth0 netns {OUTSIDE_NETNS}"),
        &format!("addr add {NODE}/24 dev eth0"),
        "link set eth0 up",
        &format!("-n {OUTSIDE_NETNS} link set lo up"),
        &format!("-n {OUTSIDE_NETNS} addr add {OUTSIDE}/24 dev eth0"),
        &format!("-n {OUTSIDE_NETNS} link set eth0 up"),
        &format!("-n {OUTSIDE_NETNS} route add {PODS} via {NODE}"),
        &format!("route add default via {OUTSIDE}"),
    ] {
        output_of(Command::new("ip").args(line.split(' ')));
    }
    fs::write("/proc/sys/net/ipv4/ip_forward", "1").expect("the namespace is our own");
}
