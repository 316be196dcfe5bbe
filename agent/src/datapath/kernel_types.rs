//! The types of the running kernel, as its BTF describes them.
//!
//! There are a hundred thousand of them, and a handful is asked for. So they are read where
//! they lie: one walk finds where each begins, and nothing else is taken out but what
//! somebody asks for. aya reads them too, and keeps to itself where members are. Of the
//! crates that tell, `btf` makes a flattened copy of each type, which took 0.3 s and 60 MB at
//! every start, and `btf-rs` is LGPL.

use std::fs;

use anyhow::{Context as _, Result, ensure};

const KERNEL_BTF: &str = "/sys/kernel/btf/vmlinux";

/// How BTF begins, in the byte order of its machine.
const MAGIC: u16 = 0xeb9f;

/// How long the description of a type is without what is peculiar to its kind: its name, its
/// kind, its size or another type.
const COMMON: usize = 12;

/// Kinds of types, `BTF_KIND_…`
mod kind {
    pub(super) const INT: u32 = 1;
    pub(super) const ARRAY: u32 = 3;
    pub(super) const STRUCT: u32 = 4;
    pub(super) const UNION: u32 = 5;
    pub(super) const ENUM: u32 = 6;
    pub(super) const TYPEDEF: u32 = 8;
    pub(super) const VOLATILE: u32 = 9;
    pub(super) const CONST: u32 = 10;
    pub(super) const RESTRICT: u32 = 11;
    pub(super) const FUNC_PROTO: u32 = 13;
    pub(super) const VAR: u32 = 14;
    pub(super) const DATASEC: u32 = 15;
    pub(super) const DECL_TAG: u32 = 17;
    pub(super) const TYPE_TAG: u32 = 18;
    pub(super) const ENUM64: u32 = 19;
    /// No kernel has one above it yet.
    pub(super) const LAST: u32 = ENUM64;
}

/// The bytes of one member of a structure or a union, and of one entry of an enumeration.
const MEMBER: usize = 12;
const ENTRY: usize = 8;
const ENTRY64: usize = 12;

/// More typedefs and qualifiers than anybody writes, and less than a circle of them.
const DEEPEST: u32 = 32;

/// The types of the running kernel.
pub(super) struct KernelTypes {
    bytes: Vec<u8>,
    /// Where in the bytes each type begins. The first has number 1; 0 is `void`.
    types: Vec<usize>,
    /// Where in the bytes the names are.
    names: usize,
}

/// One type.
#[derive(Clone, Copy)]
struct Type {
    at: usize,
    name: u32,
    info: u32,
    /// The number of the type that it stands for, or its size.
    refers: u32,
}

impl Type {
    const fn kind(self) -> u32 {
        (self.info >> 24) & 0x1f
    }

    /// How many members, entries or parameters it has.
    const fn count(self) -> usize {
        (self.info & 0xffff) as usize
    }

    /// Whether offsets of members have the width of a bit field in their upper byte.
    const fn has_bit_fields(self) -> bool {
        self.info >> 31 == 1
    }

    /// The bytes of its description.
    const fn len(self) -> usize {
        COMMON
            + match self.kind() {
                kind::INT | kind::VAR | kind::DECL_TAG => 4,
                kind::ARRAY => 12,
                kind::STRUCT | kind::UNION => self.count() * MEMBER,
                kind::ENUM => self.count() * ENTRY,
                kind::ENUM64 => self.count() * ENTRY64,
                kind::FUNC_PROTO => self.count() * 8,
                kind::DATASEC => self.count() * 12,
                _ => 0,
            }
    }

    /// Where its members, or its entries of `size` bytes, are.
    fn parts(self, size: usize) -> impl Iterator<Item = usize> {
        (0..self.count()).map(move |number| self.at + COMMON + number * size)
    }
}

impl KernelTypes {
    /// Reads them.
    ///
    /// # Errors
    ///
    /// When the kernel has no BTF, or one that nobody knows yet.
    pub(super) fn read() -> Result<Self> {
        let bytes = fs::read(KERNEL_BTF).with_context(|| {
            format!(
                "cannot read {KERNEL_BTF}; the kernel has to be built with \
                 CONFIG_DEBUG_INFO_BTF=y, as those of all distributions are since Linux 5.8"
            )
        })?;
        Self::of(bytes)
            .with_context(|| format!("{KERNEL_BTF} is not as expected; please report its version"))
    }

