//! Reads an image, with the bases that it builds on.
//!
//! # Protocol
//! The oldest base is opened first, then what builds on it, each with the one before. Opening reads
//! header, footer and table; their checksums cover those of all else, which is checked when it is
//! read.
//!
//! # Concurrency
//! All calls are by `&self` and read at positions of their own. See `layer` for what is kept.
//!
//! # Bounds
//! Whatever a file says, no more memory is taken than its table (97 MiB are kept of that of 16 TiB,
//! and opening takes 65 MiB besides), an index block (25 KiB), a cluster twice (128 KiB), a section
//! (16 MiB), or for [`Reader::clusters`] a list that is shorter than the file.

use std::sync::Arc;

use self::{
    chain::{Chain, Found},
    layer::Layer,
};
use crate::{
    codec::{ClusterBuffer, Pool},
    error::ImageError,
    names::{Base, ImageName, MemorySpec, Page, PageKind, Section, Summary},
    storage::Storage,
    working_set::{self, WORKING_SET, WorkingRun},
};

mod chain;
mod cluster;
mod layer;
mod order;
mod verify;

pub use cluster::{Cluster, Pages};
pub use order::Clusters;
pub use verify::{Fault, Verified};

/// What a whole file says of itself, without its bases. Reads header, table and footer.
///
/// # Errors
/// As [`Reader::open`], but `WrongBase` and `Limit`.
pub fn inspect(storage: &impl Storage) -> Result<Summary, ImageError> {
    Ok(Layer::open(storage)?.summary())
}

/// An opened image. All calls may come from several threads; all may block on the disk.
#[derive(Debug)]
pub struct Reader<S> {
    chain: Arc<Chain<S>>,
    base: Option<Arc<Reader<S>>>,
    summary: Summary,
    buffers: Pool<ClusterBuffer>,
}

impl<S: Storage> Reader<S> {
    /// Opens an image. `base` is what it builds on, and nothing for one that stands alone.
    ///
    /// # Errors
    /// `NotAnImage`, `Version`, `Feature`, `Truncated`, `Corrupt`; `WrongBase` when it builds on
    /// something else than `base`; `Limit` for more than 64 files in a chain; `Io`.
    pub fn open(storage: S, base: Option<Arc<Self>>) -> Result<Self, ImageError> {
        let chain = Chain::open(storage, base.as_ref().map(|base| &base.chain))?;
        Ok(Self {
            summary: chain.youngest.summary(),
            chain: Arc::new(chain),
            base,
            buffers: Pool::default(),
        })
    }

    /// What the file says of itself: memories, sections, length.
    #[must_use]
    pub fn summary(&self) -> &Summary {
        &self.summary
    }

    /// Which image it is.
    #[must_use]
    pub fn name(&self) -> ImageName {
        self.summary.name
    }

    /// Its memories, by number.
    #[must_use]
    pub fn memories(&self) -> &[MemorySpec] {
        &self.summary.memories
    }

    /// For the writer of an increment that builds on this.
    #[must_use]
    pub fn as_base(&self) -> Base {
        Base {
            name: self.summary.name,
            memories: self.summary.memories.clone(),
        }
    }

    /// The base that was given to [`Reader::open`].
    #[must_use]
    pub fn base(&self) -> Option<&Arc<Self>> {
        self.base.as_ref()
    }

    /// Reads all sections, in the order in which they were added. Bases' are not looked at.
    ///
    /// # Errors
    /// `Corrupt`, `Truncated`, `Io`.
    pub fn sections(&self) -> Result<Vec<Section>, ImageError> {
        let sections = 0..self.chain.youngest.table.sections.len();
        sections
            .filter_map(|index| self.chain.youngest.section(index).transpose())
            .collect()
    }

    /// Reads a section; `None` when the file has none of that name. Bases' are not looked at.
    ///
    /// # Errors
    /// `Corrupt`, `Truncated`, `Io`.
    pub fn section(&self, name: &str) -> Result<Option<Section>, ImageError> {
        let mut sections = self.chain.youngest.table.sections.iter();
        match sections.position(|section| section.info.name == name) {
            Some(index) => self.chain.youngest.section(index),
            None => Ok(None),
        }
    }

