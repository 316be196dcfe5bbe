//! The hooks of a cgroup, and the programs that hang on them.

/// A program of the node, and where it hangs.
pub(super) struct Hook {
    /// The program.
    pub(super) program: &'static str,
    /// What the hook is called.
    pub(super) name: &'static str,
    /// The kernel's number of it (`enum bpf_attach_type`).
    pub(super) number: u32,
    /// Whether something begins here that others go on with: a connection, or what a
    /// socket is lent for bind(). What it notes, they find; of two programs on such a hook
    /// each would redirect what the other has redirected.
    pub(super) is_entry: bool,
}

/// Every one, in the order in which they are hung: what a socket is lent at bind() is
/// taken back at connect().
pub(super) const HOOKS: [Hook; 12] = [
    entry("shunt_connect4", "connect4", 10),
    entry("shunt_connect6", "connect6", 11),
    entry("shunt_sendmsg4", "sendmsg4", 14),
    entry("shunt_sendmsg6", "sendmsg6", 15),
    entry("shunt_bind4", "bind4", 8),
    entry("shunt_bind6", "bind6", 9),
    follower("shunt_recvmsg4", "recvmsg4", 19),
    follower("shunt_recvmsg6", "recvmsg6", 20),
    follower("shunt_peername4", "getpeername4", 29),
    follower("shunt_peername6", "getpeername6", 30),
    follower("shunt_getsockopt", "getsockopt", 21),
    follower("shunt_sock_ops", "sock_ops", 3),
];

const fn entry(program: &'static str, name: &'static str, number: u32) -> Hook {
    Hook {
        program,
        name,
        number,
        is_entry: true,
    }
}

const fn follower(program: &'static str, name: &'static str, number: u32) -> Hook {
    Hook {
        is_entry: false,
        ..entry(program, name, number)
    }
}
