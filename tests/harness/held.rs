//! A socket whose lock somebody holds in the kernel.

use std::{
    num::NonZeroUsize,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
    ptr::NonNull,
};

use nix::{
    errno::Errno,
    libc,
    sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap},
};

use crate::blocked::Blocked;

/// How large a page is at most, in bytes.
const PAGE: NonZeroUsize = NonZeroUsize::new(64 * 1024).unwrap();

/// Has a call on a socket wait in the kernel with the socket's lock, until it is released.
///
/// It is setsockopt(SO_ATTACH_FILTER), which reads the filter with the lock (`sk_attach_filter`),
/// from memory that is not there before somebody provides it (userfaultfd(2)).
#[derive(Debug)]
pub struct Held {
    absent: Absent,
    call: Blocked<Errno>,
}

impl Held {
    /// Takes the lock.
    ///
    /// # Panics
    ///
    /// When that cannot be done.
    pub fn new(socket: &impl AsFd) -> Self {
        let absent = Absent::new();
        let socket = socket.as_fd().try_clone_to_owned().expect("it is open");
        let filter = absent.start.as_ptr().addr();
        let call = Blocked::in_call(libc::SYS_setsockopt, move || attach(&socket, filter));
        assert!(!call.has_ended(), "it did not wait: {}", call.answer());
        Self { absent, call }
    }

    /// Gives it back. The socket has no filter: one of zeros is none.
    ///
    /// # Panics
    ///
    /// When the call does not end.
    pub fn release(mut self) {
        self.absent.faults = None;
        assert_eq!(self.call.answer(), Errno::EINVAL);
    }
}

/// Attaches a filter of one instruction to a socket; the error.
fn attach(socket: &OwnedFd, filter: usize) -> Errno {
    let program = libc::sock_fprog {
        len: 1,
        filter: std::ptr::without_provenance_mut(filter),
    };
    // SAFETY: the kernel reads the program, and from where its filter is said to be: an address
    // that is not there is an error.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of_val(&program) as libc::socklen_t,
        )
    };
    Errno::result(done).expect_err("zeros are no filter")
}

/// Memory that whoever reads it waits for.
#[derive(Debug)]
struct Absent {
    start: NonNull<libc::c_void>,
    /// As long as it is open; then the memory is full of zeros.
    faults: Option<OwnedFd>,
}

/// `struct uffdio_api`
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`
#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

nix::ioctl_readwrite!(
    /// `UFFDIO_API`
    uffdio_api,
    0xaa,
    0x3f,
    Api
);
nix::ioctl_readwrite!(
    /// `UFFDIO_REGISTER`
    uffdio_register,
    0xaa,
    0x00,
    Register
);

impl Absent {
    fn new() -> Self {
        /// `UFFD_API`
        const API: u64 = 0xaa;
        /// `UFFDIO_REGISTER_MODE_MISSING`
        const MISSING: u64 = 1;
        // SAFETY: new memory, which nothing else of this process is in.
        let start =
            unsafe { mmap_anonymous(None, PAGE, ProtFlags::PROT_READ, MapFlags::MAP_PRIVATE) };
        let start = start.expect("there is memory");
        // SAFETY: a number, and an answer that is a new descriptor.
        let faults = unsafe {
            let descriptor = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC);
            let descriptor = Errno::result(descriptor).expect("the kernel has userfaultfd(2)");
            OwnedFd::from_raw_fd(descriptor as RawFd)
        };
        let mut api = Api {
            api: API,
            features: 0,
            ioctls: 0,
        };
        let mut register = Register {
            start: start.as_ptr().addr() as u64,
            len: PAGE.get() as u64,
            mode: MISSING,
            ioctls: 0,
        };
        // SAFETY: both structures are the kernel's, and the memory is the one from above.
        unsafe {
            uffdio_api(faults.as_raw_fd(), &raw mut api).expect("it is the kernel's version");
            uffdio_register(faults.as_raw_fd(), &raw mut register).expect("it is mapped memory");
        }
        Self {
            start,
            faults: Some(faults),
        }
    }
}

impl Drop for Absent {
    fn drop(&mut self) {
        // SAFETY: the memory that was mapped, to which nobody has a reference.
        let _ = unsafe { munmap(self.start, PAGE.get()) };
    }
}
