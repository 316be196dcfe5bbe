//! Socket storage: a value that belongs to a socket and dies with it.

use core::{ffi::c_void, ptr};

use aya_ebpf::{
    bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_map_type::BPF_MAP_TYPE_SK_STORAGE},
    helpers::generated::{bpf_sk_storage_delete, bpf_sk_storage_get},
};

use crate::ctx::{HelperFailed, Socket};

/// A `BPF_MAP_TYPE_SK_STORAGE` map (Linux 5.2; in `sock_ops` 5.8, in
/// `sockopt` 5.9, in iterators 5.13).
///
/// aya's own type reaches the socket of a `sock_addr` context only, and cannot
/// be inherited by accepted sockets.
#[repr(C)]
pub struct SocketStorage<T, const FLAGS: usize> {
    // The names, the order and the pointed-to types are what the loader reads
    // from BTF; nothing is ever stored here.
    r#type: *const [i32; BPF_MAP_TYPE_SK_STORAGE as usize],
    key: *const i32,
    value: *const T,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; FLAGS],
}

// SAFETY: the fields are null pointers that nobody follows; the kernel guards
// what the map holds.
unsafe impl<T, const FLAGS: usize> Sync for SocketStorage<T, FLAGS> {}

impl<T, const FLAGS: usize> Default for SocketStorage<T, FLAGS> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T, const FLAGS: usize> SocketStorage<T, FLAGS> {
    /// The definition of a map.
    pub const fn new() -> Self {
        Self {
            r#type: ptr::null(),
            key: ptr::null(),
            value: ptr::null(),
            max_entries: ptr::null(),
            map_flags: ptr::null(),
        }
    }

    fn map(&self) -> *mut c_void {
        ptr::from_ref(self).cast_mut().cast()
    }

    /// The value of `socket`, if it has one.
    #[inline(always)]
    pub fn get(&self, socket: Socket) -> Option<&T> {
        // SAFETY: a Socket is what a context gave; the value lives as long as
        // the socket, which outlives the program's run.
        unsafe {
            bpf_sk_storage_get(self.map(), socket.as_ptr(), ptr::null_mut(), 0)
                .cast::<T>()
                .as_ref()
        }
    }

    /// The value of `socket`, if it has one, to change it. Programs on other
    /// processors may do so at the same time.
    #[inline(always)]
    #[expect(
        clippy::mut_from_ref,
        reason = "the value belongs to the kernel, not to this definition"
    )]
    pub fn get_mut(&self, socket: Socket) -> Option<&mut T> {
        // SAFETY: as for `get`. Every T here is made of integers, so that a torn
        // value is a wrong one and never an invalid one.
        unsafe {
            bpf_sk_storage_get(self.map(), socket.as_ptr(), ptr::null_mut(), 0)
                .cast::<T>()
                .as_mut()
        }
    }

    /// The value of `socket`; where it has none, one of zeros. `None` when there is no
    /// memory for it. Takes nothing of the stack, which a large value would fill.
    #[inline(always)]
    #[expect(
        clippy::mut_from_ref,
        reason = "the value belongs to the kernel, not to this definition"
    )]
    pub fn get_or_zeros(&self, socket: Socket) -> Option<&mut T> {
        // SAFETY: as for `get_mut`; the kernel's zeros are integers like others.
        unsafe { self.made_from(socket, ptr::null()).as_mut() }
    }

    /// Where the value of `socket` is, made from `first` when it has none, or of zeros
    /// where that is null.
    ///
    /// # Safety
    ///
    /// There is a value at `first`, or it is null.
    #[inline(always)]
    unsafe fn made_from(&self, socket: Socket, first: *const T) -> *mut T {
        let flags = u64::from(BPF_SK_STORAGE_GET_F_CREATE);
        let first = first.cast_mut().cast();
        // SAFETY: as for `get`; `first` is only read, and while the helper runs.
        unsafe { bpf_sk_storage_get(self.map(), socket.as_ptr(), first, flags).cast() }
    }

    /// Gives `socket` this value, in place of any other.
    ///
    /// Fails when there is no memory for it.
    #[inline(always)]
    pub fn set(&self, socket: Socket, value: &T) -> Result<(), HelperFailed>
    where
        T: Copy,
    {
        // SAFETY: as for `get_mut`; there is a value behind a reference.
        let place = unsafe { self.made_from(socket, value).as_mut() };
        // Written again where there was another one before.
        *place.ok_or(HelperFailed)? = *value;
        Ok(())
    }

    /// Takes the value of `socket` away, if it has one.
    #[inline(always)]
    pub fn remove(&self, socket: Socket) {
        // SAFETY: as above. An error says only that there was none.
        let _ = unsafe { bpf_sk_storage_delete(self.map(), socket.as_ptr()) };
    }
}
