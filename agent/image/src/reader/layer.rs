//! One file of a chain: its parts as they were opened, and its index as it is looked up.
//!
//! # Memory
//! Of an opened file stays 24 bytes for each 4 MiB of its memories: 384 KiB for 64 GiB. Besides,
//! at most 128 index blocks are kept: 224 KiB of whole clusters, 3.1 MiB at worst, where each page
//! is a cluster of its own. Each has a lock, which is held for a look or an exchange.

use std::sync::{Arc, Mutex, PoisonError};

use crate::{
    codec::ClusterBuffer,
    error::ImageError,
    format::{
        BLOCK_PAGES,
        block::{Block, Bounds, Kind, Row, mask_of},
        footer::{FOOTER, Footer},
        header::{HEADER, Header},
        sum::{Part, sum},
        table::{MAX_TABLE, MemoryEntry, Table},
    },
    names::{CLUSTER_PAGES, ImageName, Section, Summary},
    storage::{self, Storage},
};

const KEPT: usize = 128;

/// A block that was read, by its number in the table.
type Kept = Mutex<Option<(usize, Arc<Block>)>>;

/// One file.
#[derive(Debug)]
pub(super) struct Layer<S> {
    storage: S,
    pub(super) header: Header,
    pub(super) footer: Footer,
    pub(super) table: Table,
    kept: Vec<Kept>,
}

/// What one group of pages is in a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Group {
    /// 16 times two bits.
    pub(super) kinds: u32,
    /// The cluster of the page that was asked for, if it has one here.
    pub(super) row: Option<Row>,
}

impl Group {
    /// What the page is.
    pub(super) fn kind(&self, page: u64) -> Kind {
        Kind::of(self.kinds >> (page % CLUSTER_PAGES as u64 * 2))
    }

    /// Pages that are as in the base.
    pub(super) fn of_base(&self) -> u16 {
        mask_of(self.kinds, Kind::Base)
    }
}

/// Reads bytes that the file's length says are there.
fn read(storage: &impl Storage, offset: u64, into: &mut [u8]) -> Result<(), ImageError> {
    storage::read_exact(storage, offset, into).map_err(|source| match source.kind() {
        // It became shorter since.
        std::io::ErrorKind::UnexpectedEof => ImageError::Truncated {
            expected: Some(offset + into.len() as u64),
            found: storage.len().unwrap_or(0),
        },
        _ => ImageError::Io {
            doing: "reading an image",
            source,
        },
    })
}

impl<S: Storage> Layer<S> {
    /// Reads header, footer and table.
    pub(super) fn open(storage: S) -> Result<Self, ImageError> {
        let length = storage
            .len()
            .map_err(ImageError::io("asking for the length"))?;
        let mut header = [0; HEADER];
        let there = length.min(HEADER as u64) as usize;
        read(&storage, 0, &mut header[..there])?;
        let short = Err(ImageError::Truncated {
            expected: None,
            found: length,
        });
        if there < HEADER {
            // Of the beginning of one, or of something else.
            return if Header::may_begin_with(&header[..there]) {
                short
            } else {
                Err(ImageError::NotAnImage)
            };
        }
        let (header, header_sum) = Header::decode(&header)?;
        if length < (HEADER + FOOTER) as u64 {
            return short;
        }
        let mut footer = [0; FOOTER];
        read(&storage, length - FOOTER as u64, &mut footer)?;
        let footer = Footer::decode(&footer, length, header.id, header_sum)?;
        let table_bytes = length - FOOTER as u64 - footer.table;
        if table_bytes > MAX_TABLE {
            return Err(ImageError::corrupt("the table's length", footer.table));
        }
        let mut table = vec![0; table_bytes as usize];
        read(&storage, footer.table, &mut table)?;
        if sum(header.id, Part::Table, &table) != footer.table_sum {
            let what = "the table's checksum is wrong";
            return Err(ImageError::corrupt(what, footer.table));
        }
        let has_base = header.base.is_some();
        let table = Table::decode(&table, footer.table, footer.data_end, has_base)?;
        Ok(Self {
            storage,
            header,
            footer,
            kept: (0..table.blocks.len().min(KEPT))
                .map(|_| Mutex::default())
                .collect(),
            table,
        })
    }

    pub(super) fn name(&self) -> ImageName {
        ImageName {
            id: self.header.id,
            index_sum: self.footer.table_sum,
        }
    }

    pub(super) fn summary(&self) -> Summary {
        self.table
            .summary(&self.footer, self.header.base, self.header.version)
    }

    pub(super) fn memory(&self, number: u32) -> Option<&MemoryEntry> {
        let memories = &self.table.memories;
        let at = memories.binary_search_by_key(&number, |memory| memory.spec.number);
        memories.get(at.ok()?)
    }