    /// The pages that the guest had touched, by memory and page; `None` when the file does not say.
    /// Bases' are not looked at.
    ///
    /// # Errors
    /// `Corrupt`, `Truncated`, `Io`.
    pub fn working_set(&self) -> Result<Option<Vec<WorkingRun>>, ImageError> {
        match self.section(WORKING_SET)? {
            Some(section) => working_set::decode(&section, self.memories()),
            None => Ok(None),
        }
    }

    /// What a page is, without reading it.
    ///
    /// # Errors
    /// `NoSuchMemory`, `NoSuchPage`, `Corrupt`, `Truncated`, `Io`.
    pub fn kind(&self, memory: u32, page: u64) -> Result<PageKind, ImageError> {
        Ok(match self.chain.find(memory, page)? {
            Found::Without(kind) => kind,
            Found::In(_) => PageKind::Data,
        })
    }

    /// Whether a page was never touched.
    ///
    /// # Errors
    /// As [`Reader::kind`].
    pub fn is_hole(&self, memory: u32, page: u64) -> Result<bool, ImageError> {
        Ok(self.kind(memory, page)? == PageKind::Hole)
    }

    /// Whether a page is zeroes, those never touched among them.
    ///
    /// # Errors
    /// As [`Reader::kind`].
    pub fn is_zero(&self, memory: u32, page: u64) -> Result<bool, ImageError> {
        Ok(self.kind(memory, page)? != PageKind::Data)
    }

    /// Reads one page, with at most one cluster of work in each file. Zeroes for a hole.
    ///
    /// # Errors
    /// As [`Reader::kind`].
    pub fn page(&self, memory: u32, page: u64, into: &mut Page) -> Result<PageKind, ImageError> {
        let cluster = match self.chain.find(memory, page)? {
            Found::Without(kind) => {
                into.fill(0);
                return Ok(kind);
            }
            Found::In(cluster) => cluster,
        };
        let mut buffer = self.buffers.take().unwrap_or_default();
        let mut pages = self.read_cluster(&cluster, &mut buffer)?;
        // Its row was found by this page.
        let (_, contents) = pages
            .find(|(number, _)| *number == page)
            .ok_or(ImageError::NoSuchPage { memory, page })?;
        into.copy_from_slice(contents);
        self.buffers.put(buffer);
        Ok(PageKind::Data)
    }

    /// The cluster that a page is read with; `None` when it is zeroes or a hole.
    ///
    /// # Errors
    /// As [`Reader::kind`].
    pub fn cluster_of(&self, memory: u32, page: u64) -> Result<Option<Cluster>, ImageError> {
        Ok(match self.chain.find(memory, page)? {
            Found::Without(_) => None,
            Found::In(cluster) => Some(cluster),
        })
    }

    /// Reads a cluster of this reader into `buffer`, and returns its pages by number. Pages that
    /// are stored with them, but are not what the image has, are not among them.
    ///
    /// # Errors
    /// `Corrupt`, `Truncated`, `Io`; `NoSuchPage` for a cluster of another reader.
    pub fn read_cluster<'b>(
        &self,
        cluster: &Cluster,
        buffer: &'b mut ClusterBuffer,
    ) -> Result<Pages<'b>, ImageError> {
        let Cluster { memory, first, .. } = *cluster;
        if cluster.depth > self.chain.depth {
            return Err(ImageError::NoSuchPage {
                memory,
                page: first,
            });
        }
        let row = &cluster.row;
        self.chain
            .layer(cluster.depth)
            .read_row(memory, first, row, buffer)?;
        Ok(Pages {
            page: first,
            stored: row.mask,
            wanted: cluster.wanted,
            left: buffer.pages(),
        })
    }

    /// All clusters in the order of the files, the oldest base first: each page that has contents
    /// is in exactly one of them. Of each, only pages that the image has from there. The list
    /// behind it takes 16 bytes a cluster while it lives.
    ///
    /// # Errors
    /// `Corrupt`, `Truncated`, `Io`; the iterator ends after its first error.
    pub fn clusters(&self) -> Result<Clusters<'_, S>, ImageError> {
        Clusters::new(&self.chain)
    }

    /// Reads everything, in all bases too, and says what is wrong: the first `faults` of it. Goes
    /// on after what is wrong. Takes 16 bytes a cluster while it does.
    ///
    /// # Errors
    /// `Io`.
    pub fn verify(&self, faults: usize) -> Result<Verified, ImageError> {
        verify::verify(&self.chain, faults)
    }
}
