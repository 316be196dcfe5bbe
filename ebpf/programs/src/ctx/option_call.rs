//! `getsockopt()`, after the kernel has answered it.

use aya_ebpf::bindings::bpf_sockopt;

use super::FullSocket;

/// How much of a caller's buffer a program is given, in bytes.
const PAGE: i32 = 4096;

/// What a `cgroup/getsockopt` program sees: the call after the kernel answered.
#[derive(Clone, Copy)]
pub struct OptionCall(*mut bpf_sockopt);

impl OptionCall {
    /// From the program's context.
    #[inline(always)]
    pub const fn new(ctx: *mut bpf_sockopt) -> Self {
        Self(ctx)
    }

    /// The protocol level.
    #[inline(always)]
    pub fn level(self) -> i32 {
        read!(self.0, level)
    }

    /// The option.
    #[inline(always)]
    pub fn name(self) -> i32 {
        read!(self.0, optname)
    }

    /// The length of the caller's buffer, in bytes.
    #[inline(always)]
    pub fn length(self) -> i32 {
        read!(self.0, optlen)
    }

    /// The socket.
    #[inline(always)]
    pub fn socket(self) -> FullSocket {
        FullSocket(read!(self.0, __bindgen_anon_1.sk))
    }

    /// Leaves the kernel's answer as it is. Of a buffer of more than a page the
    /// program was given the first page only, which must not be copied back.
    #[inline(always)]
    pub fn leave_alone(self) {
        if self.length() > PAGE {
            write!(self.0, optlen, 0);
        }
    }

    /// Makes the call succeed, with an answer of `length` bytes.
    #[inline(always)]
    fn succeed(self, length: usize) {
        // The kernel's own answer leaves the caller's length as it is; of a
        // buffer of more than a page the program could not write the rest.
        if self.length() > PAGE {
            write!(self.0, optlen, length as i32);
        }
        write!(self.0, retval, 0);
    }

    /// Writes `value` to the start of the caller's buffer, and the call succeeds.
    /// `false` when the buffer is too small.
    #[inline(always)]
    pub fn answer<T: Copy>(self, value: T) -> bool {
        let start = read!(self.0, __bindgen_anon_2.optval).cast::<T>();
        let end = read!(self.0, __bindgen_anon_3.optval_end).cast::<T>();
        // SAFETY: the address is only compared; the verifier wants exactly this
        // comparison before it lets the program write.
        if unsafe { start.add(1) } > end {
            return false;
        }
        // SAFETY: start..start+1 lies within the buffer, as just checked.
        unsafe { start.write_unaligned(value) };
        self.succeed(size_of::<T>());
        true
    }
}
