//! Asks the verifier what each program cost it.
//!
//! The loader asks for the verifier's log only when a program was refused, and the
//! figures are nowhere else. This library is put before the C library's with
//! `LD_PRELOAD`, so that the programs are the ones that the agent loads, as it loads them:
//! each `bpf(BPF_PROG_LOAD)` asks for the figures, and what the kernel says goes, as one
//! line for a program, to the file that `SHUNT_VERIFIER_LOG` names:
//!
//! ```text
//! verifier shunt_connect4 stack depth 72+16 processed 1234 insns (limit …) … total_states 56 …
//! ```

use std::{
    env,
    ffi::c_long,
    fs::OpenOptions,
    io::Write as _,
    mem::transmute,
    sync::atomic::{AtomicPtr, Ordering},
};

use nix::libc;

/// The name of the variable that names the file.
const FILE: &str = "SHUNT_VERIFIER_LOG";

/// `BPF_PROG_LOAD`
const PROG_LOAD: c_long = 5;
/// `BPF_LOG_STATS`
const STATISTICS: u32 = 4;
/// Larger than what the kernel says at that level.
const LOG_SIZE: usize = 16 * 1024;

/// The fields of `union bpf_attr` for [`PROG_LOAD`] that are looked at; more follow.
#[repr(C)]
#[derive(Clone, Copy)]
struct ProgLoad {
    before: [u32; 6],
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    version: u32,
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
pub unsafe extern "C" fn syscall(
    number: c_long,
    a: c_long,
    b: c_long,
    c: c_long,
    d: c_long,
    e: c_long,
    f: c_long,
) -> c_long {
    let Some(real) = real() else {
        return -c_long::from(libc::ENOSYS);
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
    let file = env::var_os(FILE)?;
    if !(size_of::<ProgLoad>()..=ATTR_SIZE).contains(&length) {
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
    load.log_buf = log.as_mut_ptr().addr() as u64;
    let name = text(&load.name);
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
    let figures = text(&log).replace('\n', " ");
    // Where that fails the figures are missing, and whoever reads them says so.
    let _ = OpenOptions::new()
        .append(true)
        .create(true)
        .open(file)
        .and_then(|mut file| file.write_all(format!("verifier {name} {figures}\n").as_bytes()));
    Some(done)
}

/// Up to the first zero.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0);
    String::from_utf8_lossy(&bytes[..end.unwrap_or(bytes.len())]).into_owned()
}
