//! Where this kernel keeps the fields that the programs read.

use anyhow::{Context as _, Result, anyhow};
use btf::btf::{Btf, EnumEntry, Type};
use shunt_abi::KernelOffsets;

const KERNEL_BTF: &str = "/sys/kernel/btf/vmlinux";

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

/// The types of the running kernel. Reading them takes a while.
pub(super) struct KernelTypes(Btf);

impl KernelTypes {
    /// Reads them.
    ///
    /// # Errors
    ///
    /// When the kernel has no BTF.
    pub(super) fn read() -> Result<Self> {
        Btf::from_file(KERNEL_BTF).map(Self).map_err(|error| {
            anyhow!(
                "cannot read {KERNEL_BTF} ({error}); the kernel has to be built with \
                 CONFIG_DEBUG_INFO_BTF=y, as those of all distributions are since Linux 5.8"
            )
        })
    }

    /// The offset of a member in bytes, through unnamed structures and unions.
    /// A member of a member is written with a dot.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub(super) fn at(&self, structure: &str, path: &str) -> Result<u32> {
        self.offset(structure, path).with_context(|| {
            format!("this kernel's BTF has no {structure}.{path}; please report its version")
        })
    }

    /// The number that an enumeration gives a name.
    ///
    /// # Errors
    ///
    /// When it gives it none.
    pub(super) fn value(&self, enumeration: &str, name: &str) -> Result<u32> {
        self.named(enumeration, name).with_context(|| {
            format!("this kernel's BTF has no {name} of {enumeration}; please report its version")
        })
    }

    fn named(&self, enumeration: &str, name: &str) -> Option<u32> {
        let found = self.0.get_type_by_name(enumeration).ok()?;
        let (Type::Enum32(of) | Type::Enum64(of)) = &found.base_type else {
            return None;
        };
        let named = |entry: &&EnumEntry| entry.name.as_deref() == Some(name);
        u32::try_from(of.entries.iter().find(named)?.value).ok()
    }

    fn offset(&self, structure: &str, path: &str) -> Option<u32> {
        let mut within = self.0.get_type_by_name(structure).ok()?;
        let mut bits = 0;
        for member in path.split('.') {
            let (at, id) = self.member(&within.base_type, member)?;
            bits += at;
            within = self.0.get_type_by_id(id).ok()?;
        }
        Some(bits / 8)
    }

    /// Where a member is, in bits, and the number of its type.
    fn member(&self, ty: &Type, member: &str) -> Option<(u32, u32)> {
        let (Type::Struct(of) | Type::Union(of)) = ty else {
            return None;
        };
        of.members
            .iter()
            .find_map(|candidate| match &candidate.name {
                Some(name) if name == member => Some((candidate.offset, candidate.type_id)),
                Some(name) if !name.is_empty() => None,
                _ => {
                    let inner = self.0.get_type_by_id(candidate.type_id).ok()?;
                    let (bits, id) = self.member(&inner.base_type, member)?;
                    Some((candidate.offset + bits, id))
                }
            })
    }
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

    #[test]
    fn a_member_that_is_not_there_is_none() {
        let types = KernelTypes::read().expect("the tests need a kernel with BTF");
        assert_eq!(types.offset("sock", "no_such_member"), None);
        assert_eq!(types.offset("no_such_structure", "sk_socket"), None);
        assert_eq!(types.offset("sock", "sk_backlog.no_such_member"), None);
        assert!(types.offset("sock", "sk_backlog.tail") > types.offset("sock", "sk_backlog"));
        assert_eq!(types.named("sock_flags", "SOCK_DEAD"), Some(0));
        assert_eq!(types.named("sock_flags", "no_such_name"), None);
    }
}
