use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An IPv6 address, or an IPv4 address in its IPv4-mapped form.
///
/// Four words in network byte order, as the kernel hands them to a program.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Hash, PartialEq, Eq)]
pub struct Addr {
    /// The words, each in network byte order, most significant first.
    pub words: [u32; 4],
}

/// The third word of every IPv4-mapped address.
const MAPPED: u32 = 0xffff_u32.to_be();

impl Addr {
    /// `::ffff:127.0.0.1`
    pub const LOOPBACK4: Self = Self::from_ipv4(Ipv4Addr::LOCALHOST);
    /// `::1`
    pub const LOOPBACK6: Self = Self::from_v6([0, 0, 0, 1_u32.to_be()]);
    /// The source from which the proxy calls its own application over IPv4
    /// (`127.0.0.6`, Istio's `InboundPassthroughBindIpv4`).
    pub const SIX4: Self = Self::from_ipv4(Ipv4Addr::new(127, 0, 0, 6));
    /// The same over IPv6 (`::6`, `InboundPassthroughBindIpv6`).
    pub const SIX6: Self = Self::from_v6([0, 0, 0, 6_u32.to_be()]);

    /// From an IPv4 address in network byte order, as in `user_ip4`.
    #[inline(always)]
    pub const fn from_v4(be: u32) -> Self {
        Self {
            words: [0, 0, MAPPED, be],
        }
    }

    /// From four words in network byte order, as in `user_ip6`.
    #[inline(always)]
    pub const fn from_v6(words: [u32; 4]) -> Self {
        Self { words }
    }

    /// From an IPv4 address.
    pub const fn from_ipv4(ip: Ipv4Addr) -> Self {
        Self::from_v4(u32::from_ne_bytes(ip.octets()))
    }

    /// From an address of either family.
    pub fn from_ip(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(v4) => Self::from_ipv4(v4),
            IpAddr::V6(v6) => {
                let o = v6.octets();
                let word = |i: usize| u32::from_ne_bytes([o[i], o[i + 1], o[i + 2], o[i + 3]]);
                Self::from_v6([word(0), word(4), word(8), word(12)])
            }
        }
    }

    /// The address as the standard library writes it; a mapped one as IPv4.
    pub fn to_ip(self) -> IpAddr {
        let mut octets = [0; 16];
        for (to, word) in octets.chunks_exact_mut(4).zip(self.words) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        Ipv6Addr::from(octets).to_canonical()
    }

    /// Whether this is an IPv4 address in mapped form.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        (self.words[0] | self.words[1] | (self.words[2] ^ MAPPED)) == 0
    }

    /// The IPv4 address in network byte order; meaningless when not
    /// [`is_v4`](Self::is_v4).
    #[inline(always)]
    pub const fn v4(&self) -> u32 {
        self.words[3]
    }

    /// Whether this is `0.0.0.0` or `::`.
    #[inline(always)]
    pub const fn is_unspecified(&self) -> bool {
        (self.words[0] | self.words[1] | self.words[3]) == 0
            && (self.words[2] == 0 || self.words[2] == MAPPED)
    }

    /// Whether this is in `127.0.0.0/8`, or `::1`.
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        if self.is_v4() {
            u32::from_be(self.words[3]) >> 24 == 127
        } else {
            self.same(&Self::LOOPBACK6)
        }
    }

    /// Equality without a branch. The derived `==` may become a call to `memcmp`,
    /// which the verifier walks byte by byte, and of every branch it follows
    /// both ways.
    #[inline(always)]
    pub const fn same(&self, other: &Self) -> bool {
        ((self.words[0] ^ other.words[0])
            | (self.words[1] ^ other.words[1])
            | (self.words[2] ^ other.words[2])
            | (self.words[3] ^ other.words[3]))
            == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv4_address_is_kept_mapped_and_comes_back() {
        let ip: IpAddr = [10, 1, 2, 3].into();
        let addr = Addr::from_ip(ip);
        assert!(addr.is_v4());
        assert_eq!(addr.v4().to_ne_bytes(), [10, 1, 2, 3]);
        assert_eq!(addr.to_ip(), ip);
        assert!(addr.same(&Addr::from_v4(u32::from_ne_bytes([10, 1, 2, 3]))));
    }

    #[test]
    fn an_ipv6_address_comes_back() {
        let ip: IpAddr = "2001:db8::7".parse().expect("a literal");
        assert_eq!(Addr::from_ip(ip).to_ip(), ip);
        assert!(!Addr::from_ip(ip).is_v4());
    }

    #[test]
    fn both_unspecified_addresses_are_known() {
        assert!(Addr::from_v4(0).is_unspecified());
        assert!(Addr::default().is_unspecified());
        assert!(!Addr::LOOPBACK6.is_unspecified());
        assert!(!Addr::SIX4.is_unspecified());
    }
}
