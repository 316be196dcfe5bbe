//! Programs that do nothing, on the hooks that a connect() passes: what hanging there costs by
//! itself, whatever a program does.

use std::{os::fd::OwnedFd, path::Path};

use crate::assembled::{Hook, Program, instruction};

/// Both of them: of connect() to an IPv4 address, and of `sock_ops`.
#[derive(Debug)]
pub struct EmptyPrograms([Program; 2]);

/// Attached until it is dropped.
#[derive(Debug)]
pub struct Hanging {
    _links: [OwnedFd; 2],
}

impl EmptyPrograms {
    /// Loads them.
    ///
    /// # Panics
    ///
    /// Without root, and when the kernel refuses.
    #[expect(clippy::new_without_default, reason = "it loads programs")]
    pub fn new() -> Self {
        crate::require_root();
        let proceed = [
            instruction(0xb7, 0, 0, 0, 1), // r0 = 1
            instruction(0x95, 0, 0, 0, 0), // the end
        ];
        Self([Hook::Connect4, Hook::SockOps].map(|hook| Program::load(hook, &proceed)))
    }

    /// Attaches them to the cgroup at `path`, and takes them away at once unless they are to
    /// `stay`. For it is the kernel's own code that is changed: what is measured with them and
    /// without comes after that alike.
    ///
    /// # Panics
    ///
    /// When the kernel refuses.
    pub fn attach(&self, path: &Path, stay: bool) -> Option<Hanging> {
        let Self(programs) = self;
        let hanging = Hanging {
            _links: programs.each_ref().map(|program| program.attach(path)),
        };
        stay.then_some(hanging)
    }
}
