//! Iterators over kernel objects, run to their end. Of those with a target aya starts none.

use std::{
    fs::File,
    io::{ErrorKind, Read as _},
    os::fd::{AsFd as _, BorrowedFd},
};

use anyhow::{Context as _, Result};
use aya::programs::{Iter, iter::IterLink};
use nix::libc;
use shunt_abi::Unfinished;

use super::link::{bpf, descriptor, raw};

/// `BPF_LINK_CREATE`
const LINK_CREATE: libc::c_long = 28;
/// `BPF_ITER_CREATE`
const ITER_CREATE: libc::c_long = 33;
/// `BPF_TRACE_ITER`
const TRACE_ITER: u32 = 28;

/// `union bpf_attr` for [`LINK_CREATE`] of an iterator.
#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    /// The address of an [`OverMap`].
    info: u64,
    info_len: u32,
    pad: u32,
}

/// `union bpf_iter_link_info` of an iterator over a map.
#[repr(C)]
struct OverMap {
    map: u32,
    rest: [u32; 7],
}

/// `union bpf_attr` for [`ITER_CREATE`].
#[repr(C)]
struct IterCreate {
    link: u32,
    flags: u32,
}

/// Runs an iterator that takes no target to its end.
///
/// # Errors
///
/// When the kernel refuses.
pub(super) fn all(program: &mut Iter) -> Result<()> {
    let link = program.attach().context("cannot start an iterator")?;
    let link: IterLink = program.take_link(link).context("cannot keep an iterator")?;
    read(link.into_file().context("cannot open an iterator")?).map(drop)
}

/// Asks which members of a map of sockets have not finished, by the program `shunt_members`.
///
/// # Errors
///
/// When the kernel refuses.
pub(super) fn unfinished(program: &Iter, map: BorrowedFd<'_>) -> Result<Vec<Unfinished>> {
    let said = over_map(program, map)?;
    let (members, _) = said.as_chunks();
    Ok(members.iter().map(Unfinished::from_bytes).collect())
}

/// Runs an iterator over the elements of a map to its end.
///
/// # Errors
///
/// When the kernel refuses.
fn over_map(program: &Iter, map: BorrowedFd<'_>) -> Result<Vec<u8>> {
    let program = program.fd().context("the iterator is not loaded")?;
    let over = OverMap {
        map: raw(map),
        rest: [0; 7],
    };
    let create = LinkCreate {
        program: raw(program.as_fd()),
        target: 0,
        attach_type: TRACE_ITER,
        flags: 0,
        info: std::ptr::from_ref(&over).addr() as u64,
        info_len: size_of::<OverMap>() as u32,
        pad: 0,
    };
    let link = bpf(LINK_CREATE, &create)
        .map(descriptor)
        .context("cannot start an iterator over a map")?;
    let create = IterCreate {
        link: raw(link.as_fd()),
        flags: 0,
    };
    let iterator = bpf(ITER_CREATE, &create)
        .map(descriptor)
        .context("cannot open an iterator over a map")?;
    read(File::from(iterator))
}

fn read(mut iterator: File) -> Result<Vec<u8>> {
    let mut said = Vec::new();
    loop {
        match iterator.read_to_end(&mut said) {
            Ok(_) => return Ok(said),
            // A million objects had nothing to say (`MAX_ITER_OBJECTS`): it goes on behind them.
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error).context("an iterator failed"),
        }
    }
}
