//! What no context field says, read from the kernel's own structures.
//!
//! There are two ways. An [`Address`] is a number, read by `bpf_probe_read_kernel`:
//! a wrong one gives an error or a wrong value, never a crash. A [`Structure`] is a
//! pointer whose type the verifier knows, read without a helper. The offsets come
//! from the BTF of the running kernel.

use core::{ffi::c_void, ptr::read_volatile};

use aya_ebpf::{
    Global,
    helpers::{
        bpf_probe_read_kernel,
        generated::{self, bpf_ktime_get_coarse_ns, bpf_ktime_get_ns, bpf_skc_to_tcp_sock},
    },
};
use shunt_abi::{Addr, Endpoint, KernelOffsets, NetnsCookie};

use crate::ctx::{AF_INET, AF_INET6, Socket};

/// Where the running kernel keeps what is read here. Set by the agent when it
/// loads the programs.
#[unsafe(no_mangle)]
static OFFSETS: Global<KernelOffsets> = Global::new(KernelOffsets {
    sock_socket: 0,
    socket_file: 0,
    socket_sock: 0,
    file_cred: 0,
    cred_fsuid: 0,
    cred_fsgid: 0,
    common_family: 0,
    common_state: 0,
    common_num: 0,
    common_net: 0,
    common_saddr4: 0,
    common_saddr6: 0,
    net_cookie: 0,
});

/// Where the running kernel keeps what is read here.
#[inline(always)]
pub fn offsets() -> KernelOffsets {
    OFFSETS.load()
}

/// The address of a kernel structure, as a number.
#[derive(Clone, Copy)]
pub struct Address(u64);

impl Address {
    /// The address of a socket. The verifier allows no arithmetic on a pointer
    /// to a socket; what a helper has copied is a number to it.
    #[inline(always)]
    pub fn of(socket: Socket) -> Option<Self> {
        let pointer: *mut c_void = socket.as_ptr();
        // SAFETY: reads the eight bytes of the variable above.
        let number = unsafe { bpf_probe_read_kernel(core::ptr::from_ref(&pointer).cast::<u64>()) };
        number.ok().map(Self)
    }

    /// One that was kept as a number; `None` for 0.
    #[inline(always)]
    pub fn kept(number: u64) -> Option<Self> {
        (number != 0).then_some(Self(number))
    }

    /// The number, to be kept.
    #[inline(always)]
    pub const fn number(self) -> u64 {
        self.0
    }

    /// The value of a field.
    #[inline(always)]
    pub fn field<T: Copy>(self, offset: u32) -> Option<T> {
        let from = (self.0 + u64::from(offset)) as *const T;
        // SAFETY: the helper checks the address; any bits are a T, which is an
        // integer or an array of them here.
        unsafe { bpf_probe_read_kernel(from) }.ok()
    }

    /// Where a field that is a pointer points to.
    #[inline(always)]
    pub fn follow(self, offset: u32) -> Option<Self> {
        match self.field::<u64>(offset) {
            Some(address) if address != 0 => Some(Self(address)),
            _ => None,
        }
    }
}

/// A structure of the kernel's whose type the verifier knows. Its fields are
/// loaded without a helper; the offsets are the running kernel's, and constants to
/// the verifier, which checks them. Where a structure is gone meanwhile, 0 is
/// loaded.
#[derive(Clone, Copy)]
pub struct Structure(*const u8);

impl Structure {
    /// The `struct tcp_sock` of a socket; `None` when it is no TCP socket (Linux 5.9).
    #[inline(always)]
    pub fn tcp_sock(socket: Socket) -> Option<Self> {
        // SAFETY: a Socket is what a context or an iterator gave.
        let tcp = unsafe { bpf_skc_to_tcp_sock(socket.as_ptr()) };
        (!tcp.is_null()).then_some(Self(tcp.cast()))
    }

    /// A field of four bytes.
    #[inline(always)]
    pub fn word(self, offset: u32) -> u32 {
        // SAFETY: the verifier checks the offset and the width, and the kernel
        // takes care of a page that is not there.
        unsafe { read_volatile(self.0.add(offset as usize).cast()) }
    }

    /// A field of eight bytes.
    #[inline(always)]
    pub fn long(self, offset: u32) -> u64 {
        // SAFETY: as above.
        unsafe { read_volatile(self.0.add(offset as usize).cast()) }
    }

