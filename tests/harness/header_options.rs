//! A program of `sock_ops` that is not the agent's, as others have: it takes room for an option
//! in the header of every segment that an accepted socket sends, and of every answer to a SYN.
//! (It leaves that empty, which the kernel fills with options that say nothing.)

use std::{os::fd::OwnedFd, path::Path};

use crate::assembled::{Counter, Hook, Program, instruction};

/// The program, attached until it is dropped.
#[derive(Debug)]
pub struct HeaderOptions {
    /// How often it was asked.
    asked: Counter,
    _link: OwnedFd,
}

impl HeaderOptions {
    /// Attaches the program to the cgroup at `path`.
    ///
    /// # Panics
    ///
    /// When the kernel refuses.
    pub fn attach(path: &Path) -> Self {
        let asked = Counter::new();
        let link = Program::load(Hook::SockOps, &program(&asked)).attach(path);
        Self { asked, _link: link }
    }

    /// How often it was asked for options until now.
    ///
    /// # Panics
    ///
    /// When that cannot be read.
    pub fn asked(&self) -> u64 {
        self.asked.read()
    }
}

/// What it does: on `BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB` and `BPF_SOCK_OPS_TCP_LISTEN_CB` it
/// asks for `BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG` beside what is asked for already, and on
/// `BPF_SOCK_OPS_HDR_OPT_LEN_CB` it counts, and reserves room.
fn program(asked: &Counter) -> [u64; 26] {
    [
        instruction(0xbf, 6, 1, 0, 0),   // r6 = the context
        instruction(0x61, 2, 6, 0, 0),   // r2 = its op
        instruction(0x15, 2, 0, 3, 5),   // to what an accepted socket gets
        instruction(0x15, 2, 0, 2, 11),  // and a listener
        instruction(0x15, 2, 0, 6, 14),  // to what is counted
        instruction(0x05, 0, 0, 18, 0),  // to the end
        instruction(0xbf, 1, 6, 0, 0),   // r1 = the context
        instruction(0x61, 2, 6, 84, 0),  // r2 = its bpf_sock_ops_cb_flags
        instruction(0x47, 2, 0, 0, 64),  // and one more
        instruction(0x85, 0, 0, 0, 59),  // bpf_sock_ops_cb_flags_set
        instruction(0x05, 0, 0, 13, 0),  // to the end
        instruction(0x62, 10, 0, -4, 0), // a key, on the stack
        instruction(0xbf, 2, 10, 0, 0),  // r2 = where it is
        instruction(0x07, 2, 0, 0, -4),
        instruction(0x18, 1, 1, 0, asked.number()), // r1 = the map
        instruction(0, 0, 0, 0, 0),
        instruction(0x85, 0, 0, 0, 1),   // bpf_map_lookup_elem
        instruction(0x15, 0, 0, 2, 0),   // without an element to what is reserved
        instruction(0xb7, 1, 0, 0, 1),   // r1 = 1
        instruction(0xdb, 0, 1, 0, 0),   // added to the element, atomically
        instruction(0xbf, 1, 6, 0, 0),   // r1 = the context
        instruction(0xb7, 2, 0, 0, 4),   // r2 = four bytes
        instruction(0xb7, 3, 0, 0, 0),   // r3 = no flags
        instruction(0x85, 0, 0, 0, 144), // bpf_reserve_hdr_opt
        instruction(0xb7, 0, 0, 0, 1),   // the end: r0 = 1
        instruction(0x95, 0, 0, 0, 0),
    ]
}
