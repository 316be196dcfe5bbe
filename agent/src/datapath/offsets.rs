//! Where this kernel keeps the fields that the programs read.

use anyhow::Result;
use shunt_abi::KernelOffsets;

use super::kernel_types::KernelTypes;

/// The offsets in the running kernel.
///
/// # Errors
///
/// When it lacks one of the fields.
pub(super) fn of_kernel(types: &KernelTypes) -> Result<KernelOffsets> {
    let at = |structure: &str, member: &str| types.at(structure, member);
    Ok(KernelOffsets {
        sock_socket: at("sock", "sk_socket")?,
        socket_file: at("socket", "file")?,
        socket_sock: at("socket", "sk")?,
        file_cred: at("file", "f_cred")?,
        cred_fsuid: at("cred", "fsuid")?,
        cred_fsgid: at("cred", "fsgid")?,
        common_family: at("sock_common", "skc_family")?,
        common_state: at("sock_common", "skc_state")?,
        common_num: at("sock_common", "skc_num")?,
        common_net: at("sock_common", "skc_net")?,
        common_saddr4: at("sock_common", "skc_rcv_saddr")?,
        common_saddr6: at("sock_common", "skc_v6_rcv_saddr")?,
        net_cookie: at("net", "net_cookie")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_is_found_in_this_kernel() {
        let types = KernelTypes::read().expect("the tests need a kernel with BTF");
        let offsets = of_kernel(&types).expect("every field is there");
        // struct sock starts with its sock_common, which starts with addresses.
        assert!(offsets.sock_socket > offsets.common_saddr6);
        assert_eq!(offsets.cred_fsgid, offsets.cred_fsuid + 4);
        assert_ne!(offsets.net_cookie, 0);
    }
}