    /// What a field that is a pointer points to.
    #[inline(always)]
    pub fn follow(self, offset: u32) -> Option<Self> {
        // SAFETY: as above.
        let pointer: *const u8 = unsafe { read_volatile(self.0.add(offset as usize).cast()) };
        (!pointer.is_null()).then_some(Self(pointer))
    }
}

/// Nanoseconds since the node started, to the tick. Not for iterators.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: reads the clock.
    unsafe { bpf_ktime_get_coarse_ns() }
}

/// Milliseconds since the node started, the lower 32 bits; for every program.
#[inline(always)]
pub fn now_ms() -> u32 {
    // SAFETY: reads the clock.
    let nanoseconds = unsafe { bpf_ktime_get_ns() };
    (nanoseconds / 1_000_000) as u32
}

/// Has the verifier forget what it knows of a variable, which stays as it is. It follows
/// every combination of what was found out along the way through all that comes after;
/// what a helper has written starts anew.
///
/// The variable is copied onto itself, and has no second place on the stack. The compiler
/// cannot see through a helper either: so the variable lies in memory from here on, in
/// place of a register, or eight bytes of stack, for each word of it.
#[inline(always)]
pub fn forget<T: Copy>(value: &mut T) {
    let at: *mut c_void = core::ptr::from_mut(value).cast();
    // SAFETY: reads and writes the variable, with the very same bytes. Of a program's own
    // stack, which is always there, it cannot fail.
    let _ = unsafe { generated::bpf_probe_read_kernel(at, size_of::<T>() as u32, at) };
}

/// The uid and gid that `iptables -m owner` compares: the file system ids of
/// whoever called socket(), `sk->sk_socket->file->f_cred` (xt_owner's
/// `owner_mt`). They stay with the socket for its life, so this holds for
/// sockets that are older than their namespace's enrolment, too.
#[inline(always)]
pub fn owner(socket: Socket) -> Option<(u32, u32)> {
    // Without a helper for each step where that can be: this is for every connect().
    match Structure::tcp_sock(socket) {
        Some(tcp) => opener(tcp),
        None => opener(Address::of(socket)?),
    }
}

/// The file system ids of whoever opened the file of a `struct sock`.
#[inline(always)]
fn opener(sock: impl Steps) -> Option<(u32, u32)> {
    let at = offsets();
    let cred = sock
        .to(at.sock_socket)?
        .to(at.socket_file)?
        .to(at.file_cred)?;
    Some((cred.id(at.cred_fsuid)?, cred.id(at.cred_fsgid)?))
}

/// From structure to structure, in either way.
trait Steps: Sized {
    /// What a field that is a pointer points to.
    fn to(self, offset: u32) -> Option<Self>;
    /// A field of four bytes. Of memory that is not there, which a file in use always has, a
    /// [`Structure`] says 0.
    fn id(&self, offset: u32) -> Option<u32>;
}

impl Steps for Address {
    #[inline(always)]
    fn to(self, offset: u32) -> Option<Self> {
        self.follow(offset)
    }

    #[inline(always)]
    fn id(&self, offset: u32) -> Option<u32> {
        self.field(offset)
    }
}

impl Steps for Structure {
    #[inline(always)]
    fn to(self, offset: u32) -> Option<Self> {
        self.follow(offset)
    }

    #[inline(always)]
    fn id(&self, offset: u32) -> Option<u32> {
        Some(self.word(offset))
    }
}

/// `TCP_LISTEN`
const TCP_LISTEN: u8 = 10;

/// What an iterator wants to know of a listener.
pub struct Listening {
    /// The family.
    pub family: u32,
    /// Its address and port.
    pub local: Endpoint,
    /// The network namespace.
    pub netns: NetnsCookie,
}

/// The identity of a socket that an iterator visits; `None` unless it is one of TCP over IP
/// that listens.
#[inline(always)]
pub fn listening(socket: Socket) -> Option<Listening> {
    Structure::tcp_sock(socket)?;
    let at = offsets();
    let common = Address::of(socket)?;
    // Most that are open do not listen.
    if common.field::<u8>(at.common_state)? != TCP_LISTEN {
        return None;
    }
    let family = u32::from(common.field::<u16>(at.common_family)?);
    let addr = match family {
        AF_INET => Addr::from_v4(common.field(at.common_saddr4)?),
        AF_INET6 => Addr::from_v6(common.field(at.common_saddr6)?),
        _ => return None,
    };
    Some(Listening {
        family,
        local: Endpoint::new(addr, common.field(at.common_num)?),
        netns: common.follow(at.common_net)?.field(at.net_cookie)?,
    })
}