    /// The memory of a block, and the block's first page.
    pub(super) fn place_of(&self, block: usize) -> Option<(&MemoryEntry, u64)> {
        // Memories without pages have no blocks, and share their place with the one after them.
        let memories = &self.table.memories;
        let after = memories.partition_point(|memory| memory.first_block <= block);
        let memory = memories.get(after.checked_sub(1)?)?;
        let first = (block - memory.first_block) as u64 * BLOCK_PAGES;
        (first < memory.spec.pages).then_some((memory, first))
    }

    /// The block of that number in the table, if it has bytes.
    pub(super) fn block(&self, number: usize) -> Result<Option<Arc<Block>>, ImageError> {
        let missing = || ImageError::corrupt("a block that is not there", self.footer.table);
        let entry = self.table.blocks.get(number).ok_or_else(missing)?;
        if entry.length == 0 {
            return Ok(None);
        }
        let (memory, first) = self.place_of(number).ok_or_else(missing)?;
        // Clusters of threads that each wrote a part of a memory stand between each other's: their
        // blocks, a power of two apart, are not to push each other out.
        let place = number ^ (number / KEPT) ^ (number / KEPT / KEPT);
        let kept = self.kept.get(place % self.kept.len()).ok_or_else(missing)?;
        let lock = || kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, block)) = &*lock()
            && *of == number
        {
            return Ok(Some(Arc::clone(block)));
        }
        // Bounded when the table was read.
        let mut bytes = vec![0; entry.length as usize];
        read(&self.storage, entry.offset, &mut bytes)?;
        let place = Part::Block {
            memory: memory.spec.number,
            block: first / BLOCK_PAGES,
        };
        if sum(self.header.id, place, &bytes) != entry.sum {
            let what = "an index block's checksum is wrong";
            return Err(ImageError::corrupt(what, entry.offset));
        }
        let bounds = Bounds {
            data_end: self.footer.data_end,
            zstd: self.header.zstd,
            base: self.header.base.is_some(),
            pages: memory.spec.pages - first,
        };
        let block = Arc::new(Block::decode(&bytes, entry.offset, bounds)?);
        *lock() = Some((number, Arc::clone(&block)));
        Ok(Some(block))
    }

    /// What the group of a page is. The memory must have the page.
    pub(super) fn group(&self, memory: &MemoryEntry, page: u64) -> Result<Group, ImageError> {
        let number = memory.first_block + (page / BLOCK_PAGES) as usize;
        if let Some(block) = self.block(number)? {
            return Ok(Group {
                kinds: block.kinds[(page % BLOCK_PAGES) as usize / CLUSTER_PAGES],
                row: block.row(page).copied(),
            });
        }
        let kind = self.table.blocks.get(number).map(|entry| entry.kind);
        let kinds = kind.unwrap_or(Kind::Hole).sixteen();
        let first = page / CLUSTER_PAGES as u64 * CLUSTER_PAGES as u64;
        let there = memory.spec.pages - first;
        let kinds = if there < CLUSTER_PAGES as u64 {
            kinds & ((1 << (2 * there)) - 1)
        } else {
            kinds
        };
        Ok(Group { kinds, row: None })
    }

    /// Reads all pages of a cluster in the group that begins with page `first`.
    pub(super) fn read_row(
        &self,
        memory: u32,
        first: u64,
        row: &Row,
        buffer: &mut ClusterBuffer,
    ) -> Result<(), ImageError> {
        let stored = buffer.stored(row.codec, row.length as usize);
        read(&self.storage, row.offset, stored)?;
        let place = Part::Cluster {
            memory,
            first,
            mask: row.mask,
            codec: row.codec,
        };
        if sum(self.header.id, place, stored) != row.sum {
            let what = "a cluster's checksum is wrong";
            return Err(ImageError::corrupt(what, row.offset));
        }
        buffer
            .unpack(row.codec, row.plain())
            .map_err(|what| ImageError::corrupt(what, row.offset))
    }

    /// Reads the section of that number.
    pub(super) fn section(&self, index: usize) -> Result<Option<Section>, ImageError> {
        let Some(entry) = self.table.sections.get(index) else {
            return Ok(None);
        };
        // Bounded when the table was read.
        let mut contents = vec![0; entry.info.length as usize];
        read(&self.storage, entry.offset, &mut contents)?;
        if sum(self.header.id, Part::Section { index }, &contents) != entry.sum {
            let what = "a section's checksum is wrong";
            return Err(ImageError::corrupt(what, entry.offset));
        }
        Ok(Some(Section {
            name: entry.info.name.clone(),
            version: entry.info.version,
            optional: entry.info.optional,
            contents,
        }))
    }
}
