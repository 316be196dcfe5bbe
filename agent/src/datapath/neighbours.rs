//! What else is loaded in this kernel.

use std::{fs::File, io, os::fd::AsRawFd as _, path::Path};

use anyhow::{Context as _, Result};
use aya::programs::{ProgramInfo, loaded_programs};
use nix::libc;

use super::hooks::{HOOKS, Hook};

/// A program that is not this agent's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// Where it hangs, such as `connect4`; the type of a program whose place the
    /// kernel does not tell.
    pub hook: &'static str,
    /// Its name, cut to 15 characters by the kernel where it has no BTF.
    pub name: String,
    /// The kernel's id of it.
    pub id: u32,
}

/// The programs that run on the sockets of a cgroup v2 directory, those of its
/// parents included.
///
/// # Errors
///
/// When the directory cannot be opened, or the kernel refuses the question.
pub fn neighbours(cgroup: &Path) -> Result<Vec<Neighbour>> {
    let root = File::open(cgroup).with_context(|| format!("cannot open {}", cgroup.display()))?;
    let mut found = Vec::new();
    for Hook {
        name: hook, number, ..
    } in HOOKS
    {
        let ids = attached(&root, number)
            .with_context(|| format!("the kernel does not say what hangs on {hook}"))?;
        found.extend(
            loaded()
                .filter(|info| ids.contains(&info.id()))
                .map(|info| Neighbour {
                    hook,
                    name: name(&info),
                    id: info.id(),
                }),
        );
    }
    Ok(found)
}

/// The programs that redirect messages between sockets. The kernel does not tell
/// which maps they are attached to.
///
/// # Errors
///
/// When the kernel refuses the question.
pub fn splicers() -> Result<Vec<Neighbour>> {
    /// `BPF_PROG_TYPE_SK_SKB` and `BPF_PROG_TYPE_SK_MSG`
    const TYPES: [(u32, &str); 2] = [(14, "sk_skb"), (16, "sk_msg")];
    let mut found = Vec::new();
    for info in loaded_programs() {
        let info = info.context("cannot list the loaded programs")?;
        let kind = info.program_type() as u32;
        if let Some((_, hook)) = TYPES.iter().find(|(number, _)| *number == kind) {
            found.push(Neighbour {
                hook,
                name: name(&info),
                id: info.id(),
            });
        }
    }
    Ok(found)
}

/// Those that can be looked at; others go while they are listed.
fn loaded() -> impl Iterator<Item = ProgramInfo> {
    loaded_programs().filter_map(Result::ok)
}

fn name(info: &ProgramInfo) -> String {
    String::from_utf8_lossy(info.name()).into_owned()
}

/// What of `union bpf_attr` belongs to `BPF_PROG_QUERY`. All of it: some kernels
/// write the last field (6.17) whatever size they are told.
#[repr(C)]
#[derive(Default)]
struct Query {
    target_fd: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    prog_cnt: u32,
    pad: u32,
    prog_attach_flags: u64,
    link_ids: u64,
    link_attach_flags: u64,
    revision: u64,
}

/// The ids of the programs that run on a hook, directly or by a parent of the
/// cgroup. aya asks this for one hook of its own.
fn attached(cgroup: &File, hook: u32) -> io::Result<Vec<u32>> {
    const BPF_PROG_QUERY: libc::c_long = 16;
    const BPF_F_QUERY_EFFECTIVE: u32 = 1;
    // The kernel takes no more on one hook (BPF_CGROUP_MAX_PROGS).
    let mut ids = [0_u32; 64];
    let mut query = Query {
        target_fd: cgroup.as_raw_fd().cast_unsigned(),
        attach_type: hook,
        query_flags: BPF_F_QUERY_EFFECTIVE,
        prog_ids: ids.as_mut_ptr() as u64,
        prog_cnt: 64,
        ..Query::default()
    };
    // SAFETY: the kernel writes at most `prog_cnt` numbers to `prog_ids`, which has
    // room for them, and nothing beyond the size of `query`.
    let done = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_QUERY,
            &raw mut query,
            size_of::<Query>(),
        )
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(ids.into_iter().take(query.prog_cnt as usize).collect())
}
