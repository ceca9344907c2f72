//! What a reader is given.

use std::sync::Arc;

use bytes::Bytes;

use super::bitmap::DirtyBitmap;

/// Pages delivered to one reader.
#[derive(Debug)]
pub(crate) struct DirtyBatch {
    /// Number to acknowledge it with; grows by 1 at each harvest of the cursor, and is above those
    /// of every cursor before it.
    pub batch: u64,
    /// By number, the slots that have dirty pages or had some, and which. The cursor has its share
    /// of the bitmaps until the batch is acknowledged.
    pub slots: Vec<(u32, Arc<DirtyBitmap>)>,
    /// Dirty pages in all.
    pub pages: u64,
    /// Not all that is owed.
    pub more: bool,
}

/// What an API caller's harvest found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ApiHarvest {
    /// Number to acknowledge it with.
    pub batch: u64,
    /// Dirty guest frames as (first, length), ascending, adjacent ones joined.
    pub ranges: Vec<(u64, u64)>,
    /// Or pieces of bitmaps: first frame and bits, ascending.
    pub pieces: Vec<(u64, Bytes)>,
    /// Frames in all.
    pub pages: u64,
    /// This call made the cursor.
    pub created: bool,
    /// More is owed.
    pub more: bool,
}
