//! A message on its way.

use aya_ebpf::{
    bindings::{BPF_F_INGRESS, bpf_sock, sk_action::SK_PASS, sk_msg_md},
    btf_maps::SockHash,
    helpers::generated::{bpf_get_netns_cookie, bpf_msg_redirect_hash},
};
use shunt_abi::NetnsCookie;

use super::{HelperFailed, Socket};

/// What a `sk_msg` program sees: a message that a socket sends.
#[derive(Clone, Copy)]
pub struct Outgoing(*mut sk_msg_md);

impl Outgoing {
    /// From the program's context.
    #[inline(always)]
    pub const fn new(ctx: *mut sk_msg_md) -> Self {
        Self(ctx)
    }

    /// The socket (Linux 5.8).
    #[inline(always)]
    pub fn socket(self) -> Socket {
        let sk: *mut bpf_sock = read!(self.0, __bindgen_anon_3.sk);
        Socket(sk.cast())
    }

    /// How many bytes there are.
    #[inline(always)]
    pub fn size(self) -> u32 {
        read!(self.0, size)
    }

    /// The network namespace of the socket (Linux 5.15).
    #[inline(always)]
    pub fn netns(self) -> NetnsCookie {
        // SAFETY: the context of this very run.
        unsafe { bpf_get_netns_cookie(self.0.cast()) }
    }

    /// Gives it to the socket that `map` has under `key`, for its reader.
    ///
    /// Fails when there is no such socket.
    #[inline(always)]
    pub fn give<K, const N: usize>(
        self,
        map: &'static SockHash<K, N>,
        key: &mut K,
    ) -> Result<(), HelperFailed> {
        let map = core::ptr::from_ref(map).cast_mut().cast();
        let key = core::ptr::from_mut(key).cast();
        // SAFETY: the context of this run, a socket map and a key of it.
        let done = unsafe { bpf_msg_redirect_hash(self.0, map, key, u64::from(BPF_F_INGRESS)) };
        if done == i64::from(SK_PASS) {
            Ok(())
        } else {
            Err(HelperFailed)
        }
    }
}
