//! Bytes that tell where in a stream they belong: one that is lost, doubled or
//! in another's place is noticed.

/// The bytes of one stream.
#[derive(Clone, Copy, Debug)]
pub struct Pattern {
    seed: u64,
}

impl Pattern {
    /// Another stream for each seed.
    pub const fn new(seed: u64) -> Self {
        Self { seed }
    }

    /// Fills `bytes` with those of the stream from `offset` on.
    pub fn fill(self, offset: u64, bytes: &mut [u8]) {
        let mut at = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            let word = self.word(at / 8).to_le_bytes();
            let skip = usize::try_from(at % 8).expect("below 8");
            let length = rest.len().min(8 - skip);
            let (now, later) = rest.split_at_mut(length);
            now.copy_from_slice(&word[skip..skip + length]);
            at += u64::try_from(length).expect("below 8");
            rest = later;
        }
    }

    /// The bytes of the stream from `offset` on.
    pub fn bytes(self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.fill(offset, &mut bytes);
        bytes
    }

    /// Compares `bytes` with those of the stream from `offset` on.
    ///
    /// # Errors
    ///
    /// Which byte is the first that differs.
    pub fn check(self, offset: u64, bytes: &[u8]) -> Result<(), String> {
        let expected = self.bytes(offset, bytes.len());
        if bytes == expected {
            return Ok(());
        }
        let differs = |(index, (seen, expected)): (usize, (&u8, &u8))| {
            (seen != expected).then(|| {
                let length = bytes.len();
                format!(
                    "byte {} is {seen:#04x} in place of {expected:#04x}, \
                     {index} bytes into a read of {length}",
                    offset + index as u64
                )
            })
        };
        let first = bytes.iter().zip(&expected).enumerate().find_map(differs);
        Err(first.expect("they differ"))
    }

    /// SplitMix64's finaliser, of the number of a word.
    fn word(self, number: u64) -> u64 {
        mix(self.seed ^ mix(number))
    }
}

/// A number that depends on every bit of another.
pub fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_make_a_whole() {
        let pattern = Pattern::new(7);
        let whole = pattern.bytes(0, 100);
        for cut in [1, 7, 8, 9, 50, 99] {
            let parts = [pattern.bytes(0, cut), pattern.bytes(cut as u64, 100 - cut)];
            assert_eq!(parts.concat(), whole);
        }
    }

    #[test]
    fn what_is_lost_or_doubled_is_noticed() {
        let pattern = Pattern::new(7);
        let whole = pattern.bytes(0, 1000);
        assert_eq!(pattern.check(0, &whole), Ok(()));
        assert!(pattern.check(8, &whole).is_err());
        let lost = [&whole[..500], &whole[508..]].concat();
        let complaint = pattern.check(0, &lost).expect_err("bytes are missing");
        assert!(complaint.starts_with("byte 500 is"), "{complaint}");
        assert!(Pattern::new(8).check(0, &whole).is_err());
    }
}
