//! What every program costs the verifier of this kernel, a JSON object for each time that
//! one was loaded. They are loaded for each mode of splicing, for the programs of a mode
//! differ from those of another in constants; and those of the self-test with them.
//!
//! `cargo xtask verifier` builds and runs it, also in virtual machines with other kernels.
//! With `SHUNT_LOG=shunt::bpf=debug` the programs have in them what logs their decisions.
#![expect(
    unused_crate_dependencies,
    reason = "these are the dependencies of the harness"
)]
#![expect(clippy::print_stdout, reason = "another program reads it")]

mod figures;
mod load;

use std::{collections::BTreeMap, path::Path, sync::Arc};

use anyhow::{Context as _, Result};
use shunt::{
    datapath::{Afterwards, Datapath},
    netns::Netns,
    observe::{LogFormat, logs},
    settings::Splice,
};
use shunt_abi::{INTERFACE_VIRTUAL, Interface};
use shunt_tests::{Cgroup, agent::Place, netns};

use figures::Figures;

/// Every mode; those of programs that were loaded before differ in constants.
const MODES: [Splice; 4] = [Splice::Off, Splice::Between, Splice::Proxy, Splice::All];

/// How the names of the programs begin. aya loads others, to find out what there is.
const OURS: &str = "shunt_";

fn main() -> Result<()> {
    shunt_tests::require_root();
    logs::start(LogFormat::Text);
    let cgroup = Arc::new(Cgroup::new());
    let place = Place::new(&cgroup);
    let pod = netns::Netns::new("verifier", Arc::clone(&cgroup));
    for mode in MODES {
        load_all(cgroup.path(), &place.bpffs(), &pod.path(), mode)
            .with_context(|| format!("with --splice {mode:?}"))?;
        for loaded in load::take() {
            if loaded.name.starts_with(OURS) {
                let figures = serde_json::to_string(&Figures::of(&loaded)?)?;
                println!("{figures}");
            }
        }
    }
    Ok(())
}

/// Loads every program as the agent does that splices so, with one pod that has a virtual
/// interface. None of them is in force: nothing hangs on the cgroup, and the pod is not
/// enrolled.
fn load_all(cgroup: &Path, bpffs: &Path, pod: &Path, mode: Splice) -> Result<()> {
    let mut datapath = Datapath::load(cgroup, bpffs, &[], mode, Afterwards::Nothing, None)?;
    let pod = Netns::open(pod)?;
    let mut programs = datapath.attach_pod(&pod)?;
    let on_loopback = Interface {
        flags: INTERFACE_VIRTUAL,
        ..Interface::default()
    };
    let interfaces = BTreeMap::from([(LOOPBACK, on_loopback)]);
    datapath.follow_interfaces(&pod, &mut programs, &interfaces)?;
    programs.detach();
    datapath.stop_splicing()
}

/// The index of every namespace's `lo`.
const LOOPBACK: u32 = 1;
