//! What else is loaded in this kernel.

use std::{
    collections::BTreeMap,
    fs::{self, DirEntry, File},
    io,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
};

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
    /// The directories below the cgroup in question that it hangs on, from there; none
    /// when it hangs on that one or one above, or on no cgroup.
    pub below: Vec<PathBuf>,
}

impl Neighbour {
    fn new(hook: &'static str, info: &ProgramInfo) -> Self {
        Self {
            hook,
            name: String::from_utf8_lossy(info.name()).into_owned(),
            id: info.id(),
            below: Vec::new(),
        }
    }
}

/// The programs that run on the sockets of a cgroup v2 directory, or of some directory
/// below it; those of its parents included.
///
/// # Errors
///
/// When the directory cannot be opened, or the kernel refuses the question.
pub fn neighbours(cgroup: &Path) -> Result<Vec<Neighbour>> {
    let root = File::open(cgroup).with_context(|| format!("cannot open {}", cgroup.display()))?;
    let below = below(cgroup);
    // Those that can be looked at; others go while they are listed.
    let loaded: Vec<_> = loaded_programs().filter_map(Result::ok).collect();
    let mut found = Vec::new();
    for Hook { name, number, .. } in HOOKS {
        let mut hanging: BTreeMap<u32, Vec<PathBuf>> = attached(&root, number, EFFECTIVE)
            .with_context(|| format!("the kernel does not say what hangs on {name}"))?
            .into_iter()
            .map(|id| (id, Vec::new()))
            .collect();
        for (path, directory) in &below {
            // It may be removed meanwhile.
            for id in attached(directory, number, 0).unwrap_or_default() {
                hanging.entry(id).or_default().push(path.clone());
            }
        }
        found.extend(loaded.iter().filter_map(|info| {
            let below = hanging.remove(&info.id())?;
            Some(Neighbour {
                below,
                ..Neighbour::new(name, info)
            })
        }));
    }
    Ok(found)
}

/// Every directory below a cgroup, with its path from there.
fn below(cgroup: &Path) -> Vec<(PathBuf, File)> {
    let mut found = Vec::new();
    let mut ahead = vec![PathBuf::new()];
    while let Some(path) = ahead.pop() {
        // What is removed meanwhile has no programs.
        let entries = fs::read_dir(cgroup.join(&path)).into_iter().flatten();
        let is_directory = |entry: &DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
        for entry in entries.flatten().filter(is_directory) {
            let path = path.join(entry.file_name());
            found.extend(
                File::open(entry.path())
                    .ok()
                    .map(|opened| (path.clone(), opened)),
            );
            ahead.push(path);
        }
    }
    found.sort_by(|(one, _), (other, _)| one.cmp(other));
    found
}

/// The programs that redirect messages between sockets. The kernel does not tell
/// which maps they are attached to.
///
/// # Errors
///
/// When the kernel refuses the question.
pub fn splicers() -> Result<Vec<Neighbour>> {
    // `BPF_PROG_TYPE_SK_SKB` and `BPF_PROG_TYPE_SK_MSG`
    of_types(&[(14, "sk_skb"), (16, "sk_msg")])
}

/// The programs that choose the socket of an incoming connection.
///
/// # Errors
///
/// When the kernel refuses the question.
pub fn lookups() -> Result<Vec<Neighbour>> {
    // `BPF_PROG_TYPE_SK_LOOKUP`
    of_types(&[(30, "sk_lookup")])
}

/// The loaded programs of these types (`enum bpf_prog_type`), which have such names.
fn of_types(types: &[(u32, &'static str)]) -> Result<Vec<Neighbour>> {
    let mut found = Vec::new();
    for info in loaded_programs() {
        let info = info.context("cannot list the loaded programs")?;
        let kind = info.program_type() as u32;
        if let Some((_, name)) = types.iter().find(|(number, _)| *number == kind) {
            found.push(Neighbour::new(name, &info));
        }
    }
    Ok(found)
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

/// `BPF_F_QUERY_EFFECTIVE`: what runs there, by a parent of the cgroup as well.
const EFFECTIVE: u32 = 1;

/// The ids of the programs that hang on a hook of a cgroup. aya asks this for one hook of
/// its own.
fn attached(cgroup: &File, hook: u32, flags: u32) -> io::Result<Vec<u32>> {
    const BPF_PROG_QUERY: libc::c_long = 16;
    // The kernel takes no more on one hook (BPF_CGROUP_MAX_PROGS).
    let mut ids = [0_u32; 64];
    let mut query = Query {
        target_fd: cgroup.as_raw_fd().cast_unsigned(),
        attach_type: hook,
        query_flags: flags,
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
