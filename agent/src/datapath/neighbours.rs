//! What else is loaded in this kernel.

use std::{
    collections::BTreeMap,
    fs::{self, DirEntry, File},
    io,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use aya::programs::{ProgramError, ProgramInfo, loaded_programs};
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
    let everywhere = on_every_hook(&root, EFFECTIVE)?;
    // By their place in `HOOKS` and their id: where they hang.
    let mut hanging: BTreeMap<(usize, u32), Vec<PathBuf>> =
        everywhere.iter().map(|hook| (*hook, Vec::new())).collect();
    for path in below(cgroup) {
        // One is open at a time: there may be thousands.
        let Some(directory) = unless_gone(File::open(cgroup.join(&path)))
            .with_context(|| format!("cannot open {} in {}", path.display(), cgroup.display()))?
        else {
            continue;
        };
        for hook in on_every_hook(&directory, 0)? {
            if !everywhere.contains(&hook) {
                hanging.entry(hook).or_default().push(path.clone());
            }
        }
    }
    let loaded = loaded()?;
    let found = hanging.into_iter().filter_map(|((place, id), below)| {
        let info = loaded.iter().find(|info| info.id() == id)?;
        Some(Neighbour {
            below,
            ..Neighbour::new(HOOKS[place].name, info)
        })
    });
    Ok(found.collect())
}

/// What hangs on each hook of a cgroup, by its place in [`HOOKS`]; nothing, when the cgroup is
/// removed meanwhile.
fn on_every_hook(cgroup: &File, flags: u32) -> Result<Vec<(usize, u32)>> {
    let mut found = Vec::new();
    for (place, Hook { name, number, .. }) in HOOKS.iter().enumerate() {
        let ids = unless_gone(attached(cgroup, *number, flags))
            .with_context(|| format!("the kernel does not say what hangs on {name}"))?;
        found.extend(ids.into_iter().flatten().map(|id| (place, id)));
    }
    Ok(found)
}

/// `None` in place of an error that says that something is not there any more.
fn unless_gone<T>(found: io::Result<T>) -> io::Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Every directory below a cgroup, as a path from there.
fn below(cgroup: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut ahead = vec![PathBuf::new()];
    while let Some(path) = ahead.pop() {
        // It may have been removed meanwhile.
        let entries = fs::read_dir(cgroup.join(&path)).into_iter().flatten();
        let is_directory = |entry: &DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
        let inside = entries.flatten().filter(is_directory);
        let inside: Vec<_> = inside.map(|entry| path.join(entry.file_name())).collect();
        found.extend_from_slice(&inside);
        ahead.extend(inside);
    }
    found.sort();
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
    let found = loaded()?.into_iter().filter_map(|info| {
        let kind = info.program_type() as u32;
        let (_, name) = types.iter().find(|(number, _)| *number == kind)?;
        Some(Neighbour::new(name, &info))
    });
    Ok(found.collect())
}

/// Every program that is loaded, but for those that go while they are listed.
fn loaded() -> Result<Vec<ProgramInfo>> {
    let all = loaded_programs().filter_map(|info| match info {
        Err(ProgramError::SyscallError(error)) => unless_gone(Err(error.io_error))
            .transpose()
            .map(|gone| gone.context("cannot list the loaded programs")),
        other => Some(other.context("cannot list the loaded programs")),
    });
    all.collect()
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
