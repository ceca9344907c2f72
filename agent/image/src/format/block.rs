//! An index block: what 1024 pages are, and where their clusters are.
//!
//! Invariant of a decoded block, and of one that is encoded: rows are in order, their masks do not
//! overlap, together they are the pages of kind [`Kind::Data`], and each row's length and codec
//! fit.

use super::{BLOCK_GROUPS, BLOCK_PAGES, GROUP_BYTES, bytes::Bytes, header::HEADER};
use crate::{
    error::ImageError,
    names::{CLUSTER_PAGES, PAGE_SIZE},
};

/// Bytes of the kinds: two bits a page.
pub(crate) const KINDS: usize = BLOCK_PAGES as usize / 4;
const ROW: usize = 24;
/// A cluster for each page.
const MAX_ROWS: usize = BLOCK_PAGES as usize;
/// Bytes of a block at most.
pub(crate) const MAX_BLOCK: usize = KINDS + MAX_ROWS * ROW;

pub(crate) const RAW: u8 = 0;
pub(crate) const ZSTD: u8 = 1;

/// What a page is in one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Hole = 0,
    Zero = 1,
    Data = 2,
    Base = 3,
}

impl Kind {
    /// From the lowest two bits.
    pub(crate) fn of(bits: u32) -> Self {
        match bits & 3 {
            0 => Self::Hole,
            1 => Self::Zero,
            2 => Self::Data,
            _ => Self::Base,
        }
    }

    /// The same for all 16 pages of a group.
    pub(crate) fn sixteen(self) -> u32 {
        self as u32 * 0x5555_5555
    }
}

/// Which of a group's 16 pages are of that kind.
pub(crate) fn mask_of(kinds: u32, kind: Kind) -> u16 {
    let pages = (0..16).filter(|page| Kind::of(kinds >> (2 * page)) == kind);
    pages.fold(0, |mask, page| mask | 1 << page)
}

/// Where one cluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    /// In the file.
    pub(crate) offset: u64,
    pub(crate) sum: u64,
    /// Bytes in the file.
    pub(crate) length: u32,
    /// Pages of the group.
    pub(crate) mask: u16,
    /// Within the block.
    pub(crate) group: u8,
    pub(crate) codec: u8,
}

impl Row {
    /// Bytes of its pages.
    pub(crate) fn plain(&self) -> usize {
        self.mask.count_ones() as usize * PAGE_SIZE
    }
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Block {
    /// 16 pages each.
    pub(crate) kinds: [u32; BLOCK_GROUPS as usize],
    pub(crate) rows: Vec<Row>,
}

/// What a block's rows may say, by the rest of the file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// Where the clusters end.
    pub(crate) data_end: u64,
    /// Clusters may be zstd frames.
    pub(crate) zstd: bool,
    /// Pages may be as in the base.
    pub(crate) base: bool,
    /// Pages that the memory has here.
    pub(crate) pages: u64,
}

impl Block {
    /// Pages that are all of one kind.
    pub(crate) fn uniform(kind: Kind) -> Self {
        Self {
            kinds: [kind.sixteen(); BLOCK_GROUPS as usize],
            rows: Vec::new(),
        }
    }

    pub(crate) fn kind(&self, page: u64) -> Kind {
        let (group, bit) = place(page);
        Kind::of(self.kinds[group] >> bit)
    }

    pub(crate) fn set(&mut self, page: u64, kind: Kind) {
        let (group, bit) = place(page);
        self.kinds[group] = self.kinds[group] & !(3 << bit) | (kind as u32) << bit;
    }

    /// The row of a page that is [`Kind::Data`].
    pub(crate) fn row(&self, page: u64) -> Option<&Row> {
        let (group, bit) = place(page);
        let from = self
            .rows
            .partition_point(|row| usize::from(row.group) < group);
        self.rows[from..]
            .iter()
            .take_while(|row| usize::from(row.group) == group)
            .find(|row| row.mask >> (bit / 2) & 1 == 1)
    }

    /// As it stands in a file.
    pub(crate) fn encode(&self, into: &mut Vec<u8>) {
        into.extend(self.kinds.iter().flat_map(|kinds| kinds.to_le_bytes()));
        for row in &self.rows {
            into.extend(row.offset.to_le_bytes());
            into.extend(row.sum.to_le_bytes());
            into.extend(row.length.to_le_bytes());
            into.extend(row.mask.to_le_bytes());
            into.extend([row.group, row.codec]);
        }
    }

    /// Reads a block that stands at `at`.
    pub(crate) fn decode(bytes: &[u8], at: u64, bounds: Bounds) -> Result<Self, ImageError> {
        let mut left = Bytes::new(bytes, at);
        let mut block = Self::uniform(Kind::Hole);
        for kinds in &mut block.kinds {
            *kinds = left.u32()?;
        }
        let count = (bytes.len() - KINDS) / ROW;
        block.rows.reserve_exact(count.min(MAX_ROWS));
        while left.at() < at + bytes.len() as u64 {
            block.rows.push(Row {
                offset: left.u64()?,
                sum: left.u64()?,
                length: left.u32()?,
                mask: left.u16()?,
                group: left.u8()?,
                codec: left.u8()?,
            });
        }
        block
            .check(bounds)
            .map_err(|what| ImageError::corrupt(what, at))?;
        Ok(block)
    }

    /// What breaks the invariant.
    pub(crate) fn check(&self, bounds: Bounds) -> Result<(), &'static str> {
        let mut left = [0; BLOCK_GROUPS as usize];
        for (group, kinds) in self.kinds.iter().enumerate() {
            let beyond = bounds
                .pages
                .saturating_sub(group as u64 * CLUSTER_PAGES as u64);
            if beyond < CLUSTER_PAGES as u64 && kinds >> (2 * beyond) != 0 {
                return Err("a page beyond the memory's end");
            }
            if !bounds.base && mask_of(*kinds, Kind::Base) != 0 {
                return Err("a page as in the base, and no base");
            }
            left[group] = mask_of(*kinds, Kind::Data);
        }
        let mut last = None;
        for row in &self.rows {
            let key = (row.group, row.mask.trailing_zeros());
            let fits = last.is_none_or(|last| last < key);
            let of_group = left
                .get_mut(usize::from(row.group))
                .filter(|left| fits && row.mask != 0 && **left & row.mask == row.mask)
                .ok_or("the pages of a cluster")?;
            *of_group &= !row.mask;
            let length = row.length as usize;
            let right = match row.codec {
                RAW => length == row.plain(),
                ZSTD => bounds.zstd && 0 < length && length < row.plain(),
                _ => return Err("the codec of a cluster"),
            };
            if !right || length > GROUP_BYTES {
                return Err("the length of a cluster");
            }
            let end = row.offset.checked_add(row.length.into());
            if row.offset < HEADER as u64 || end.is_none_or(|end| end > bounds.data_end) {
                return Err("the place of a cluster");
            }
            last = Some(key);
        }
        if left.iter().any(|left| *left != 0) {
            return Err("a page whose cluster is missing");
        }
        Ok(())
    }
}

/// A page's group within its block, and its lowest bit in the group's kinds.
fn place(page: u64) -> (usize, u32) {
    let page = (page % BLOCK_PAGES) as usize;
    (page / CLUSTER_PAGES, (page % CLUSTER_PAGES) as u32 * 2)
}
