//! A word that several processors change at once.
//!
//! The compiler has atomic loads and stores for this target and nothing more
//! (`target_has_atomic_load_store`), so the two instructions that are needed are written out.
//! Both are fully ordered on every processor, as all of the kind that gives the value before
//! (`BPF_FETCH`, Linux 5.12; on arm64 5.18).

/// A word in a map. It is changed by what is here and by nothing else.
#[derive(Clone, Copy)]
pub struct Word(*mut u64);

impl Word {
    /// The word at this place.
    ///
    /// # Safety
    ///
    /// It is eight bytes of an element of a map, at a multiple of eight, and the element stays.
    #[inline(always)]
    pub const unsafe fn at(place: *mut u64) -> Self {
        Self(place)
    }
}

#[cfg(target_arch = "bpf")]
impl Word {
    /// What is there: an addition of nothing, because a mere load is not ordered.
    #[inline(always)]
    pub fn load(self) -> u64 {
        let mut value = 0;
        // SAFETY: by `at`.
        unsafe {
            core::arch::asm!(
                "{value} = atomic_fetch_add((u64 *)({place} + 0), {value})",
                place = in(reg) self.0,
                value = inout(reg) value,
            );
        }
        value
    }

    /// Puts `new` in the place of `old`, if that is what is there. Whether it was.
    #[inline(always)]
    pub fn replace(self, old: u64, new: u64) -> bool {
        let mut before = old;
        // SAFETY: by `at`.
        unsafe {
            core::arch::asm!(
                "r0 = cmpxchg_64({place} + 0, r0, {new})",
                place = in(reg) self.0,
                new = in(reg) new,
                inout("r0") before,
            );
        }
        before == old
    }
}

/// The same for the host, which checks and tests this crate.
#[cfg(not(target_arch = "bpf"))]
mod host {
    use core::sync::atomic::{AtomicU64, Ordering::SeqCst};

    use super::Word;

    #[expect(missing_docs, reason = "they are those of the programs")]
    impl Word {
        pub fn load(self) -> u64 {
            self.atomic().load(SeqCst)
        }

        pub fn replace(self, old: u64, new: u64) -> bool {
            let replaced = self.atomic().compare_exchange(old, new, SeqCst, SeqCst);
            replaced.is_ok()
        }

        fn atomic<'place>(self) -> &'place AtomicU64 {
            // SAFETY: by `at`.
            unsafe { AtomicU64::from_ptr(self.0) }
        }
    }
}
