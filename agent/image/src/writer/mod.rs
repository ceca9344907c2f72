//! Writes one image. Pages come in any order and from several threads.
//!
//! # Protocol
//! Header; then memories, pages, marks and sections in any order, by `&self`; then
//! [`Writer::finish`]. A memory is declared before its pages. Each page is given or marked at most
//! once.
//!
//! # Concurrency
//! A cluster takes its place in the file from one counter and is written there by its own thread.
//! See `memory` for the locks. The list of memories is behind a read-write lock, held for a look.
//!
//! # Failure
//! A cluster that could not be written leaves a gap, and a page that is claimed and not stored. So
//! the first failed write ends the image: every later call says `Failed`, and no footer is written.
//!
//! # Memory
//! 24 bytes a cluster, and 280 for each 4 MiB that has any: 28 MiB for 64 GiB of whole clusters,
//! and in the worst case, with pages written one by one, 388 MiB. Lists have room to grow: up to
//! twice that.

use std::{
    collections::BTreeMap,
    fmt, io,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use self::{
    given::{Given, is_zero},
    memory::Memory,
    tail::{Ending, Put},
};
use crate::{
    codec::{Packer, Pool},
    error::ImageError,
    format::{
        BLOCK_PAGES, GROUP_BYTES, KNOWN, MAX_MEMORIES, MAX_PAGES, MAX_SECTION, MAX_SECTIONS,
        MAX_SECTIONS_BYTES,
        block::{Kind, Row},
        bytes::is_name,
        header::{HEADER, Header},
        sum::{Part, of_header, sum},
    },
    names::{
        CLUSTER_PAGES, Compression, Mark, MemorySpec, Options, PAGE_SIZE, Page, Progress, Section,
        Summary,
    },
    storage::{self, Storage},
};

mod given;
mod memory;
mod tail;

/// Writes one image into a storage that was empty.
pub struct Writer<W> {
    storage: W,
    options: Options,
    header_sum: u64,
    memories: RwLock<BTreeMap<u32, Arc<Memory>>>,
    sections: Mutex<Vec<Section>>,
    packers: Pool<Packer>,
    /// Where the next cluster goes.
    end: AtomicU64,
    failed: AtomicBool,
    pages: AtomicU64,
    data_pages: AtomicU64,
    stored: AtomicU64,
}

impl<W> fmt::Debug for Writer<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writer")
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

impl<W: Storage> Writer<W> {
    /// Begins an image in `storage`, which must be empty. Writes the header.
    ///
    /// # Errors
    /// `NotEmpty`, `NoSpace`, `Io`.
    pub fn new(storage: W, options: &Options) -> Result<Self, ImageError> {
        let length = storage
            .len()
            .map_err(ImageError::io("asking for the length"))?;
        if length != 0 {
            return Err(ImageError::NotEmpty { length });
        }
        let header = Header {
            version: KNOWN.1,
            id: options.id,
            base: options.base.as_ref().map(|base| base.name),
            zstd: options.compression != Compression::None,
        };
        let header = header.encode();
        let writer = Self {
            storage,
            options: options.clone(),
            header_sum: of_header(&header[..HEADER - 8]),
            memories: RwLock::default(),
            sections: Mutex::default(),
            packers: Pool::default(),
            end: AtomicU64::new(HEADER as u64),
            failed: AtomicBool::new(false),
            pages: AtomicU64::new(0),
            data_pages: AtomicU64::new(0),
            stored: AtomicU64::new(0),
        };
        writer.put(0, &header)?;
        Ok(writer)
    }

    /// Declares a memory, before its pages come.
    ///
    /// # Errors
    /// `Twice`; `Limit` with more than 16 TiB, or 32,768 memories.
    pub fn add_memory(&self, memory: MemorySpec) -> Result<(), ImageError> {
        let mut memories = self
            .memories
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if memories.contains_key(&memory.number) {
            return Err(ImageError::Twice {
                what: format!("memory {}", memory.number),
            });
        }
        at_most("memories", memories.len() as u64 + 1, MAX_MEMORIES)?;
        let pages = memories.values().map(|memory| memory.spec.pages);
        let pages = pages.sum::<u64>().saturating_add(memory.pages);
        at_most("pages of all memories", pages, MAX_PAGES)?;
        let base = self.options.base.as_ref();
        let of_base = base.and_then(|base| {
            let mut memories = base.memories.iter();
            memories.find(|of_base| of_base.number == memory.number)
        });
        let base_pages = of_base.map_or(0, |of_base| of_base.pages);
        memories.insert(memory.number, Arc::new(Memory::new(memory, base_pages)));
        Ok(())
    }

    /// Stores consecutive pages of a memory, the first of which is number `first`; the length of
    /// `pages` is a multiple of the page size. Pages that are all zeroes are marked so. What is
    /// given at once of a cluster is stored and compressed at once: whole clusters are best.
    ///
    /// Blocks for as long as compressing and writing takes. May be called by several threads.
    ///
    /// # Errors
    /// `NoSuchMemory`, `NoSuchPage`, and `Limit` when `pages` does not end with a page: nothing is
    /// stored then. `Twice`: what came before that cluster is stored. `NoSpace`, `Io`, `Failed`:
    /// the image is given up.
    pub fn write(&self, memory: u32, first: u64, pages: &[u8]) -> Result<(), ImageError> {
        let (pages, rest) = pages.as_chunks::<PAGE_SIZE>();
        at_most("bytes after the last page", rest.len() as u64, 0)?;
        self.store(memory, first, Given::All(pages))
    }

    /// As [`Writer::write`], of those pages from `first` on that are `Some`.
    ///
    /// # Errors
    /// As [`Writer::write`].
    pub fn write_some(
        &self,
        memory: u32,
        first: u64,
        pages: &[Option<&Page>],
    ) -> Result<(), ImageError> {
        self.store(memory, first, Given::Some(pages))
    }

    /// Says of `count` pages without contents what they are.
    ///
    /// # Errors
    /// `NoSuchMemory`; `NoSuchPage`, also with [`Mark::Base`] of a page that the base does not
    /// have; `Twice` for a page of which something else was said. What is in the 4 MiB before that
    /// page's is marked all the same. `Failed`.
    pub fn mark(&self, memory: u32, first: u64, count: u64, mark: Mark) -> Result<(), ImageError> {
        let memory = self.begin(memory, first, count)?;
        let kind = match mark {
            Mark::Hole => Kind::Hole,
            Mark::Zero => Kind::Zero,
            Mark::Base => Kind::Base,
        };
        let (mut at, end) = (first, first + count);
        while at < end {
            let next = end.min((at / BLOCK_PAGES + 1) * BLOCK_PAGES);
            let said = memory.mark(at, next, kind)?;
            self.pages.fetch_add(said, Ordering::Relaxed);
            at = next;
        }
        Ok(())
    }

    /// Adds a section, at any time before the end. It is kept until then.
    ///
    /// # Errors
    /// `BadName`, `Twice`, `Limit`.
    pub fn add_section(&self, section: Section) -> Result<(), ImageError> {
        let mut sections = self.sections.lock().unwrap_or_else(PoisonError::into_inner);
        if !is_name(&section.name) {
            return Err(ImageError::BadName { name: section.name });
        }
        if sections.iter().any(|other| other.name == section.name) {
            return Err(ImageError::Twice {
                what: format!("section {}", section.name),
            });
        }
        let length = section.contents.len() as u64;
        let before = sections.iter().map(|other| other.contents.len() as u64);
        at_most("sections", sections.len() as u64 + 1, MAX_SECTIONS)?;
        at_most("bytes of a section", length, MAX_SECTION)?;
        let all = before.sum::<u64>() + length;
        at_most("bytes of all sections", all, MAX_SECTIONS_BYTES)?;
        sections.push(section);
        Ok(())
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let data_pages = self.data_pages.load(Ordering::Relaxed);
        Progress {
            pages: self.pages.load(Ordering::Relaxed),
            data_pages,
            logical_bytes: data_pages * PAGE_SIZE as u64,
            stored_bytes: self.stored.load(Ordering::Relaxed),
        }
    }

    /// Writes sections, index and footer, and returns once all of it is durable. Until then the
    /// storage holds no image: a reader says `Truncated`.
    ///
    /// # Errors
    /// `NoSpace`, `Io`, `Failed`.
    pub fn finish(mut self) -> Result<Summary, ImageError> {
        self.alive()?;
        let memories = std::mem::take(&mut self.memories);
        let memories = memories
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        // Nobody else has one: all calls are over.
        let memories: Option<Vec<Memory>> = memories.into_values().map(Arc::into_inner).collect();
        let memories = memories.ok_or(ImageError::Failed)?.into_iter();
        let sections = std::mem::take(&mut self.sections);
        let sections = sections
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        let base = self.options.base.as_ref().map(|base| base.name);
        let ending = Ending {
            id: self.options.id,
            header_sum: self.header_sum,
            data_end: *self.end.get_mut(),
            zstd: self.options.compression != Compression::None,
            base: base.is_some(),
        };
        let (table, footer) = ending.write(&self, memories, sections)?;
        Ok(table.summary(&footer, base, KNOWN.1))
    }

    fn alive(&self) -> Result<(), ImageError> {
        if self.failed.load(Ordering::Relaxed) {
            return Err(ImageError::Failed);
        }
        Ok(())
    }

    /// The memory, if it has those pages.
    fn begin(&self, memory: u32, first: u64, count: u64) -> Result<Arc<Memory>, ImageError> {
        self.alive()?;
        let memories = self.memories.read().unwrap_or_else(PoisonError::into_inner);
        let found = memories
            .get(&memory)
            .ok_or(ImageError::NoSuchMemory { memory })?;
        found.check(first, count)?;
        Ok(Arc::clone(found))
    }

    fn store(&self, memory: u32, first: u64, mut given: Given<'_>) -> Result<(), ImageError> {
        let memory = self.begin(memory, first, given.len() as u64)?;
        let mut page = first;
        while given.len() > 0 {
            let within = (page % CLUSTER_PAGES as u64) as usize;
            let count = (CLUSTER_PAGES - within).min(given.len());
            let (group, rest) = given.split_at(count);
            self.store_group(&memory, page - within as u64, within, group)?;
            page += count as u64;
            given = rest;
        }
        Ok(())
    }

    /// Stores pages from the one `within` the group on that begins with page `first`.
    fn store_group(
        &self,
        memory: &Memory,
        first: u64,
        within: usize,
        given: Given<'_>,
    ) -> Result<(), ImageError> {
        let (mut zero, mut data) = (0_u16, 0_u16);
        for at in 0..given.len() {
            match given.get(at) {
                Some(page) if is_zero(page) => zero |= 1 << (within + at),
                Some(_) => data |= 1 << (within + at),
                None => {}
            }
        }
        memory.claim(first, zero, data)?;
        if data != 0 {
            let mut packer = match self.packers.take() {
                Some(packer) => packer,
                None => Packer::new(self.options.compression).inspect_err(|_| self.fail())?,
            };
            let (codec, bytes) = match given {
                Given::All(pages) if zero == 0 => packer.pack(pages.as_flattened()),
                _ => {
                    let stored = |at: &usize| data >> (within + at) & 1 == 1;
                    let pages = (0..given.len()).filter(stored);
                    packer.pack_some(pages.filter_map(|at| given.get(at)))
                }
            };
            let row = self.store_cluster(memory, first, data, codec, bytes)?;
            memory.stored(first, row);
            self.packers.put(packer);
        }
        let said = u64::from((zero | data).count_ones());
        self.pages.fetch_add(said, Ordering::Relaxed);
        let stored = u64::from(data.count_ones());
        self.data_pages.fetch_add(stored, Ordering::Relaxed);
        Ok(())
    }

    fn store_cluster(
        &self,
        memory: &Memory,
        first: u64,
        mask: u16,
        codec: u8,
        bytes: &[u8],
    ) -> Result<Row, ImageError> {
        let place = Part::Cluster {
            memory: memory.spec.number,
            first,
            mask,
            codec,
        };
        let offset = self.end.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.put(offset, bytes)?;
        Ok(Row {
            offset,
            sum: sum(self.options.id, place, bytes),
            // Both are small: see `GROUP_BYTES`.
            length: bytes.len().min(GROUP_BYTES) as u32,
            mask,
            group: (first % BLOCK_PAGES / CLUSTER_PAGES as u64) as u8,
            codec,
        })
    }

    fn fail(&self) {
        self.failed.store(true, Ordering::Relaxed);
    }

    fn failure(&self, doing: &'static str, needed: usize, source: io::Error) -> ImageError {
        self.fail();
        if is_full(&source) {
            return ImageError::NoSpace {
                needed: needed as u64,
                written: self.stored.load(Ordering::Relaxed),
            };
        }
        ImageError::Io { doing, source }
    }
}

impl<W: Storage> Put for Writer<W> {
    fn put(&self, offset: u64, bytes: &[u8]) -> Result<(), ImageError> {
        self.alive()?;
        match storage::write_all(&self.storage, offset, bytes) {
            Ok(()) => {
                let length = bytes.len() as u64;
                self.stored.fetch_add(length, Ordering::Relaxed);
                Ok(())
            }
            Err(source) => Err(self.failure("writing an image", bytes.len(), source)),
        }
    }

    fn sync(&self) -> Result<(), ImageError> {
        // Some filesystems say only now that there is no room.
        let synced = self.storage.sync();
        synced.map_err(|source| self.failure("making an image durable", 0, source))
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
    )
}

fn at_most(what: &'static str, found: u64, most: u64) -> Result<(), ImageError> {
    if found <= most {
        return Ok(());
    }
    Err(ImageError::Limit { what, found, most })
}
