//! How the pages of a cluster become bytes of a file, and the other way round.
//!
//! A thread needs memory for it; a [`Pool`] keeps that of as many threads as are at it at once.
//! Decompression has room for the cluster's pages and not a byte more, whatever the frame says.

use std::{
    fmt,
    sync::{Mutex, PoisonError},
};

use zstd::bulk::{Compressor, Decompressor};

use crate::{
    error::ImageError,
    format::{GROUP_BYTES, block},
    names::{Compression, PAGE_SIZE, Page},
};

/// Packs clusters.
pub(crate) struct Packer {
    zstd: Option<Compressor<'static>>,
    /// Pages that were not side by side.
    gathered: Vec<u8>,
    frame: Vec<u8>,
}

impl Packer {
    pub(crate) fn new(compression: Compression) -> Result<Self, ImageError> {
        let zstd = match compression {
            Compression::None => None,
            Compression::Zstd(level) => {
                let zstd = Compressor::new(level);
                Some(zstd.map_err(ImageError::io("preparing to compress"))?)
            }
        };
        Ok(Self {
            zstd,
            gathered: Vec::new(),
            frame: Vec::new(),
        })
    }

    /// Codec and bytes of pages, which are one after the other.
    pub(crate) fn pack<'a>(&'a mut self, plain: &'a [u8]) -> (u8, &'a [u8]) {
        let Some(zstd) = &mut self.zstd else {
            return (block::RAW, plain);
        };
        // No frame that is not shorter.
        self.frame.resize(plain.len().saturating_sub(1), 0);
        match zstd.compress_to_buffer(plain, &mut self.frame[..]) {
            Ok(length) => (block::ZSTD, &self.frame[..length]),
            Err(_) => (block::RAW, plain),
        }
    }

    /// The same of pages that are anywhere.
    pub(crate) fn pack_some<'a>(
        &'a mut self,
        pages: impl Iterator<Item = &'a Page>,
    ) -> (u8, &'a [u8]) {
        self.gathered.clear();
        pages.for_each(|page| self.gathered.extend(page));
        let Some(zstd) = &mut self.zstd else {
            return (block::RAW, &self.gathered);
        };
        self.frame.resize(self.gathered.len().saturating_sub(1), 0);
        match zstd.compress_to_buffer(&self.gathered[..], &mut self.frame[..]) {
            Ok(length) => (block::ZSTD, &self.frame[..length]),
            Err(_) => (block::RAW, &self.gathered),
        }
    }
}

/// Room for one cluster. A thread that reads many keeps one.
#[derive(Default)]
pub struct ClusterBuffer {
    zstd: Option<Decompressor<'static>>,
    stored: Vec<u8>,
    pages: Vec<u8>,
}

impl fmt::Debug for ClusterBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterBuffer").finish_non_exhaustive()
    }
}

impl ClusterBuffer {
    /// Room for `length` bytes as they are in the file, at most those of a group.
    pub(crate) fn stored(&mut self, codec: u8, length: usize) -> &mut [u8] {
        let into = if codec == block::RAW {
            &mut self.pages
        } else {
            &mut self.stored
        };
        into.resize(length.min(GROUP_BYTES), 0);
        into
    }

    /// Makes `plain` bytes of pages, at most those of a group, out of what was read into
    /// [`ClusterBuffer::stored`].
    pub(crate) fn unpack(&mut self, codec: u8, plain: usize) -> Result<(), &'static str> {
        const WRONG: &str = "the compressed pages of a cluster";
        if codec == block::RAW {
            return if self.pages.len() == plain {
                Ok(())
            } else {
                Err(WRONG)
            };
        }
        if self.zstd.is_none() {
            self.zstd = Some(Decompressor::new().map_err(|_| "no memory to decompress")?);
        }
        let Some(zstd) = &mut self.zstd else {
            return Err(WRONG);
        };
        self.pages.resize(plain.min(GROUP_BYTES), 0);
        match zstd.decompress_to_buffer(&self.stored[..], &mut self.pages[..]) {
            Ok(length) if length == plain => Ok(()),
            _ => Err(WRONG),
        }
    }

    /// The pages.
    pub(crate) fn pages(&self) -> &[Page] {
        self.pages.as_chunks::<PAGE_SIZE>().0
    }
}

/// What threads work with, kept for the next one. The lock is held for a push or a pop.
pub(crate) struct Pool<T>(Mutex<Vec<T>>);

impl<T> fmt::Debug for Pool<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pool")
    }
}

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Pool<T> {
    /// More are not kept.
    const KEPT: usize = 64;

    pub(crate) fn take(&self) -> Option<T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    pub(crate) fn put(&self, one: T) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < Self::KEPT {
            kept.push(one);
        }
    }
}
