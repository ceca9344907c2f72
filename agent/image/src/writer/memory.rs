//! What a writer knows of one memory's pages, until the index is written.
//!
//! # Locking
//! One lock for each index block. A page is *claimed* under it before its contents are stored,
//! without it, and its cluster's row is added under it afterwards. So nobody waits for another's
//! writing, and a page is stored once. Between the two the block breaks the format's invariant;
//! nobody reads it before the end, when all writes are over.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::{
    error::ImageError,
    format::{
        BLOCK_PAGES,
        block::{Block, Kind, Row},
        blocks_of,
    },
    names::{CLUSTER_PAGES, MemorySpec},
};

/// One memory.
#[derive(Debug)]
pub(super) struct Memory {
    pub(super) spec: MemorySpec,
    /// So many pages, the first ones, are in the base.
    base_pages: u64,
    /// `None`: nobody has said anything of a page.
    blocks: Vec<Mutex<Option<Box<Block>>>>,
}

impl Memory {
    pub(super) fn new(spec: MemorySpec, base_pages: u64) -> Self {
        let blocks = (0..blocks_of(spec.pages)).map(|_| Mutex::default());
        Self {
            spec,
            base_pages: base_pages.min(spec.pages),
            blocks: blocks.collect(),
        }
    }

    /// Whether it has pages `first` to `first + count`.
    pub(super) fn check(&self, first: u64, count: u64) -> Result<(), ImageError> {
        let pages = self.spec.pages;
        if first < pages && count <= pages - first || count == 0 {
            return Ok(());
        }
        Err(ImageError::NoSuchPage {
            memory: self.spec.number,
            page: first.max(pages),
        })
    }

    /// What a page is that nobody said anything of.
    fn unsaid(&self, page: u64) -> Kind {
        if page < self.base_pages {
            Kind::Base
        } else {
            Kind::Hole
        }
    }

    fn lock(&self, block: u64) -> MutexGuard<'_, Option<Box<Block>>> {
        // A panic of the caller's thread is the caller's; the end looks at the invariant.
        self.blocks[block as usize]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn twice(&self, page: u64) -> ImageError {
        ImageError::Twice {
            what: format!("page {page} of memory {}", self.spec.number),
        }
    }

    /// Claims pages of the group that begins with page `first`: those in `zero` for zeroes, those
    /// in `data` for contents. All or none.
    pub(super) fn claim(&self, first: u64, zero: u16, data: u16) -> Result<(), ImageError> {
        let pages = (0..CLUSTER_PAGES as u64).map(|at| (first + at, 1_u16 << at));
        let mut block = self.lock(first / BLOCK_PAGES);
        let block =
            block.get_or_insert_with(|| Box::new(untold(self.base_pages, first / BLOCK_PAGES)));
        for (page, bit) in pages.clone() {
            if (zero | data) & bit != 0 && block.kind(page) != self.unsaid(page) {
                return Err(self.twice(page));
            }
        }
        for (page, bit) in pages {
            if data & bit != 0 {
                block.set(page, Kind::Data);
            } else if zero & bit != 0 {
                block.set(page, Kind::Zero);
            }
        }
        Ok(())
    }

    /// Adds the row of pages that were claimed for contents.
    pub(super) fn stored(&self, first: u64, row: Row) {
        if let Some(block) = &mut *self.lock(first / BLOCK_PAGES) {
            block.rows.push(row);
        }
    }

    /// Says of the pages in one block, from `first` to before `end`, what they are. How many were
    /// not that before.
    pub(super) fn mark(&self, first: u64, end: u64, kind: Kind) -> Result<u64, ImageError> {
        let mut slot = self.lock(first / BLOCK_PAGES);
        let mut block = match &*slot {
            Some(block) => block.clone(),
            None => Box::new(untold(self.base_pages, first / BLOCK_PAGES)),
        };
        let mut said = 0;
        for page in first..end {
            let before = block.kind(page);
            if before == kind {
                continue;
            }
            if before != self.unsaid(page) {
                return Err(self.twice(page));
            }
            if kind == Kind::Base {
                return Err(ImageError::NoSuchPage {
                    memory: self.spec.number,
                    page,
                });
            }
            block.set(page, kind);
            said += 1;
        }
        *slot = Some(block);
        Ok(said)
    }

    /// The blocks as they are written: rows in order. `None` for one that has no page but of its
    /// kind.
    pub(super) fn into_blocks(self) -> impl Iterator<Item = (u64, Kind, Option<Block>)> {
        let pages = self.spec.pages;
        let base_pages = self.base_pages;
        let blocks = (0..).zip(self.blocks);
        blocks.map(move |(number, block)| {
            let first = number * BLOCK_PAGES;
            let here = (pages - first).min(BLOCK_PAGES);
            let block = block.into_inner().unwrap_or_else(PoisonError::into_inner);
            let covered = base_pages.saturating_sub(first).min(here);
            let mut block = match block {
                Some(block) => *block,
                // Most of a large memory: not looked at page by page.
                None if covered == 0 => return (here, Kind::Hole, None),
                None if covered == here => return (here, Kind::Base, None),
                None => untold(base_pages, number),
            };
            let kind = block.kind(first);
            let alike = (first..first + here).all(|page| block.kind(page) == kind);
            if alike && kind != Kind::Data {
                return (here, kind, None);
            }
            block
                .rows
                .sort_unstable_by_key(|row| (row.group, row.mask.trailing_zeros()));
            (here, kind, Some(block))
        })
    }
}

/// A block of which nobody said anything.
fn untold(base_pages: u64, block: u64) -> Block {
    let first = block * BLOCK_PAGES;
    let end = first + BLOCK_PAGES;
    if base_pages >= end {
        return Block::uniform(Kind::Base);
    }
    let mut untold = Block::uniform(Kind::Hole);
    (first..base_pages).for_each(|page| untold.set(page, Kind::Base));
    untold
}
