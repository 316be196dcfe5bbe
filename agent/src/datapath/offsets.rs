//! Where this kernel keeps the fields that the programs read.

use anyhow::{Context as _, Result, anyhow};
use btf::btf::{Btf, Type};
use shunt_abi::KernelOffsets;

const KERNEL_BTF: &str = "/sys/kernel/btf/vmlinux";

/// Reads the offsets from the running kernel's BTF.
///
/// # Errors
///
/// When the kernel has no BTF, or lacks one of the fields.
pub(super) fn of_running_kernel() -> Result<KernelOffsets> {
    let btf = Btf::from_file(KERNEL_BTF).map_err(|error| {
        anyhow!(
            "cannot read {KERNEL_BTF} ({error}); the kernel has to be built with \
             CONFIG_DEBUG_INFO_BTF=y, as those of all distributions are since Linux 5.8"
        )
    })?;
    let at = |structure: &str, member: &str| {
        offset(&btf, structure, member).with_context(|| {
            format!("this kernel's BTF has no {structure}.{member}; please report its version")
        })
    };
    Ok(KernelOffsets {
        sock_socket: at("sock", "sk_socket")?,
        socket_file: at("socket", "file")?,
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

/// The offset of a member in bytes, through unnamed structures and unions.
fn offset(btf: &Btf, structure: &str, member: &str) -> Option<u32> {
    let found = btf.get_type_by_name(structure).ok()?;
    bits_within(btf, &found.base_type, member).map(|bits| bits / 8)
}

fn bits_within(btf: &Btf, ty: &Type, member: &str) -> Option<u32> {
    let (Type::Struct(of) | Type::Union(of)) = ty else {
        return None;
    };
    of.members
        .iter()
        .find_map(|candidate| match &candidate.name {
            Some(name) if name == member => Some(candidate.offset),
            Some(name) if !name.is_empty() => None,
            _ => {
                let inner = btf.get_type_by_id(candidate.type_id).ok()?;
                let bits = bits_within(btf, &inner.base_type, member)?;
                Some(candidate.offset + bits)
            }
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_is_found_in_this_kernel() {
        let offsets = of_running_kernel().expect("the tests need a kernel with BTF");
        // struct sock starts with its sock_common, which starts with addresses.
        assert!(offsets.sock_socket > offsets.common_saddr6);
        assert_eq!(offsets.cred_fsgid, offsets.cred_fsuid + 4);
        assert_ne!(offsets.net_cookie, 0);
    }

    #[test]
    fn a_member_that_is_not_there_is_none() {
        let btf = Btf::from_file(KERNEL_BTF).expect("the tests need a kernel with BTF");
        assert_eq!(offset(&btf, "sock", "no_such_member"), None);
        assert_eq!(offset(&btf, "no_such_structure", "sk_socket"), None);
    }
}