    fn of(bytes: Vec<u8>) -> Result<Self> {
        let magic = bytes.first_chunk().map(|magic| u16::from_ne_bytes(*magic));
        ensure!(magic == Some(MAGIC), "it is no BTF");
        let field = |at| word(&bytes, at).context("its header is cut off");
        // hdr_len, type_off, type_len, str_off
        let header = field(4)? as usize;
        let start = header + field(8)? as usize;
        let end = start + field(12)? as usize;
        let names = header + field(16)? as usize;
        let mut found = Self {
            bytes,
            types: Vec::new(),
            names,
        };
        let mut at = start;
        while at < end {
            let ty = found.described(at).context("a type is cut off")?;
            ensure!(
                (1..=kind::LAST).contains(&ty.kind()),
                "type {} is of the unknown kind {}",
                found.types.len() + 1,
                ty.kind()
            );
            found.types.push(at);
            at += ty.len();
        }
        ensure!(at == end, "the last type is cut off");
        Ok(found)
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

    fn offset(&self, structure: &str, path: &str) -> Option<u32> {
        let mut within = self.find(structure, &[kind::STRUCT])?;
        let mut bits = 0;
        for member in path.split('.') {
            let (at, id) = self.member(within, member)?;
            bits += at;
            within = self.meant(id)?;
        }
        Some(bits / 8)
    }

    fn named(&self, enumeration: &str, name: &str) -> Option<u32> {
        let ty = self.find(enumeration, &[kind::ENUM, kind::ENUM64])?;
        let size = if ty.kind() == kind::ENUM {
            ENTRY
        } else {
            ENTRY64
        };
        let entry = ty
            .parts(size)
            .find(|at| self.word(*at).is_some_and(|found| self.is(found, name)))?;
        // Of 64 bits the lower half comes first.
        self.word(entry + 4)
    }

    /// Where a member is, in bits, and the number of its type.
    fn member(&self, ty: Type, member: &str) -> Option<(u32, u32)> {
        if !matches!(ty.kind(), kind::STRUCT | kind::UNION) {
            return None;
        }
        ty.parts(MEMBER).find_map(|at| {
            let (name, id, offset) = (self.word(at)?, self.word(at + 4)?, self.word(at + 8)?);
            let bits = if ty.has_bit_fields() {
                offset & 0x00ff_ffff
            } else {
                offset
            };
            if self.is(name, member) {
                Some((bits, id))
            } else if self.is(name, "") {
                let (inner, id) = self.member(self.meant(id)?, member)?;
                Some((bits + inner, id))
            } else {
                None
            }
        })
    }

    /// The first type of this name that is of one of these kinds.
    fn find(&self, name: &str, kinds: &[u32]) -> Option<Type> {
        let mut types = self.types.iter().filter_map(|at| self.described(*at));
        types.find(|ty| kinds.contains(&ty.kind()) && self.is(ty.name, name))
    }

    /// The type with this number, or the one that it is another name or a qualified form of.
    fn meant(&self, id: u32) -> Option<Type> {
        let mut id = id;
        for _ in 0..DEEPEST {
            let place = usize::try_from(id).ok()?.checked_sub(1)?;
            let ty = self.described(*self.types.get(place)?)?;
            match ty.kind() {
                kind::TYPEDEF | kind::VOLATILE | kind::CONST | kind::RESTRICT | kind::TYPE_TAG => {
                    id = ty.refers;
                }
                _ => return Some(ty),
            }
        }
        None
    }

    /// The type that begins there.
    fn described(&self, at: usize) -> Option<Type> {
        Some(Type {
            at,
            name: self.word(at)?,
            info: self.word(at + 4)?,
            refers: self.word(at + 8)?,
        })
    }

    /// Whether the name with this number is that one.
    fn is(&self, number: u32, name: &str) -> bool {
        let named = self.bytes.get(self.names + number as usize..);
        let rest = named.and_then(|named| named.strip_prefix(name.as_bytes()));
        rest.is_some_and(|rest| rest.first() == Some(&0))
    }

    fn word(&self, at: usize) -> Option<u32> {
        word(&self.bytes, at)
    }
}

/// The four bytes there.
fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let found = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_ne_bytes(*found))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_kernel() -> KernelTypes {
        KernelTypes::read().expect("the tests need a kernel with BTF")
    }

    #[test]
    fn a_member_is_found_through_types_without_a_name() {
        let types = of_kernel();
        // struct sock_common begins with a union of a structure and a number.
        assert_eq!(types.offset("sock_common", "skc_addrpair"), Some(0));
        assert_eq!(types.offset("sock_common", "skc_rcv_saddr"), Some(4));
        assert!(types.offset("sock", "sk_backlog.tail") > types.offset("sock", "sk_backlog"));
        // atomic_t is a typedef of a structure.
        assert_eq!(
            types.offset("sock", "sk_backlog.rmem_alloc.counter"),
            types.offset("sock", "sk_backlog.rmem_alloc")
        );
        assert_eq!(types.named("sock_flags", "SOCK_DEAD"), Some(0));
        assert_eq!(types.named("sock_flags", "SOCK_DONE"), Some(1));
    }

    #[test]
    fn what_is_not_there_is_none() {
        let types = of_kernel();
        assert_eq!(types.offset("sock", "no_such_member"), None);
        assert_eq!(types.offset("no_such_structure", "sk_socket"), None);
        assert_eq!(types.offset("sock", "sk_backlog.no_such_member"), None);
        // A pointer is not followed.
        assert_eq!(types.offset("sock", "sk_socket.file"), None);
        assert_eq!(types.named("sock_flags", "no_such_name"), None);
        assert_eq!(types.named("sock", "SOCK_DEAD"), None);
    }

    #[test]
    fn bytes_that_are_no_btf_are_refused() {
        let whole = fs::read(KERNEL_BTF).expect("the tests need a kernel with BTF");
        assert!(KernelTypes::of(Vec::new()).is_err());
        assert!(KernelTypes::of(vec![0; 64]).is_err());
        for length in [2, 12, 24, 40, 100_001] {
            let cut = whole[..length].to_vec();
            assert!(KernelTypes::of(cut).is_err(), "{length} bytes");
        }
        let mut of_no_kind = whole;
        let header = word(&of_no_kind, 4).expect("a header") as usize;
        of_no_kind[header + 4..header + 8].copy_from_slice(&(31_u32 << 24).to_ne_bytes());
        assert!(KernelTypes::of(of_no_kind).is_err());
    }
}
