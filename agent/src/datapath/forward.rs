//! The programs on a pod's virtual interfaces.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, anyhow};
use aya::{
    Ebpf,
    programs::{
        LinkOrder, SchedClassifier, TcAttachType,
        tc::{
            NlOptions, SchedClassifierLink, TcAttachOptions, qdisc_add_clsact, qdisc_detach_program,
        },
    },
    util::KernelVersion,
};
use nix::net::if_::if_indextoname;
use shunt_abi::NetnsCookie;

use super::{KernelObject, typed};
use crate::netns::Netns;

/// The programs, and what of an interface each of them sees.
const PROGRAMS: [(&str, TcAttachType); 2] = [
    ("shunt_leaves", TcAttachType::Egress),
    ("shunt_arrives", TcAttachType::Ingress),
];

/// The first kernel in which classifiers are attached as links.
const FIRST_WITH_LINKS: KernelVersion = KernelVersion::new(6, 6, 0);

/// What is attached to the virtual interfaces of one pod, by their index.
/// Dropping it detaches it.
#[derive(Default)]
pub(super) struct Forwarding {
    attached: BTreeMap<u32, Vec<Attached>>,
}

/// A program on an interface.
struct Attached {
    name: &'static str,
    interface: String,
    id: u32,
    _hold: Hold,
}

/// What keeps a program on an interface.
enum Hold {
    /// A link: it goes when the agent goes, however it goes.
    Link { _link: SchedClassifierLink },
    /// A filter, before Linux 6.6. It has to be taken away in its namespace, and
    /// one that a killed agent left behind when the next one comes.
    Filter { _filter: Filter },
}

/// A filter of an interface.
struct Filter {
    netns: PathBuf,
    cookie: NetnsCookie,
    interface: String,
    name: &'static str,
    side: TcAttachType,
}

impl Drop for Filter {
    fn drop(&mut self) {
        let there = Netns::open(&self.netns).ok();
        // With the namespace or the interface its filters are gone as well.
        if let Some(netns) = there.filter(|netns| netns.cookie() == self.cookie) {
            let _ = netns.within(|| qdisc_detach_program(&self.interface, self.side, self.name));
        }
    }
}

impl Forwarding {
    /// Whether there is a wanted interface without programs.
    pub(super) fn lacks(&self, wanted: &BTreeSet<u32>) -> bool {
        self.missing(wanted).next().is_some()
    }

    /// The wanted interfaces without programs.
    fn missing<'a>(&'a self, wanted: &'a BTreeSet<u32>) -> impl Iterator<Item = u32> + 'a {
        let missing = |index: &&u32| !self.attached.contains_key(index);
        wanted.iter().filter(missing).copied()
    }

    /// Lets go of the interfaces that are not wanted any more.
    pub(super) fn retain(&mut self, wanted: &BTreeSet<u32>) {
        self.attached.retain(|index, _| wanted.contains(index));
    }

    /// Attaches the programs of `object` to the wanted interfaces that have none.
    ///
    /// # Errors
    ///
    /// When the kernel refuses. An interface that is gone meanwhile is no error:
    /// the kernel will say so.
    pub(super) fn attach(
        &mut self,
        object: &mut Ebpf,
        netns: &Netns,
        wanted: &BTreeSet<u32>,
    ) -> Result<()> {
        for (name, _) in PROGRAMS {
            program(object, name)?
                .load()
                .with_context(|| format!("the verifier does not take the program {name}"))?;
        }
        let missing: Vec<u32> = self.missing(wanted).collect();
        // An interface is looked for in the namespace of the calling thread.
        let attached = netns.within(|| -> Result<Vec<_>> {
            missing
                .into_iter()
                .filter_map(|index| Some((index, interface_name(index)?)))
                .map(|(index, interface)| Ok((index, attach(object, netns, &interface)?)))
                .collect()
        })??;
        self.attached.extend(attached);
        Ok(())
    }

    /// The programs, as `bpftool` shows them.
    pub(super) fn describe(&self, netns: &Path) -> impl Iterator<Item = KernelObject> {
        self.attached.values().flatten().map(move |attached| {
            let place = format!("{} in {}", attached.interface, netns.display());
            KernelObject {
                name: attached.name.to_owned(),
                id: attached.id,
                attached_to: Some(place),
            }
        })
    }
}

/// The name of an interface of the calling thread's namespace.
fn interface_name(index: u32) -> Option<String> {
    if_indextoname(index).ok()?.into_string().ok()
}

/// Attaches both programs to an interface of the calling thread's namespace,
/// which is `netns`. What leaves comes first: an answer whose source is not put
/// back is lost.
fn attach(object: &mut Ebpf, netns: &Netns, interface: &str) -> Result<Vec<Attached>> {
    let has_links = KernelVersion::current().is_ok_and(|version| version >= FIRST_WITH_LINKS);
    PROGRAMS
        .into_iter()
        .map(|(name, side)| {
            let program = program(object, name)?;
            let hold = if has_links {
                hold_by_link(program, interface, side)
            } else {
                hold_by_filter(program, netns, interface, name, side)
            };
            Ok(Attached {
                name,
                interface: interface.to_owned(),
                id: program.info().context("cannot look at a program")?.id(),
                _hold: hold.with_context(|| format!("cannot attach {name} to {interface}"))?,
            })
        })
        .collect()
}

fn hold_by_link(
    program: &mut SchedClassifier,
    interface: &str,
    side: TcAttachType,
) -> Result<Hold> {
    let options = TcAttachOptions::TcxOrder(LinkOrder::default());
    let link = program.attach_with_options(interface, side, options)?;
    Ok(Hold::Link {
        _link: program.take_link(link)?,
    })
}

fn hold_by_filter(
    program: &mut SchedClassifier,
    netns: &Netns,
    interface: &str,
    name: &'static str,
    side: TcAttachType,
) -> Result<Hold> {
    // Either fails where there is nothing to do: the queueing discipline is
    // there, a filter is not. Where it matters attaching fails as well.
    let _ = qdisc_add_clsact(interface);
    let _ = qdisc_detach_program(interface, side, name);
    let options = TcAttachOptions::Netlink(NlOptions::default());
    let link = program.attach_with_options(interface, side, options)?;
    // Its own end would look for the interface in the agent's namespace.
    std::mem::forget(program.take_link(link)?);
    let filter = Filter {
        netns: netns.path().to_owned(),
        cookie: netns.cookie(),
        interface: interface.to_owned(),
        name,
        side,
    };
    Ok(Hold::Filter { _filter: filter })
}

fn program<'o>(object: &'o mut Ebpf, name: &str) -> Result<&'o mut SchedClassifier> {
    typed(
        object
            .program_mut(name)
            .ok_or_else(|| anyhow!("the embedded object lacks the program {name}"))?,
    )
}
