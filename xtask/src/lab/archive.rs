//! The archive that a kernel unpacks as its first file system: cpio in the form `newc`, not
//! compressed, because an emulated processor takes longer to unpack it than to read it.
//!
//! Owners are root and times are zero: the same files make the same archive.

use std::{fs, io::Write, os::unix::fs::PermissionsExt as _, path::Path};

use anyhow::Context as _;

const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_777;
const END: &str = "TRAILER!!!";

/// Takes entries and writes them at once.
#[derive(Debug)]
pub(crate) struct Archive<W> {
    to: W,
    entries: u32,
}

impl<W: Write> Archive<W> {
    /// An empty one.
    pub(crate) fn new(to: W) -> Self {
        Self { to, entries: 0 }
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> anyhow::Result<()> {
        self.entries += 1;
        let size = u32::try_from(content.len()).with_context(|| format!("{name} is too long"))?;
        let named = u32::try_from(name.len() + 1)?;
        let links = 1;
        // inode, mode, owner, group, links, time, size, device twice, device of a node twice,
        // length of the name, sum.
        let fields = [
            self.entries,
            mode,
            0,
            0,
            links,
            0,
            size,
            0,
            0,
            0,
            0,
            named,
            0,
        ];
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08x}"));
        }
        header.push_str(name);
        let mut written = header.len() + 1;
        self.to.write_all(header.as_bytes())?;
        self.to.write_all(&[0])?;
        self.pad(&mut written)?;
        self.to.write_all(content)?;
        written += content.len();
        self.pad(&mut written)
    }

    /// Name and content each end at a multiple of four.
    fn pad(&mut self, written: &mut usize) -> anyhow::Result<()> {
        let missing = written.next_multiple_of(4) - *written;
        self.to.write_all(&[0; 4][..missing])?;
        *written += missing;
        Ok(())
    }

    /// A directory.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn directory(&mut self, name: &str) -> anyhow::Result<()> {
        self.entry(name, DIRECTORY, &[])
    }

    /// A file with what `content` is.
    ///
    /// # Errors
    /// As above.
    pub(crate) fn text(&mut self, name: &str, mode: u32, content: &[u8]) -> anyhow::Result<()> {
        self.entry(name, FILE | mode, content)
    }

    /// A copy of a file of this machine, with its mode.
    ///
    /// # Errors
    /// As above, and when it cannot be read.
    pub(crate) fn copy(&mut self, name: &str, from: &Path) -> anyhow::Result<()> {
        let reading = || format!("reading {}", from.display());
        let content = fs::read(from).with_context(reading)?;
        let mode = fs::metadata(from).with_context(reading)?.permissions();
        self.text(name, mode.mode() & 0o777, &content)
    }

    /// A link to a path.
    ///
    /// # Errors
    /// As above.
    pub(crate) fn link(&mut self, name: &str, to: &str) -> anyhow::Result<()> {
        self.entry(name, LINK, to.as_bytes())
    }

    /// Ends it.
    ///
    /// # Errors
    /// As above.
    pub(crate) fn finish(mut self) -> anyhow::Result<()> {
        self.entry(END, 0, &[])?;
        Ok(self.to.flush()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_padded_and_counted() {
        let mut bytes = Vec::new();
        let mut archive = Archive::new(&mut bytes);
        archive.directory("bin").unwrap();
        archive.text("init", 0o755, b"hello").unwrap();
        archive.link("sh", "init").unwrap();
        archive.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        assert_eq!(text.matches("070701").count(), 4);
        // Mode of a program, and the length of its content.
        assert!(text.contains("000081ed") && text.contains("00000005"));
        let at = text.find("hello").unwrap();
        assert_eq!(at % 4, 0);
        assert!(text.ends_with("TRAILER!!!\0\0\0\0"));
    }
}
