//! The CNI plugin: the runtime of the node calls it for each pod.
#![expect(unused_crate_dependencies, reason = "the library uses them")]

use std::process::ExitCode;

fn main() -> ExitCode {
    shunt::cni::plugin::main()
}
