//! Programs that are not the agent's, as others have, written instruction by instruction: they
//! need neither a compiler for BPF nor a library that loads what one makes.

use std::{
    fs::File,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
};

use crate::syscall;

/// Commands of bpf().
const MAP_CREATE: i32 = 0;
const MAP_LOOKUP_ELEM: i32 = 1;
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
        let load = [
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
        ];
        // SAFETY: the instructions and the licence outlive the call, which makes a program.
        let descriptor = unsafe { made(PROG_LOAD, &load) };
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
        // SAFETY: there are no addresses in it, and it makes a link.
        unsafe { made(LINK_CREATE, &[target, kind]) }
    }
}

/// A number that a program counts up: the only element of an array.
#[derive(Debug)]
pub(crate) struct Counter(OwnedFd);

impl Counter {
    /// One that is 0.
    ///
    /// # Panics
    ///
    /// When the kernel refuses.
    pub(crate) fn new() -> Self {
        /// `BPF_MAP_TYPE_ARRAY`
        const ARRAY: u32 = 2;
        // SAFETY: there are no addresses in it, and it makes a map.
        Self(unsafe { made(MAP_CREATE, &[words(ARRAY, 4), words(8, 1)]) })
    }

    /// As an instruction names it.
    pub(crate) fn number(&self) -> i32 {
        self.0.as_raw_fd()
    }

    /// What it is now.
    ///
    /// # Panics
    ///
    /// When it cannot be read.
    pub(crate) fn read(&self) -> u64 {
        let (key, mut value) = (0_u32, 0_u64);
        let lookup = [
            words(number(&self.0), 0),
            &raw const key as u64,
            &raw mut value as u64,
        ];
        // SAFETY: a key of four bytes and a value of eight, as the map was made.
        unsafe { syscall::bpf(MAP_LOOKUP_ELEM, &lookup) }.expect("it has an element");
        value
    }
}

/// One instruction: its code, the registers it writes and reads, an offset and a number.
pub(crate) const fn instruction(code: u8, to: u8, from: u8, offset: i16, number: i32) -> u64 {
    let [low, high] = offset.to_le_bytes();
    let [a, b, c, d] = number.to_le_bytes();
    u64::from_ne_bytes([code, from << 4 | to, low, high, a, b, c, d])
}

/// Two words of bpf()'s attributes.
fn words(first: u32, second: u32) -> u64 {
    let mut both = [0; 8];
    both[..4].copy_from_slice(&first.to_ne_bytes());
    both[4..].copy_from_slice(&second.to_ne_bytes());
    u64::from_ne_bytes(both)
}

/// A descriptor, as a word of bpf()'s attributes.
fn number(descriptor: &impl AsRawFd) -> u32 {
    descriptor.as_raw_fd().cast_unsigned()
}

/// What a command of bpf() has made.
///
/// # Panics
///
/// When the kernel refuses.
///
/// # Safety
///
/// The command makes a descriptor; where its attributes have addresses, there is what it reads.
unsafe fn made(command: i32, attributes: &[u64]) -> OwnedFd {
    // SAFETY: the caller's attributes.
    let made = unsafe { syscall::bpf(command, attributes) };
    let made = made.unwrap_or_else(|error| panic!("bpf() command {command}: {error}"));
    // SAFETY: the kernel has just made it for this process.
    unsafe { OwnedFd::from_raw_fd(made) }
}
