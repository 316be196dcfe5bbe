//! Every load of a program in this process, with what it cost the verifier.
//!
//! aya asks for the verifier's log only when a program was refused, and the figures are
//! nowhere else. So this program has a `syscall` of its own, in the place of the C
//! library's: of each program that is loaded it asks for the figures. The programs are
//! those that the agent loads, as it loads them.

use std::{
    ffi::c_long,
    mem::{offset_of, transmute},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicPtr, Ordering},
    },
};

use nix::libc;

/// `BPF_PROG_LOAD`
const PROG_LOAD: c_long = 5;
/// `BPF_LOG_STATS`
const STATISTICS: u32 = 4;
/// Bytes; larger than what the kernel says at that level.
const LOG_SIZE: usize = 16 * 1024;

/// A program that the kernel took.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Loaded {
    /// Its name; the kernel keeps 15 characters of it.
    pub(crate) name: String,
    /// Its instructions, as the verifier got them.
    pub(crate) instructions: Vec<[u8; 8]>,
    /// What the verifier said.
    pub(crate) log: String,
}

static LOADED: Mutex<Vec<Loaded>> = Mutex::new(Vec::new());

/// What was loaded since the last call, in that order.
pub(crate) fn take() -> Vec<Loaded> {
    std::mem::take(&mut *LOADED.lock().unwrap_or_else(PoisonError::into_inner))
}

/// The fields of `union bpf_attr` for [`PROG_LOAD`] that are looked at; more follow.
#[repr(C)]
#[derive(Clone, Copy)]
struct ProgLoad {
    kind: u32,
    instruction_count: u32,
    /// An address.
    instructions: u64,
    /// An address.
    licence: u64,
    log_level: u32,
    log_size: u32,
    /// An address.
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
}

/// More than any kernel's `union bpf_attr`.
const ATTR_SIZE: usize = 512;

/// A copy of what the loader gave, of which fields are changed.
#[repr(C)]
union Attr {
    load: ProgLoad,
    bytes: [u8; ATTR_SIZE],
}

type Syscall =
    unsafe extern "C" fn(c_long, c_long, c_long, c_long, c_long, c_long, c_long) -> c_long;

/// The C library's function of this name.
fn real() -> Option<Syscall> {
    // No lock: those of the standard library are made of system calls.
    static FOUND: AtomicPtr<libc::c_void> = AtomicPtr::new(std::ptr::null_mut());
    let mut found = FOUND.load(Ordering::Relaxed);
    if found.is_null() {
        // SAFETY: a name with a zero at its end.
        found = unsafe { libc::dlsym(libc::RTLD_NEXT, c"syscall".as_ptr()) };
        FOUND.store(found, Ordering::Relaxed);
    }
    if found.is_null() {
        return None;
    }
    // SAFETY: the C library declares it with these arguments, of which a call passes as
    // many as the system call takes.
    Some(unsafe { transmute::<*mut libc::c_void, Syscall>(found) })
}

/// In the place of the C library's `syscall`.
///
/// # Safety
///
/// As that one.
#[unsafe(no_mangle)]
unsafe extern "C" fn syscall(
    number: c_long,
    a: c_long,
    b: c_long,
    c: c_long,
    d: c_long,
    e: c_long,
    f: c_long,
) -> c_long {
    let Some(real) = real() else {
        return -1;
    };
    if number == libc::SYS_bpf && a == PROG_LOAD {
        // SAFETY: the arguments of that call: attributes and their length.
        if let Some(done) = unsafe { load(real, b as *const u8, c as usize) } {
            return done;
        }
    }
    // SAFETY: the caller's own call.
    unsafe { real(number, a, b, c, d, e, f) }
}

/// Loads a program with the figures; `None` when it has to be loaded as it was asked for,
/// as one whose loader wants the log for itself, and one that is refused.
///
/// # Safety
///
/// There are `length` bytes at `given`, which are attributes of this call.
unsafe fn load(real: Syscall, given: *const u8, length: usize) -> Option<c_long> {
    if !(offset_of!(ProgLoad, name) + 16..=ATTR_SIZE).contains(&length) {
        return None;
    }
    let mut attr = Attr {
        bytes: [0; ATTR_SIZE],
    };
    // SAFETY: the length fits; every pattern of bits is one of numbers.
    let load = unsafe {
        std::ptr::copy_nonoverlapping(given, (&raw mut attr).cast(), length);
        &mut attr.load
    };
    if load.log_level != 0 {
        return None;
    }
    let mut log = vec![0_u8; LOG_SIZE];
    load.log_level = STATISTICS;
    load.log_size = LOG_SIZE as u32;
    load.log = log.as_mut_ptr().addr() as u64;
    let load = *load;
    // SAFETY: the attributes outlive the call, and so does the log.
    let done = unsafe {
        real(
            libc::SYS_bpf,
            PROG_LOAD,
            (&raw const attr) as c_long,
            length as c_long,
            0,
            0,
            0,
        )
    };
    if done < 0 {
        return None;
    }
    // SAFETY: the kernel has just read so many there; an instruction is any eight bytes.
    let instructions = unsafe {
        std::slice::from_raw_parts(
            load.instructions as *const [u8; 8],
            load.instruction_count as usize,
        )
    };
    let loaded = Loaded {
        name: text(&load.name),
        instructions: instructions.to_vec(),
        log: text(&log),
    };
    LOADED
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(loaded);
    Some(done)
}

/// Up to the first zero.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0);
    String::from_utf8_lossy(&bytes[..end.unwrap_or(bytes.len())]).into_owned()
}
