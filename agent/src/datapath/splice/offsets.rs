//! Where this kernel keeps what splicing looks at.

use anyhow::Result;
use shunt_abi::SpliceOffsets;

use crate::datapath::kernel_types::KernelTypes;

/// The offsets in the running kernel.
///
/// # Errors
///
/// When it lacks one of the fields.
pub(in crate::datapath) fn of_kernel(types: &KernelTypes) -> Result<SpliceOffsets> {
    let at = |structure: &str, path: &str| types.at(structure, path);
    Ok(SpliceOffsets {
        sock_socket: at("sock", "sk_socket")?,
        socket_file: at("socket", "file")?,
        socket_sock: at("socket", "sk")?,
        file_flags: at("file", "f_flags")?,
        common_cookie: at("sock_common", "skc_cookie")?,
        sock_queued: at("sock", "sk_backlog.rmem_alloc")?,
        sock_buffer: at("sock", "sk_rcvbuf")?,
        sock_flags: at("sock_common", "skc_flags")?,
        sock_user_data: at("sock", "sk_user_data")?,
        icsk_ulp: at("inet_connection_sock", "icsk_ulp_ops")?,
        tcp_copied: at("tcp_sock", "copied_seq")?,
        tcp_written: at("tcp_sock", "write_seq")?,
        tcp_acked: at("tcp_sock", "snd_una")?,
        tcp_offered: at("tcp_sock", "snd_wnd")?,
        tcp_window: at("tcp_sock", "rcv_wnd")?,
        tcp_clamp: at("tcp_sock", "window_clamp")?,
        psock_queue: at("sk_psock", "ingress_msg")?,
        psock_users: at("sk_psock", "refcnt")?,
        zerocopy_bit: types.value("sock_flags", "SOCK_ZEROCOPY")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_is_found_in_this_kernel() {
        let types = KernelTypes::read().expect("the tests need a kernel with BTF");
        let offsets = of_kernel(&types).expect("every field is there");
        // Each structure starts with the one before it.
        assert!(offsets.common_cookie < offsets.sock_buffer);
        assert!(offsets.sock_buffer < offsets.icsk_ulp);
        assert!(offsets.icsk_ulp < offsets.tcp_copied);
        assert!(offsets.zerocopy_bit < 64);
    }
}
