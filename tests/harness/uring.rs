//! Sockets by io_uring: neither socket() nor connect() is called.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use io_uring::{IoUring, opcode, squeue::Entry, types::Fd};
use nix::{errno::Errno, libc, sys::socket::MsgFlags};
use socket2::{SockAddr, Socket};

/// Opens a TCP socket for IPv4 (IORING_OP_SOCKET, Linux 5.19).
///
/// # Errors
///
/// What the kernel says; EPERM where `kernel.io_uring_disabled` is set.
pub fn open() -> io::Result<Socket> {
    let descriptor = submit(opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build())?;
    // SAFETY: the kernel has just made it for this process.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) }.into())
}

/// Connects a socket (IORING_OP_CONNECT, Linux 5.5).
///
/// # Errors
///
/// What the kernel says.
pub fn connect(socket: &Socket, to: SocketAddr) -> io::Result<()> {
    let to = SockAddr::from(to);
    let descriptor = Fd(socket.as_raw_fd());
    submit(opcode::Connect::new(descriptor, to.as_ptr().cast(), to.len()).build()).map(drop)
}

/// Reads at most `length` bytes from a socket (IORING_OP_RECV, Linux 5.6).
///
/// # Errors
///
/// What the kernel says.
pub fn recv(socket: &Socket, length: u32, flags: MsgFlags) -> Result<Vec<u8>, Errno> {
    let mut bytes = vec![0; length as usize];
    let descriptor = Fd(socket.as_raw_fd());
    let read = submit(
        opcode::Recv::new(descriptor, bytes.as_mut_ptr(), length)
            .flags(flags.bits())
            .build(),
    );
    let read = usize::try_from(read.map_err(errno)?).expect("a length");
    bytes.truncate(read);
    Ok(bytes)
}

/// Sends bytes through a socket (IORING_OP_SEND, Linux 5.6); how many.
///
/// # Errors
///
/// What the kernel says.
///
/// # Panics
///
/// When there are more than four billion bytes.
pub fn send(socket: &Socket, bytes: &[u8]) -> Result<usize, Errno> {
    let length = u32::try_from(bytes.len()).expect("fewer bytes");
    let descriptor = Fd(socket.as_raw_fd());
    let sent = submit(opcode::Send::new(descriptor, bytes.as_ptr(), length).build());
    Ok(usize::try_from(sent.map_err(errno)?).expect("a length"))
}

fn errno(error: io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(0))
}

/// Has the kernel do one thing, and waits for it.
fn submit(entry: Entry) -> io::Result<i32> {
    let mut ring = IoUring::new(1)?;
    // SAFETY: what the entry points to is alive until this function returns,
    // which waits for the completion.
    unsafe { ring.submission().push(&entry) }.expect("a new queue has room");
    ring.submit_and_wait(1)?;
    let done = ring.completion().next().expect("it was waited for");
    match done.result() {
        result if result < 0 => Err(io::Error::from_raw_os_error(-result)),
        result => Ok(result),
    }
}
