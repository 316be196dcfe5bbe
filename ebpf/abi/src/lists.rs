use crate::Addr;

/// A list of ports of a pod.
#[repr(u16)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortList {
    /// `-b`, when it is a list.
    InboundInclude = 0,
    /// `-d`
    InboundExclude = 1,
    /// `-q`
    OutboundInclude = 2,
    /// `-o`
    OutboundExclude = 3,
}

/// A list of address ranges of a pod.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CidrList {
    /// `-i`, when it is a list.
    OutboundInclude = 0,
    /// `-x`
    OutboundExclude = 1,
    /// The nameservers of the pod's resolv.conf.
    Resolvers = 2,
}

/// How many ports one [`PortChunk`] covers.
pub const PORTS_PER_CHUNK: u16 = 4096;

/// Key of the map `PORTS`: which 4096 ports of which list of which pod.
#[repr(C)]
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub struct PortChunkKey {
    /// [`PodSettings::list_set`](crate::PodSettings::list_set)
    pub list_set: u32,
    /// A [`PortList`] code.
    pub list: u16,
    /// The port divided by [`PORTS_PER_CHUNK`].
    pub chunk: u16,
}

impl PortChunkKey {
    /// The chunk that holds `port` (host byte order).
    #[inline(always)]
    pub const fn of(list_set: u32, list: PortList, port: u16) -> Self {
        Self {
            list_set,
            list: list as u16,
            chunk: port / PORTS_PER_CHUNK,
        }
    }
}

/// Value of the map `PORTS`: one bit for each port of a chunk. A chunk without
/// ports is not stored, so a lookup costs the same for one port and for 65,535.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortChunk {
    /// The bits, port 0 of the chunk first.
    pub bits: [u64; PORTS_PER_CHUNK as usize / 64],
}

impl PortChunk {
    /// No port.
    pub const EMPTY: Self = Self {
        bits: [0; PORTS_PER_CHUNK as usize / 64],
    };

    /// Whether `port` (host byte order) is in this chunk.
    #[inline(always)]
    pub const fn contains(&self, port: u16) -> bool {
        // The mask keeps the index in bounds for the verifier, too.
        let word = (port as usize / 64) & (PORTS_PER_CHUNK as usize / 64 - 1);
        self.bits[word] >> (port % 64) & 1 == 1
    }

    /// Adds `port` (host byte order).
    pub const fn insert(&mut self, port: u16) {
        let word = (port as usize / 64) & (PORTS_PER_CHUNK as usize / 64 - 1);
        self.bits[word] |= 1 << (port % 64);
    }
}

/// How many bits of [`CidrKey`] stand before the address and always have to
/// match.
pub const LIST_KEY_BITS: u32 = 64;

/// Key of the trie `CIDRS`, without the prefix length that the trie puts before
/// it: [`LIST_KEY_BITS`] plus that of the range (IPv4 ranges count from 96).
#[repr(C)]
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub struct CidrKey {
    /// [`PodSettings::list_set`](crate::PodSettings::list_set)
    pub list_set: u32,
    /// A [`CidrList`] code.
    pub list: u32,
    /// The address, or the first of the range.
    pub addr: Addr,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_holds_exactly_what_was_inserted() {
        let mut chunk = PortChunk::EMPTY;
        let ports = [12288, 15006, 15020, 16383];
        for port in ports {
            chunk.insert(port);
        }
        for port in 12288..=16383 {
            assert_eq!(chunk.contains(port), ports.contains(&port), "{port}");
        }
    }

    #[test]
    fn a_port_belongs_to_the_chunk_of_its_4096() {
        assert_eq!(PortChunkKey::of(7, PortList::InboundExclude, 0).chunk, 0);
        assert_eq!(PortChunkKey::of(7, PortList::InboundExclude, 4095).chunk, 0);
        assert_eq!(
            PortChunkKey::of(7, PortList::InboundExclude, 65535).chunk,
            15
        );
    }
}
