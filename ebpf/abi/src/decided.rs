use crate::{Addr, NetnsCookie};

/// A decision, as the programs log it: value of the map `DECIDED`, and in its
/// bytes the message that they send to the agent.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Decided {
    /// The network namespace.
    pub netns: NetnsCookie,
    /// Where it comes from.
    pub source: Addr,
    /// Where it asks to go.
    pub destination: Addr,
    /// Host byte order; 0 where the socket has no port yet.
    pub source_port: u16,
    /// Host byte order.
    pub destination_port: u16,
    /// Who opened the socket; [`NO_OWNER`](crate::NO_OWNER) of a packet.
    pub uid: u32,
    /// Likewise.
    pub gid: u32,
    /// The code of the rule.
    pub rule: u32,
}

impl Decided {
    /// How many bytes it has.
    pub const BYTES: usize = size_of::<Self>();

    /// The bytes as one side has written them; the other runs on the same machine.
    pub const fn from_bytes(bytes: [u8; Self::BYTES]) -> Self {
        // SAFETY: integers without padding (`user.rs` checks the size): any bytes
        // are a value.
        unsafe { core::mem::transmute(bytes) }
    }

    /// Its bytes.
    pub const fn as_bytes(&self) -> &[u8; Self::BYTES] {
        // SAFETY: as above; the lifetime is that of the borrow.
        unsafe { &*core::ptr::from_ref(self).cast() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_comes_through_as_bytes() {
        let decided = Decided {
            netns: 7,
            source: Addr::LOOPBACK4,
            destination: Addr::SIX6,
            source_port: 1,
            destination_port: 2,
            uid: 3,
            gid: 4,
            rule: 5,
        };
        assert_eq!(Decided::from_bytes(*decided.as_bytes()), decided);
    }
}
