/// Where the running kernel keeps what the programs read of it, in bytes from
/// the start of each structure; the agent takes them from the kernel's BTF when
/// it loads the programs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KernelOffsets {
    /// `struct sock`: `sk_socket`
    pub sock_socket: u32,
    /// `struct socket`: `file`
    pub socket_file: u32,
    /// `struct socket`: `sk`
    pub socket_sock: u32,
    /// `struct file`: `f_cred`
    pub file_cred: u32,
    /// `struct cred`: `fsuid`
    pub cred_fsuid: u32,
    /// `struct cred`: `fsgid`
    pub cred_fsgid: u32,
    /// `struct sock_common`: `skc_family`
    pub common_family: u32,
    /// `struct sock_common`: `skc_state`
    pub common_state: u32,
    /// `struct sock_common`: `skc_num` (the local port, host byte order)
    pub common_num: u32,
    /// `struct sock_common`: `skc_net`
    pub common_net: u32,
    /// `struct sock_common`: `skc_rcv_saddr`
    pub common_saddr4: u32,
    /// `struct sock_common`: `skc_v6_rcv_saddr`
    pub common_saddr6: u32,
    /// `struct net`: `net_cookie`
    pub net_cookie: u32,
}
