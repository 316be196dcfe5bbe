//! The CNI plugin, and the agent's side of it.
//!
//! The runtime of the node calls the plugin, [`plugin`], after those that have made
//! the pod's network. The plugin asks the agent by what is in [`protocol`], and the
//! agent answers when the pod is enrolled: [`server`]. [`conflist`] says how the
//! plugin gets into the node's list of plugins, [`install`] puts it there and keeps it
//! there. What the plugin does while no agent answers is decided in [`sidecar`].

pub mod conflist;
pub mod install;
pub mod plugin;
pub mod protocol;
pub mod server;
pub mod sidecar;

/// What the plugin is called: the file's name in the runtime's directory of plugins, and
/// the `type` of its entry in the list.
pub const TYPE: &str = "shunt-cni";

/// The versions of the CNI specification that the plugin speaks, oldest first. Before the
/// first of them there were no chains.
pub const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// Since when there is CHECK.
pub(crate) const CHECK_SINCE: &str = "0.4.0";

/// Since when there are GC and STATUS.
pub(crate) const GC_SINCE: &str = "1.1.0";

/// Where kubelet has its files unless told otherwise.
pub const DEFAULT_KUBELET_DIR: &str = "/var/lib/kubelet";

/// A version as numbers that can be compared, if it is one.
pub(crate) fn version_numbers(version: &str) -> Option<[u32; 3]> {
    let mut numbers = version.split('.').map(str::parse);
    let three = [numbers.next()?, numbers.next()?, numbers.next()?];
    let [Ok(major), Ok(minor), Ok(patch)] = three else {
        return None;
    };
    numbers.next().is_none().then_some([major, minor, patch])
}
