//! The table: memories, sections, and where index blocks are.
//!
//! Places are not said but follow from lengths, so nothing can overlap: what is read through a
//! table is at most as much as the file has bytes.

use super::{
    MAX_MEMORIES, MAX_PAGES, MAX_SECTION, MAX_SECTIONS, MAX_SECTIONS_BYTES,
    block::{KINDS, Kind, MAX_BLOCK},
    blocks_of,
    bytes::{Bytes, put_name},
    footer::Footer,
};
use crate::{
    error::ImageError,
    names::{ImageName, MemorySpec, SectionInfo, Summary},
};

const COUNTS: u64 = 8;
const MEMORY: u64 = 16;
const SECTION: u64 = 64;
const BLOCK: u64 = 16;
const OPTIONAL: u32 = 1;
/// Bytes of a table at most. A memory may end within a block.
pub(crate) const MAX_TABLE: u64 = COUNTS
    + MAX_MEMORIES * MEMORY
    + MAX_SECTIONS * SECTION
    + (MAX_PAGES / super::BLOCK_PAGES + MAX_MEMORIES) * BLOCK;

/// A memory, and which of the blocks are its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MemoryEntry {
    pub(crate) spec: MemorySpec,
    /// The first of [`Table::blocks`].
    pub(crate) first_block: usize,
}

/// A section, and where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SectionEntry {
    pub(crate) info: SectionInfo,
    pub(crate) offset: u64,
    pub(crate) sum: u64,
}

/// An index block, and where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockEntry {
    pub(crate) offset: u64,
    pub(crate) sum: u64,
    /// 0: all pages are of `kind`.
    pub(crate) length: u32,
    pub(crate) kind: Kind,
}

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Table {
    /// By number.
    pub(crate) memories: Vec<MemoryEntry>,
    pub(crate) sections: Vec<SectionEntry>,
    pub(crate) blocks: Vec<BlockEntry>,
}

