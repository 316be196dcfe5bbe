//! The programs on a pod's virtual interfaces.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, anyhow};
use aya::{
    Ebpf,
    programs::{
        SchedClassifier, TcAttachType,
        tc::{
            NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle, qdisc_add_clsact,
            qdisc_detach_program,
        },
    },
    util::KernelVersion,
};
use nix::net::if_::{if_indextoname, if_nameindex};
use shunt_abi::NetnsCookie;

use super::{
    KernelObject,
    link::{Link, Target},
    links::{Links, Place, interface_name as pin_name},
    typed,
};
use crate::netns::Netns;

/// The programs, what of an interface each of them sees, and the kernel's number of
/// that hook (`BPF_TCX_EGRESS`, `BPF_TCX_INGRESS`).
const PROGRAMS: [(&str, TcAttachType, u32); 2] = [
    ("shunt_leaves", TcAttachType::Egress, 47),
    ("shunt_arrives", TcAttachType::Ingress, 46),
];

/// Where a filter stands among others; known, so that it can be replaced in one step.
const FILTER_PRIORITY: u16 = 0x5348;
const FILTER_HANDLE: TcHandle = TcHandle::new(0, 1);

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
    hold: Hold,
}

/// What keeps a program on an interface.
enum Hold {
    /// A link: it goes when the agent goes, however it goes, or stays in any case.
    Link(Link),
    /// A filter, before Linux 6.6. It has to be taken away in its namespace, and
    /// one that a killed agent left behind when the next one comes.
    Filter(Filter),
}

impl Attached {
    /// Takes it away, whether it is to stay without the agent or not.
    fn detach(self) {
        match self.hold {
            Hold::Link(link) => {
                if let Err(error) = link.detach() {
                    tracing::warn!("a program is left on {}: {error:#}", self.interface);
                }
            }
            Hold::Filter(mut filter) => filter.stays = false,
        }
    }
}

/// A filter of an interface.
struct Filter {
    netns: PathBuf,
    cookie: NetnsCookie,
    interface: String,
    name: &'static str,
    side: TcAttachType,
    /// It outlives the agent.
    stays: bool,
}

impl Drop for Filter {
    fn drop(&mut self) {
        if self.stays {
            return;
        }
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
        let unwanted = self
            .attached
            .extract_if(.., |index, _| !wanted.contains(index));
        unwanted
            .flat_map(|(_, programs)| programs)
            .for_each(Attached::detach);
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
        links: &Links,
    ) -> Result<()> {
        for (name, ..) in PROGRAMS {
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
                .map(|(index, interface)| {
                    let programs = attach(object, netns, (index, &interface), links)?;
                    Ok((index, programs))
                })
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
fn attach(
    object: &mut Ebpf,
    netns: &Netns,
    (index, interface): (u32, &str),
    links: &Links,
) -> Result<Vec<Attached>> {
    let has_links = KernelVersion::current().is_ok_and(|version| version >= FIRST_WITH_LINKS);
    PROGRAMS
        .into_iter()
        .map(|(name, side, attach_type)| {
            let program = program(object, name)?;
            let hold = if has_links {
                let place = Place {
                    name: pin_name(name, netns.cookie(), index),
                    target: Target::Interface(index),
                    attach_type,
                    is_entry: true,
                };
                links.hang(&place, program.fd()?.as_fd()).map(Hold::Link)
            } else {
                hold_by_filter(program, netns, interface, name, side, links.stay())
            };
            Ok(Attached {
                name,
                interface: interface.to_owned(),
                id: program.info().context("cannot look at a program")?.id(),
                hold: hold.with_context(|| format!("cannot attach {name} to {interface}"))?,
            })
        })
        .collect()
}

fn hold_by_filter(
    program: &mut SchedClassifier,
    netns: &Netns,
    interface: &str,
    name: &'static str,
    side: TcAttachType,
    stays: bool,
) -> Result<Hold> {
    // It fails where there is nothing to do: the queueing discipline is there.
    let _ = qdisc_add_clsact(interface);
    // In the place of that of a former agent, if there is one.
    let former =
        SchedClassifierLink::attached(interface, side, FILTER_PRIORITY, FILTER_HANDLE, None)?;
    let link = program.attach_to_link(former).or_else(|_nothing_there| {
        let options = TcAttachOptions::Netlink(NlOptions {
            priority: FILTER_PRIORITY,
            handle: FILTER_HANDLE,
            classid: None,
        });
        program.attach_with_options(interface, side, options)
    })?;
    // Its own end would look for the interface in the agent's namespace.
    std::mem::forget(program.take_link(link)?);
    let filter = Filter {
        netns: netns.path().to_owned(),
        cookie: netns.cookie(),
        interface: interface.to_owned(),
        name,
        side,
        stays,
    };
    Ok(Hold::Filter(filter))
}

/// Takes the filters away that former agents have left on the interfaces of a
/// namespace.
pub(super) fn remove_filters(netns: &Netns) {
    let done = netns.within(|| {
        let Ok(interfaces) = if_nameindex() else {
            return;
        };
        for interface in &interfaces {
            let interface = interface.name().to_string_lossy();
            for (name, side, _) in PROGRAMS {
                // It fails where there is none.
                let _ = qdisc_detach_program(&interface, side, name);
            }
        }
    });
    if let Err(error) = done {
        tracing::warn!("cannot look for filters: {error:#}");
    }
}

fn program<'o>(object: &'o mut Ebpf, name: &str) -> Result<&'o mut SchedClassifier> {
    typed(
        object
            .program_mut(name)
            .ok_or_else(|| anyhow!("the embedded object lacks the program {name}"))?,
    )
}
