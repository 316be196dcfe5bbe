//! System calls as a program makes them that no crate makes for it.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::size_of,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
};

use nix::{
    errno::Errno,
    libc,
    sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg},
};
use socket2::{SockAddr, SockAddrStorage, Socket};

/// What getsockopt() did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OptionAnswer {
    /// Its result.
    pub result: Result<(), Errno>,
    /// The length that it left, in bytes.
    pub length: u32,
    /// The caller's whole buffer, which was full of [`UNTOUCHED`] before.
    pub buffer: Vec<u8>,
}

/// What a byte of a buffer is that nobody wrote to.
pub const UNTOUCHED: u8 = 0xa5;

/// Asks for an option with a buffer of `length` bytes.
///
/// # Panics
///
/// When `length` is more than a socklen_t.
pub fn option(socket: impl AsFd, level: i32, name: i32, length: usize) -> OptionAnswer {
    let mut buffer = vec![UNTOUCHED; length];
    let mut left = libc::socklen_t::try_from(length).expect("a length of a buffer");
    // SAFETY: the buffer has `left` bytes, and both outlive the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            name,
            buffer.as_mut_ptr().cast(),
            &raw mut left,
        )
    };
    OptionAnswer {
        result: Errno::result(result).map(drop),
        length: left,
        buffer,
    }
}

/// How many bytes that a TCP socket was given the other end has not acknowledged, and how many
/// of them were not sent yet (`SIOCOUTQ`, `SIOCOUTQNSD`).
///
/// # Panics
///
/// When it is no connected TCP socket.
pub fn send_queue(socket: impl AsFd) -> (i32, i32) {
    /// `SIOCOUTQNSD`, which libc does not name.
    const NOT_SENT: libc::Ioctl = 0x894B;
    let socket = socket.as_fd().as_raw_fd();
    let ask = |request| {
        let mut bytes = 0_i32;
        // SAFETY: the socket is open, and the kernel writes one int.
        let done = unsafe { libc::ioctl(socket, request, &raw mut bytes) };
        Errno::result(done).unwrap_or_else(|error| panic!("cannot see its send queue: {error}"));
        bytes
    };
    (ask(libc::TIOCOUTQ), ask(NOT_SENT))
}

/// bpf(), with the attributes of a command in words of eight bytes.
///
/// # Errors
///
/// What the kernel says.
///
/// # Safety
///
/// Where the attributes have addresses, there is what the command reads and writes.
pub(crate) unsafe fn bpf(command: i32, attributes: &[u64]) -> Result<RawFd, Errno> {
    let size = size_of_val(attributes);
    // SAFETY: the kernel reads so many bytes of the attributes; the rest is the caller's.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_ptr(), size) };
    let result = Errno::result(result)?;
    Ok(RawFd::try_from(result).expect("a descriptor, or 0"))
}

/// connect(AF_UNSPEC): ends the connection of a socket, which stays open.
///
/// # Errors
///
/// What the kernel says.
pub fn disconnect(socket: &Socket) -> io::Result<()> {
    let nothing = SockAddrStorage::zeroed();
    let length = u32::try_from(size_of::<libc::sockaddr>()).expect("it is small");
    // SAFETY: zeros are an address of the family AF_UNSPEC, which is 0 and has
    // no more fields; the storage is larger than a sockaddr.
    let unspecified = unsafe { SockAddr::new(nothing, length) };
    socket.connect(&unspecified)
}

/// Gives the calling thread, and no other of this process, these supplementary
/// groups.
///
/// # Panics
///
/// When the kernel refuses.
pub fn set_groups(groups: &[u32]) {
    // libc's function is for all threads of the process.
    // SAFETY: the kernel reads as many ids as the slice has.
    let done = unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) };
    Errno::result(done).unwrap_or_else(|error| panic!("cannot take on groups: {error}"));
}

/// Passes a descriptor on, through the Unix socket `to` (SCM_RIGHTS).
///
/// # Panics
///
/// When it cannot be sent.
pub fn pass(to: impl AsFd, descriptor: impl AsFd) {
    let descriptors = [descriptor.as_fd().as_raw_fd()];
    sendmsg::<()>(
        to.as_fd().as_raw_fd(),
        &[IoSlice::new(b".")],
        &[ControlMessage::ScmRights(&descriptors)],
        MsgFlags::empty(),
        None,
    )
    .expect("a Unix socket takes descriptors");
}

/// Takes the descriptor that [`pass`] has sent to the Unix socket `from`.
///
/// # Panics
///
/// When something else comes.
pub fn receive(from: impl AsFd) -> OwnedFd {
    let mut byte = [0];
    let mut bytes = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!(RawFd);
    let message = recvmsg::<()>(
        from.as_fd().as_raw_fd(),
        &mut bytes,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )
    .expect("a message comes");
    let received = message.cmsgs().expect("there was space").next();
    let Some(ControlMessageOwned::ScmRights(descriptors)) = received else {
        panic!("no descriptor came: {received:?}");
    };
    // SAFETY: the kernel has just made it for this process.
    unsafe { OwnedFd::from_raw_fd(descriptors[0]) }
}
