//! What iterators visit: open files, members of a map.

use core::{ffi::c_void, ptr::read_volatile};

use aya_ebpf::{
    bindings::{file, seq_file},
    helpers::generated::{bpf_seq_write, bpf_sock_from_file},
};
use shunt_abi::Unfinished;

use super::Socket;

/// What an iterator over open files sees (`struct bpf_iter__task_file`).
#[derive(Clone, Copy)]
pub struct FileVisit(*mut TaskFile);

/// `struct bpf_iter__task_file`
#[repr(C)]
pub struct TaskFile {
    meta: *mut c_void,
    task: *mut c_void,
    fd: u32,
    file: *mut file,
}

impl FileVisit {
    /// From the program's context.
    #[inline(always)]
    pub const fn new(ctx: *mut TaskFile) -> Self {
        Self(ctx)
    }

    /// The socket that the file is; `None` when it is none. `offset` is that of
    /// `sk` in `struct socket` (Linux 5.11).
    #[inline(always)]
    pub fn socket(self, offset: u32) -> Option<Socket> {
        let file = read!(self.0, file);
        if file.is_null() {
            return None;
        }
        // SAFETY: a file of this context.
        let socket = unsafe { bpf_sock_from_file(file) };
        if socket.is_null() {
            return None;
        }
        // SAFETY: the verifier knows the structure and checks the offset.
        let sk = unsafe {
            read_volatile(
                socket
                    .cast::<u8>()
                    .add(offset as usize)
                    .cast::<*mut c_void>(),
            )
        };
        (!sk.is_null()).then_some(Socket(sk))
    }
}

/// What an iterator over a socket map sees (`struct bpf_iter__sockmap`).
#[derive(Clone, Copy)]
pub struct MemberVisit(*mut Member);

/// `struct bpf_iter__sockmap`
#[repr(C)]
pub struct Member {
    meta: *mut VisitMeta,
    map: *mut c_void,
    key: *mut c_void,
    sk: *mut c_void,
}

/// The start of `struct bpf_iter_meta`.
#[repr(C)]
struct VisitMeta {
    seq: *mut seq_file,
}

impl MemberVisit {
    /// From the program's context.
    #[inline(always)]
    pub const fn new(ctx: *mut Member) -> Self {
        Self(ctx)
    }

    /// The socket; `None` after the last one.
    #[inline(always)]
    pub fn socket(self) -> Option<Socket> {
        let sk = read!(self.0, sk);
        (!sk.is_null()).then_some(Socket(sk))
    }

    /// Adds to what the reader of the iterator reads.
    #[inline(always)]
    pub fn say(self, what: &Unfinished) {
        let meta = read!(self.0, meta);
        let seq = read!(meta, seq);
        let from = core::ptr::from_ref(what).cast();
        // SAFETY: the file of this context, and so many bytes, none of them padding.
        let _ = unsafe { bpf_seq_write(seq, from, size_of::<Unfinished>() as u32) };
    }
}
