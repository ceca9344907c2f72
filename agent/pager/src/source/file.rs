//! A saved file as a layer, with the files that it builds on.
//!
//! *Locking*: buffers that clusters are unpacked into are kept for the next read behind a lock,
//! which is held to take one or to put it back.

use std::{
    fs::File,
    ops::Range,
    os::fd::OwnedFd,
    sync::{Arc, Mutex},
};

use slat_image::{CLUSTER_PAGES, ClusterBuffer, ImageError, PAGE_SIZE, Reader};
use slat_paging::wire::ProblemKind;

use super::contents::Contents;
use crate::{error::Trouble, sync::lock};

/// Buffers that are kept.
const BUFFERS: usize = 8;

/// See the module.
pub(crate) struct FileLayer {
    name: String,
    reader: Arc<Reader<File>>,
    buffers: Mutex<Vec<ClusterBuffer>>,
}

impl FileLayer {
    /// Of the file and those below it, the nearest first.
    pub(super) fn open(name: String, files: Vec<OwnedFd>) -> Result<Self, Trouble> {
        let reader = open(&name, files)?;
        let reader =
            reader.ok_or_else(|| Trouble::new(ProblemKind::Refused, "a layer of no file"))?;
        Ok(Self::of(name, &reader))
    }

    /// Of a file that is open.
    pub(crate) fn of(name: String, reader: &Arc<Reader<File>>) -> Self {
        Self {
            name,
            reader: Arc::clone(reader),
            buffers: Mutex::default(),
        }
    }

    /// How many pages a memory has; 0: there is none.
    pub(crate) fn pages(&self, number: u32) -> u64 {
        let mut memories = self.reader.memories().iter();
        let found = memories.find(|memory| memory.number == number);
        found.map_or(0, |memory| memory.pages)
    }

    /// The pages that its guest had touched. A section that cannot be read is said in the log, and
    /// nothing is read first then: pages come all the same.
    pub(super) fn working_set(&self) -> Vec<(u32, Range<u64>)> {
        let runs = self.reader.working_set().unwrap_or_else(|error| {
            tracing::warn!(file = %self.name, %error, "its working set cannot be read");
            None
        });
        let runs = runs.into_iter().flatten();
        runs.map(|run| (run.memory, run.first..run.first + run.pages))
            .collect()
    }

    pub(crate) fn read(
        &self,
        number: u32,
        pages: Range<u64>,
        into: &mut Contents,
    ) -> Result<(), Trouble> {
        let mut buffer = lock(&self.buffers).pop().unwrap_or_default();
        let result = self.read_with(&mut buffer, number, pages, into);
        let mut buffers = lock(&self.buffers);
        if buffers.len() < BUFFERS {
            buffers.push(buffer);
        }
        result.map_err(|error| trouble(&self.name, &error))
    }

    fn read_with(
        &self,
        buffer: &mut ClusterBuffer,
        number: u32,
        pages: Range<u64>,
        into: &mut Contents,
    ) -> Result<(), ImageError> {
        let mut group = pages.start;
        while group < pages.end {
            let end = together(group).end.min(pages.end);
            // Which pages of the group were given: a group may have several clusters.
            let mut given = 0_u32;
            for page in group..end {
                if given >> (page % CLUSTER_PAGES as u64) & 1 == 1 {
                    continue;
                }
                let Some(cluster) = self.reader.cluster_of(number, page)? else {
                    into.zeroes(page, 1);
                    continue;
                };
                for (page, contents) in self.reader.read_cluster(&cluster, buffer)? {
                    let bit = 1 << (page % CLUSTER_PAGES as u64);
                    if (group..end).contains(&page) && given & bit == 0 {
                        into.room(page, 1).copy_from_slice(contents);
                        given |= bit;
                    }
                }
                // What the cluster promised and did not have.
                if given >> (page % CLUSTER_PAGES as u64) & 1 == 0 {
                    let memory = number;
                    return Err(ImageError::NoSuchPage { memory, page });
                }
            }
            group = end;
        }
        Ok(())
    }
}

/// The pages that may be in one cluster with this one.
pub(super) fn together(page: u64) -> Range<u64> {
    let first = page / CLUSTER_PAGES as u64 * CLUSTER_PAGES as u64;
    first..first + CLUSTER_PAGES as u64
}

/// A file and those below it, the nearest first; `None` of none.
pub(crate) fn open(name: &str, files: Vec<OwnedFd>) -> Result<Option<Arc<Reader<File>>>, Trouble> {
    let mut reader = None;
    for file in files.into_iter().rev() {
        let opened = Reader::open(File::from(file), reader);
        reader = Some(Arc::new(opened.map_err(|error| trouble(name, &error))?));
    }
    Ok(reader)
}

/// What a file's error is to those who wait for its pages.
pub(crate) fn trouble(name: &str, error: &ImageError) -> Trouble {
    let kind = match error {
        ImageError::Truncated { .. } => ProblemKind::SourceTruncated,
        ImageError::NoSuchMemory { .. } | ImageError::NoSuchPage { .. } => {
            ProblemKind::SourceTruncated
        }
        ImageError::Io { .. } => ProblemKind::SourceGone,
        _ => ProblemKind::SourceCorrupt,
    };
    debug_assert_eq!(PAGE_SIZE, slat_paging::PAGE);
    Trouble::new(kind, format!("{name}: {error}"))
}
