//! The port.

use std::ops::Range;

use super::contents::Contents;
use crate::error::Trouble;

/// Contents of memories, which never change. Several threads read at once.
pub trait Source: Send + Sync {
    /// Reads pages of the memory that has this number in the source: each page of `pages` and no
    /// other is in `into` afterwards.
    ///
    /// # Errors
    /// Of kind `SourceGone`, `SourceTruncated` or `SourceCorrupt`. What is in `into` means nothing
    /// then.
    fn read(&self, memory: u32, pages: Range<u64>, into: &mut Contents) -> Result<(), Trouble>;

    /// The pages that are best read with this one, itself among them.
    fn together(&self, memory: u32, page: u64) -> Range<u64> {
        let _ = memory;
        page..page + 1
    }

    /// Pages that are best read before all others, in this order: a guest is likely to touch them.
    fn first(&self) -> Vec<(u32, Range<u64>)> {
        Vec::new()
    }

    /// Pages that were read are where they are needed, and will not be asked for again.
    fn taken(&self, memory: u32, pages: Range<u64>) {
        let _ = (memory, pages);
    }
}
