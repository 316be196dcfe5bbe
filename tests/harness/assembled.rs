//! Programs that are not the agent's, as others have, written instruction by instruction: they
//! need neither a compiler for BPF nor a library that loads what one makes.

use std::{
    fs::File,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
};

use crate::syscall;

/// Commands of bpf().
pub(crate) const MAP_CREATE: i32 = 0;
pub(crate) const MAP_LOOKUP_ELEM: i32 = 1;
const PROG_LOAD: i32 = 5;
const LINK_CREATE: i32 = 28;

/// Where a program hangs on a cgroup.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Hook {
    /// connect() to an IPv4 address.
    Connect4,
    /// What happens to TCP sockets.
    SockOps,
}

impl Hook {
    /// `enum bpf_prog_type`
    const fn program_type(self) -> u32 {
        match self {
            Self::Connect4 => 18,
            Self::SockOps => 13,
        }
    }

    /// `enum bpf_attach_type`
    const fn attach_type(self) -> u32 {
        match self {
            Self::Connect4 => 10,
            Self::SockOps => 3,
        }
    }
}

/// A program that is loaded.
#[derive(Debug)]
pub(crate) struct Program {
    hook: Hook,
    descriptor: OwnedFd,
}

impl Program {
    /// Loads it.
    ///
    /// # Panics
    ///
    /// When the kernel refuses.
    pub(crate) fn load(hook: Hook, instructions: &[u64]) -> Self {
        let count = u32::try_from(instructions.len()).expect("it is short");
        let descriptor = descriptor(
            PROG_LOAD,
            &[
                words(hook.program_type(), count),
                instructions.as_ptr() as u64,
                c"MIT".as_ptr() as u64,
                // No log, no version, no flags, no name.
                0,
                0,
                0,
                0,
                0,
                words(0, hook.attach_type()),
            ],
        );
        Self { hook, descriptor }
    }

    /// Attaches it to the cgroup at `path`, until what this returns is dropped.
    ///
    /// # Panics
    ///
    /// When the kernel refuses.
    pub(crate) fn attach(&self, path: &Path) -> OwnedFd {
        let cgroup = File::open(path).expect("a cgroup can be opened");
        let target = words(number(&self.descriptor), number(&cgroup));
        let kind = words(self.hook.attach_type(), 0);
        descriptor(LINK_CREATE, &[target, kind])
    }
}

/// One instruction: its code, the registers it writes and reads, an offset and a number.
pub(crate) const fn instruction(code: u8, to: u8, from: u8, offset: i16, number: i32) -> u64 {
    let [low, high] = offset.to_le_bytes();
    let [a, b, c, d] = number.to_le_bytes();
    u64::from_ne_bytes([code, from << 4 | to, low, high, a, b, c, d])
}

/// Two words of bpf()'s attributes.
pub(crate) fn words(first: u32, second: u32) -> u64 {
    let mut both = [0; 8];
    both[..4].copy_from_slice(&first.to_ne_bytes());
    both[4..].copy_from_slice(&second.to_ne_bytes());
    u64::from_ne_bytes(both)
}

/// A descriptor, as a word of bpf()'s attributes.
pub(crate) fn number(descriptor: &impl AsRawFd) -> u32 {
    descriptor.as_raw_fd().cast_unsigned()
}

/// What bpf() has made.
///
/// # Panics
///
/// When the kernel refuses.
pub(crate) fn descriptor(command: i32, attributes: &[u64]) -> OwnedFd {
    // SAFETY: the callers' attributes point to what outlives the call.
    let made = unsafe { syscall::bpf(command, attributes) };
    let made = made.unwrap_or_else(|error| panic!("bpf() command {command}: {error}"));
    // SAFETY: the kernel has just made it for this process.
    unsafe { OwnedFd::from_raw_fd(made) }
}
