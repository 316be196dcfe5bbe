//! Archives in the format that the kernel unpacks at its start: cpio, "newc".
//!
//! Every entry is a header of hexadecimal numbers, its name and its content, the
//! last two padded to four bytes.

use std::{
    fs::File,
    io::{self, BufWriter, Write},
    path::Path,
};

use anyhow::{Context as _, Result};

/// Types of entries, as in a file's mode.
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// The entry that ends an archive.
const END: &str = "TRAILER!!!";

/// An archive that is being written. Names have no slash at their start; a
/// directory has to come before what is in it.
pub(crate) struct Archive<W: Write> {
    out: W,
    entries: u32,
}

impl Archive<BufWriter<File>> {
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("writing {}", path.display()))?;
        Ok(Self::new(BufWriter::new(file)))
    }
}

impl<W: Write> Archive<W> {
    pub(crate) const fn new(out: W) -> Self {
        Self { out, entries: 0 }
    }

    pub(crate) fn directory(&mut self, name: &str, mode: u32) -> io::Result<()> {
        self.entry(name, DIRECTORY | mode, (0, 0), &[])
    }

    pub(crate) fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.entry(name, REGULAR | mode, (0, 0), content)
    }

    pub(crate) fn symlink(&mut self, name: &str, target: &str) -> io::Result<()> {
        self.entry(name, SYMLINK | 0o777, (0, 0), target.as_bytes())
    }

    pub(crate) fn character_device(&mut self, name: &str, device: (u32, u32)) -> io::Result<()> {
        self.entry(name, CHARACTER_DEVICE | 0o600, device, &[])
    }

    /// Writes the end, and gives back what was written to.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.entry(END, 0, (0, 0), &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(
        &mut self,
        name: &str,
        mode: u32,
        (major, minor): (u32, u32),
        content: &[u8],
    ) -> io::Result<()> {
        let too_long = |_| io::Error::other(format!("{name} is too large for an archive"));
        let size = u32::try_from(content.len()).map_err(too_long)?;
        // With the zero at its end.
        let name_size = u32::try_from(name.len() + 1).map_err(too_long)?;
        self.entries += 1;
        let (owner, group, links, time, no_device, checksum) = (0, 0, 1, 0, 0, 0);
        write!(self.out, "070701")?;
        for field in [
            self.entries,
            mode,
            owner,
            group,
            links,
            time,
            size,
            no_device,
            no_device,
            major,
            minor,
            name_size,
            checksum,
        ] {
            write!(self.out, "{field:08x}")?;
        }
        self.out.write_all(name.as_bytes())?;
        self.out.write_all(&[0])?;
        // 110 bytes of header.
        self.pad(110 + name.len() + 1)?;
        self.out.write_all(content)?;
        self.pad(content.len())
    }

    /// Fills up to the next multiple of four after `length` bytes.
    fn pad(&mut self, length: usize) -> io::Result<()> {
        self.out
            .write_all(&[0; 3][..length.next_multiple_of(4) - length])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_is_what_the_format_says() {
        let mut archive = Archive::new(Vec::new());
        archive.file("a", 0o644, b"hello").expect("memory");
        let bytes = archive.finish().expect("memory");
        let text = String::from_utf8(bytes).expect("it is all text");
        let expected = concat!(
            "070701",
            "00000001",
            "000081a4",
            "00000000",
            "00000000",
            "00000001",
            "00000000",
            "00000005",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000002",
            "00000000",
            "a\0",
            "hello\0\0\0",
            "070701",
            "00000002",
        );
        assert_eq!(&text[..expected.len()], expected);
        assert!(text.contains("0000000b00000000TRAILER!!!\0"), "{text}");
        assert_eq!(text.len() % 4, 0);
    }
}
