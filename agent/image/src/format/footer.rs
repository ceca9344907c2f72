//! The footer: a file that has a right one is whole.

use super::{
    bytes::Bytes,
    header::HEADER,
    sum::{Part, sum},
};
use crate::{error::ImageError, names::ImageId};

/// Its length.
pub(crate) const FOOTER: usize = 88;
const MAGIC: [u8; 8] = *b"SLATEND\n";
const SUM: usize = FOOTER - 8;

/// See the module. Places and lengths are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Footer {
    pub(crate) id: ImageId,
    /// Of the file.
    pub(crate) length: u64,
    /// Where the clusters end.
    pub(crate) data_end: u64,
    /// Where the table begins.
    pub(crate) table: u64,
    pub(crate) table_sum: u64,
    pub(crate) header_sum: u64,
    pub(crate) data_pages: u64,
    pub(crate) clusters: u64,
}

impl Footer {
    /// As it stands in a file.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(self.id.0);
        let numbers = [
            self.length,
            self.data_end,
            self.table,
            self.table_sum,
            self.header_sum,
            self.data_pages,
            self.clusters,
        ];
        bytes.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        let sum = sum(self.id, Part::Footer, &bytes);
        bytes.extend(sum.to_le_bytes());
        bytes
    }

    /// Reads the last bytes of a file of `length` bytes whose header says `id` and has that sum.
    pub(crate) fn decode(
        bytes: &[u8; FOOTER],
        length: u64,
        id: ImageId,
        header_sum: u64,
    ) -> Result<Self, ImageError> {
        let at = length - FOOTER as u64;
        let mut left = Bytes::new(bytes, at);
        // Also where a guest's memory, cut off, ends with another image's footer.
        if left.array()? != MAGIC || left.array()? != id.0 {
            return Err(ImageError::Truncated {
                expected: None,
                found: length,
            });
        }
        let said = Bytes::new(&bytes[SUM..], at + SUM as u64).u64()?;
        if sum(id, Part::Footer, &bytes[..SUM]) != said {
            return Err(ImageError::corrupt("the footer's checksum is wrong", at));
        }
        let footer = Self {
            id,
            length: left.u64()?,
            data_end: left.u64()?,
            table: left.u64()?,
            table_sum: left.u64()?,
            header_sum: left.u64()?,
            data_pages: left.u64()?,
            clusters: left.u64()?,
        };
        if footer.length != length {
            return Err(ImageError::Truncated {
                expected: Some(footer.length),
                found: length,
            });
        }
        if footer.header_sum != header_sum {
            return Err(ImageError::corrupt("the footer is of another header", at));
        }
        let ordered = HEADER as u64 <= footer.data_end
            && footer.data_end <= footer.table
            && footer.table <= at;
        if !ordered {
            return Err(ImageError::corrupt("the footer's places", at));
        }
        Ok(footer)
    }
}
