//! The end of a file: sections, index blocks, table, footer, written through one buffer.
//!
//! The footer is written after all else is durable: where it is, everything is.

use super::memory::Memory;
use crate::{
    error::ImageError,
    format::{
        block::{Block, Bounds, Kind},
        footer::{FOOTER, Footer},
        sum::{Part, sum},
        table::{BlockEntry, MemoryEntry, SectionEntry, Table},
    },
    names::{ImageId, Section, SectionInfo},
};

/// Bytes that are written at once.
const CHUNK: usize = 1 << 20;

/// What writes; `Err` has become the error of the whole.
pub(super) trait Put {
    fn put(&self, offset: u64, bytes: &[u8]) -> Result<(), ImageError>;

    /// Makes durable what was put.
    fn sync(&self) -> Result<(), ImageError>;
}

/// Appends from a place on.
struct Appender<'a, P> {
    to: &'a P,
    at: u64,
    buffer: Vec<u8>,
}

impl<P: Put> Appender<'_, P> {
    fn place(&self) -> u64 {
        self.at + self.buffer.len() as u64
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= CHUNK {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), ImageError> {
        self.to.put(self.at, &self.buffer)?;
        self.at = self.place();
        self.buffer.clear();
        Ok(())
    }
}

/// What the end needs to know.
pub(super) struct Ending {
    pub(super) id: ImageId,
    pub(super) header_sum: u64,
    /// Where the clusters end.
    pub(super) data_end: u64,
    pub(super) zstd: bool,
    pub(super) base: bool,
}

impl Ending {
    /// Writes it through `to`.
    pub(super) fn write(
        &self,
        to: &impl Put,
        memories: impl Iterator<Item = Memory>,
        sections: Vec<Section>,
    ) -> Result<(Table, Footer), ImageError> {
        let mut out = Appender {
            to,
            at: self.data_end,
            buffer: Vec::with_capacity(CHUNK),
        };
        let mut table = Table::default();
        for (index, section) in sections.into_iter().enumerate() {
            let info = SectionInfo {
                name: section.name,
                version: section.version,
                optional: section.optional,
                length: section.contents.len() as u64,
            };
            table.sections.push(SectionEntry {
                info,
                offset: out.place(),
                sum: sum(self.id, Part::Section { index }, &section.contents),
            });
            out.append(&section.contents)?;
        }
        let (mut data_pages, mut clusters) = (0, 0);
        for memory in memories {
            let spec = memory.spec;
            table.memories.push(MemoryEntry {
                spec,
                first_block: table.blocks.len(),
            });
            for (number, (pages, kind, block)) in (0..).zip(memory.into_blocks()) {
                let entry = match block {
                    None => BlockEntry {
                        offset: out.place(),
                        sum: 0,
                        length: 0,
                        kind,
                    },
                    Some(block) => {
                        let rows = block.rows.iter();
                        data_pages += rows
                            .map(|row| u64::from(row.mask.count_ones()))
                            .sum::<u64>();
                        clusters += block.rows.len() as u64;
                        let place = (spec.number, number);
                        self.block(&mut out, place, pages, &block)?
                    }
                };
                table.blocks.push(entry);
            }
        }
        let bytes = table.encode();
        let mut footer = Footer {
            id: self.id,
            length: 0,
            data_end: self.data_end,
            table: out.place(),
            table_sum: sum(self.id, Part::Table, &bytes),
            header_sum: self.header_sum,
            data_pages,
            clusters,
        };
        out.append(&bytes)?;
        out.flush()?;
        footer.length = out.place() + FOOTER as u64;
        to.sync()?;
        out.append(&footer.encode())?;
        out.flush()?;
        to.sync()?;
        Ok((table, footer))
    }

    fn block(
        &self,
        out: &mut Appender<'_, impl Put>,
        (memory, block): (u32, u64),
        pages: u64,
        contents: &Block,
    ) -> Result<BlockEntry, ImageError> {
        let bounds = Bounds {
            data_end: self.data_end,
            zstd: self.zstd,
            base: self.base,
            pages,
        };
        // A page was claimed, and a panic came between it and its cluster.
        contents.check(bounds).map_err(|_| ImageError::Failed)?;
        let mut bytes = Vec::new();
        contents.encode(&mut bytes);
        let entry = BlockEntry {
            offset: out.place(),
            sum: sum(self.id, Part::Block { memory, block }, &bytes),
            length: bytes.len() as u32,
            kind: Kind::Hole,
        };
        out.append(&bytes)?;
        Ok(entry)
    }
}
