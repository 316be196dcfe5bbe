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

    /// Gives `socket` this value, in place of any other.
    ///
    /// Fails when there is no memory for it.
    #[inline(always)]
    pub fn set(&self, socket: Socket, mut value: T) -> Result<(), HelperFailed>
    where
        T: Copy,
    {
        let flags = u64::from(BPF_SK_STORAGE_GET_F_CREATE);
        // SAFETY: as above; `value` is read only while the helper runs.
        let kept = unsafe {
            bpf_sk_storage_get(
                self.map(),
                socket.as_ptr(),
                ptr::from_mut(&mut value).cast(),
                flags,
            )
        }
        .cast::<T>();
        if kept.is_null() {
            return Err(HelperFailed);
        }
        // SAFETY: not null, so a value of this map; created with `value`, or an
        // older one that is replaced here.
        unsafe { ptr::write(kept, value) };
        Ok(())
    }

    /// Takes the value of `socket` away, if it has one.
    #[inline(always)]
    pub fn remove(&self, socket: Socket) {
        // SAFETY: as above. An error says only that there was none.
        let _ = unsafe { bpf_sk_storage_delete(self.map(), socket.as_ptr()) };
    }
}
