//! The header of a frame: 48 bytes, each field checked before a payload is read.

use super::{HEADER, Kind, MAGIC, MAX_RUNS, PAGE, RUN, WireError};

/// A frame's header, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) kind: Kind,
    pub(crate) length: u32,
    pub(crate) slot: u32,
    pub(crate) count: u32,
    pub(crate) sequence: u32,
    pub(crate) epoch: u64,
}

impl Header {
    pub(crate) fn encode(&self, protocol: u32) -> [u8; HEADER] {
        let mut bytes = [0_u8; HEADER];
        bytes[0..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&(protocol as u16).to_le_bytes());
        bytes[6..8].copy_from_slice(&(self.kind as u16).to_le_bytes());
        bytes[8..12].copy_from_slice(&self.length.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.slot.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.count.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.epoch.to_le_bytes());
        let sum = crc32fast::hash(&bytes[..44]);
        bytes[44..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: &[u8; HEADER], protocol: u32) -> Result<Self, WireError> {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        if bytes[0..4] != MAGIC {
            return Err(WireError::corrupt("magic", "not a Slat stream"));
        }
        let found = u32::from(u16_at(4));
        if found != protocol {
            return Err(WireError::Version {
                found,
                agreed: protocol,
            });
        }
        if u32_at(44) != crc32fast::hash(&bytes[..44]) {
            return Err(WireError::corrupt("crc", "header checksum differs"));
        }
        let number = u16_at(6);
        let kind = Kind::ALL
            .into_iter()
            .find(|kind| *kind as u16 == number)
            .ok_or_else(|| WireError::corrupt("kind", number))?;
        let header = Self {
            kind,
            length: u32_at(8),
            slot: u32_at(12),
            count: u32_at(16),
            sequence: u32_at(20),
            epoch: u64::from(u32_at(24)) | u64::from(u32_at(28)) << 32,
        };
        if header.length > kind.max_length() {
            return Err(WireError::corrupt(
                "length",
                format!(
                    "{} for {kind:?}, at most {}",
                    header.length,
                    kind.max_length()
                ),
            ));
        }
        if matches!(kind, Kind::Pages | Kind::Zero) {
            let runs = header.count.min(MAX_RUNS + 1) * RUN as u32;
            let fits = (1..=MAX_RUNS).contains(&header.count)
                && match kind {
                    Kind::Zero => header.length == runs,
                    _ => header.length > runs && (header.length - runs).is_multiple_of(PAGE as u32),
                };
            if !fits {
                return Err(WireError::corrupt(
                    "length",
                    format!("{} with {} runs", header.length, header.count),
                ));
            }
        }
        Ok(header)
    }
}
