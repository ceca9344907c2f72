//! The container of saved vCPU state: it crosses hosts, so everything has a length and every length
//! is checked.
//!
//! | bytes | what |
//! |---|---|
//! | 8 | magic `SLATVCPU` |
//! | 4 | version, 1 |
//! | 4 | architecture: 1 is x86-64, 2 is RISC-V |
//! | 4 | number of vCPUs |
//! | | for each vCPU its sections in the order of `arch`: 4 bytes tag, 4 bytes length, bytes |
//! | 4 | CRC-32 of everything before |
//!
//! Numbers are little-endian. A section that a host has nothing for is there with length 0. The CRC
//! finds accidents; what a liar sends is checked where it is used, by the decoder here and by the
//! kernel.

use super::super::BackendError;

const MAGIC: [u8; 8] = *b"SLATVCPU";
const VERSION: u32 = 1;
const HEADER: usize = 20;
const CRC: usize = 4;

/// A refusal.
pub(super) fn bad(message: impl Into<String>) -> BackendError {
    BackendError::State {
        message: message.into(),
    }
}

/// Writes state.
#[derive(Debug)]
pub(super) struct StateWriter {
    bytes: Vec<u8>,
}

impl StateWriter {
    pub(super) fn new(arch: u32, vcpus: u32) -> Self {
        let mut bytes = MAGIC.to_vec();
        for word in [VERSION, arch, vcpus] {
            bytes.extend(word.to_le_bytes());
        }
        Self { bytes }
    }

    /// Appends a section.
    #[allow(
        dead_code,
        reason = "an architecture whose vCPUs cannot be run has no sections"
    )]
    pub(super) fn section(&mut self, tag: [u8; 4], payload: &[u8]) {
        self.bytes.extend(tag);
        // Sections are kilobytes: register files and lists the kernel bounds.
        self.bytes.extend((payload.len() as u32).to_le_bytes());
        self.bytes.extend(payload);
    }

    /// The finished container.
    pub(super) fn finish(mut self) -> Vec<u8> {
        let crc = crc32fast::hash(&self.bytes);
        self.bytes.extend(crc.to_le_bytes());
        self.bytes
    }
}

/// Reads state.
#[derive(Debug)]
pub(super) struct StateReader<'a> {
    rest: &'a [u8],
}

fn word(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let (word, rest) = bytes.split_first_chunk()?;
    Some((u32::from_le_bytes(*word), rest))
}

impl<'a> StateReader<'a> {
    /// Checks the header and the CRC.
    ///
    /// # Errors
    /// `State` when it is cut, damaged, of another version or architecture, or not of `vcpus`
    /// vCPUs.
    pub(super) fn new(bytes: &'a [u8], arch: u32, vcpus: u32) -> Result<Self, BackendError> {
        if bytes.len() < HEADER + CRC {
            return Err(bad(format!("{} bytes are too few", bytes.len())));
        }
        let (body, crc) = bytes.split_at(bytes.len() - CRC);
        if body[..8] != MAGIC {
            return Err(bad("this is no vCPU state of the kvm backend"));
        }
        let field = |at: usize| word(&body[at..]).map_or(0, |(word, _)| word);
        if field(8) != VERSION {
            return Err(bad(format!(
                "version {}; this program reads {VERSION}",
                field(8)
            )));
        }
        if crc32fast::hash(body).to_le_bytes() != crc {
            return Err(bad("damaged: the CRC does not match"));
        }
        if field(12) != arch {
            return Err(bad(format!(
                "of architecture {}; this host's is {arch}",
                field(12)
            )));
        }
        if field(16) != vcpus {
            return Err(bad(format!("of {} vCPUs; this VM has {vcpus}", field(16))));
        }
        Ok(Self {
            rest: &body[HEADER..],
        })
    }

    /// The next section, which must have that tag.
    #[allow(
        dead_code,
        reason = "an architecture whose vCPUs cannot be run has no sections"
    )]
    pub(super) fn section(&mut self, tag: [u8; 4]) -> Result<&'a [u8], BackendError> {
        let name = tag.escape_ascii();
        let cut = || bad(format!("cut in section {name}"));
        let (found, rest) = self.rest.split_first_chunk::<4>().ok_or_else(cut)?;
        if *found != tag {
            return Err(bad(format!(
                "section {} where {name} belongs",
                found.escape_ascii()
            )));
        }
        let (len, rest) = word(rest).ok_or_else(cut)?;
        let (payload, rest) = rest.split_at_checked(len as usize).ok_or_else(cut)?;
        self.rest = rest;
        Ok(payload)
    }

    /// Nothing may be left.
    pub(super) fn finish(self) -> Result<(), BackendError> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(bad(format!("{} bytes too many", self.rest.len())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        let mut writer = StateWriter::new(1, 2);
        writer.section(*b"REGS", &[1, 2, 3]);
        writer.section(*b"NONE", &[]);
        writer.finish()
    }

    fn read(bytes: &[u8], vcpus: u32) -> Result<(Vec<u8>, Vec<u8>), BackendError> {
        let mut reader = StateReader::new(bytes, 1, vcpus)?;
        let sections = (
            reader.section(*b"REGS")?.to_vec(),
            reader.section(*b"NONE")?.to_vec(),
        );
        reader.finish()?;
        Ok(sections)
    }

    #[test]
    fn sections_come_back_and_any_damage_is_refused() {
        let bytes = sample();
        assert_eq!(read(&bytes, 2).unwrap(), (vec![1, 2, 3], Vec::new()));
        assert!(read(&bytes, 3).is_err());
        for cut in 0..bytes.len() {
            assert!(read(&bytes[..cut], 2).is_err(), "cut at {cut}");
        }
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(read(&damaged, 2).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_length_that_passes_the_end_is_refused_although_the_crc_is_right() {
        let mut bytes = sample();
        bytes.truncate(bytes.len() - CRC);
        bytes[HEADER + 4..HEADER + 8].copy_from_slice(&u32::MAX.to_le_bytes());
        let crc = crc32fast::hash(&bytes);
        bytes.extend(crc.to_le_bytes());
        let error = read(&bytes, 2).unwrap_err().to_string();
        assert!(error.contains("cut in section REGS"), "{error}");
    }
}
