//! What runs in the pods of the tests on a real node.
#![expect(
    unused_crate_dependencies,
    reason = "these are the dependencies of the harness"
)]

fn main() {}