impl Table {
    /// As it stands in a file.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend((self.memories.len() as u32).to_le_bytes());
        bytes.extend((self.sections.len() as u32).to_le_bytes());
        for memory in &self.memories {
            bytes.extend(memory.spec.number.to_le_bytes());
            bytes.extend([0; 4]);
            bytes.extend(memory.spec.pages.to_le_bytes());
        }
        for section in &self.sections {
            put_name(&section.info.name, &mut bytes);
            bytes.extend(section.info.version.to_le_bytes());
            let flags = if section.info.optional { OPTIONAL } else { 0 };
            bytes.extend(flags.to_le_bytes());
            bytes.extend(section.info.length.to_le_bytes());
            bytes.extend(section.sum.to_le_bytes());
            bytes.extend([0; 8]);
        }
        for block in &self.blocks {
            bytes.extend(block.length.to_le_bytes());
            bytes.extend((block.kind as u32).to_le_bytes());
            bytes.extend(block.sum.to_le_bytes());
        }
        bytes
    }

    /// Reads a table that stands at `at`, of a file whose clusters end at `data_end`.
    pub(crate) fn decode(
        bytes: &[u8],
        at: u64,
        data_end: u64,
        has_base: bool,
    ) -> Result<Self, ImageError> {
        let corrupt = |what| ImageError::corrupt(what, at);
        let mut left = Bytes::new(bytes, at);
        let memories = u64::from(left.u32()?);
        let sections = u64::from(left.u32()?);
        if memories > MAX_MEMORIES || sections > MAX_SECTIONS {
            return Err(corrupt("too many memories or sections"));
        }
        let mut table = Self::default();
        let blocks = table.take_memories(&mut left, memories)?;
        let wanted = COUNTS + memories * MEMORY + sections * SECTION + blocks * BLOCK;
        if wanted != bytes.len() as u64 {
            return Err(corrupt("the table's length"));
        }
        let mut end = data_end;
        for _ in 0..sections {
            let section = take_section(&mut left, end)?;
            let twice = |other: &SectionEntry| other.info.name == section.info.name;
            if table.sections.iter().any(twice) {
                return Err(corrupt("a section comes twice"));
            }
            end += section.info.length;
            table.sections.push(section);
        }
        if end - data_end > MAX_SECTIONS_BYTES {
            return Err(corrupt("the sections are too long"));
        }
        // As many as are behind them in the table.
        table.blocks.reserve_exact(blocks as usize);
        for _ in 0..blocks {
            let block = take_block(&mut left, end, has_base)?;
            end += u64::from(block.length);
            table.blocks.push(block);
        }
        if end != at {
            return Err(corrupt(
                "the index blocks do not end where the table begins",
            ));
        }
        Ok(table)
    }

    /// What a file with this table says of itself.
    pub(crate) fn summary(
        &self,
        footer: &Footer,
        base: Option<ImageName>,
        version: u32,
    ) -> Summary {
        Summary {
            name: ImageName {
                id: footer.id,
                index_sum: footer.table_sum,
            },
            base,
            version,
            length: footer.length,
            memories: self.memories.iter().map(|memory| memory.spec).collect(),
            sections: self
                .sections
                .iter()
                .map(|section| section.info.clone())
                .collect(),
            data_pages: footer.data_pages,
            clusters: footer.clusters,
        }
    }

    /// Takes the memories, and says how many blocks they have.
    fn take_memories(&mut self, left: &mut Bytes<'_>, count: u64) -> Result<u64, ImageError> {
        let (mut pages, mut blocks) = (0_u64, 0);
        for _ in 0..count {
            let at = left.at();
            let number = left.u32()?;
            left.zeroes(4)?;
            let spec = MemorySpec {
                number,
                pages: left.u64()?,
            };
            let ascends = |last: &MemoryEntry| last.spec.number < number;
            if !self.memories.last().is_none_or(ascends) {
                return Err(ImageError::corrupt("the order of memories", at));
            }
            pages = pages.saturating_add(spec.pages);
            if pages > MAX_PAGES {
                return Err(ImageError::corrupt("too many pages", at));
            }
            self.memories.push(MemoryEntry {
                spec,
                first_block: blocks as usize,
            });
            blocks += blocks_of(spec.pages);
        }
        Ok(blocks)
    }
}

fn take_section(left: &mut Bytes<'_>, offset: u64) -> Result<SectionEntry, ImageError> {
    let at = left.at();
    let name = left.name()?;
    let version = left.u32()?;
    let flags = left.u32()?;
    let length = left.u64()?;
    let sum = left.u64()?;
    left.zeroes(8)?;
    if flags & !OPTIONAL != 0 || length > MAX_SECTION {
        return Err(ImageError::corrupt("a section's flags or length", at));
    }
    let info = SectionInfo {
        name,
        version,
        optional: flags & OPTIONAL != 0,
        length,
    };
    Ok(SectionEntry { info, offset, sum })
}

fn take_block(left: &mut Bytes<'_>, offset: u64, has_base: bool) -> Result<BlockEntry, ImageError> {
    let at = left.at();
    let length = left.u32()?;
    let kind = left.u32()?;
    let sum = left.u64()?;
    let right = if length == 0 {
        let known = match Kind::of(kind) {
            Kind::Hole | Kind::Zero => true,
            Kind::Data => false,
            Kind::Base => has_base,
        };
        known && kind < 4 && sum == 0
    } else {
        (KINDS..=MAX_BLOCK).contains(&(length as usize)) && kind == 0
    };
    if !right {
        return Err(ImageError::corrupt("an index block's length or kind", at));
    }
    Ok(BlockEntry {
        offset,
        sum,
        length,
        kind: Kind::of(kind),
    })
}

/// What an opened file keeps of each 4 MiB.
const _: () = assert!(size_of::<BlockEntry>() == 24);
