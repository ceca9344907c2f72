//! A snapshot of another VM's memory as a layer: what one page of it is at this moment.
//!
//! The VM goes on while it is read. Where a page is changes in one direction only: *deeper* (the VM
//! has not loaded it from its own source), *own* (in its memory file), *kept* (in the kept file,
//! because the VM was going to write it). So a reader looks where a page is, reads it there, and
//! looks again: if the answer is the same, nobody had leave to write in between, and what was read
//! is the snapshot's. It is no good to look at the kept bit alone after a page came from deeper:
//! the VM may have loaded the page and told its own source that it does not need it any more, and
//! the source's VM may have written it since.

use std::{collections::BTreeMap, os::fd::OwnedFd};

use slat_paging::{
    bits::{Marks, SharedBits},
    wire::{LayerMemory, ProblemKind},
};

use super::contents::Contents;
use crate::{error::Trouble, page_file::PageFile};

/// Where a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Where {
    Kept,
    Own,
    Deeper,
}

pub(super) struct SnapshotLayer {
    pub(super) name: String,
    /// While it is open, the VM goes on keeping pages.
    _lease: OwnedFd,
    memories: BTreeMap<u32, LayerPart>,
}

pub(super) struct LayerPart {
    file: PageFile,
    kept: PageFile,
    pub(super) marks: Marks,
    loaded: Option<SharedBits>,
    pub(super) origin: Option<u32>,
    pub(super) pages: u64,
}

impl SnapshotLayer {
    pub(super) fn new(name: String, lease: OwnedFd) -> Self {
        Self {
            name,
            _lease: lease,
            memories: BTreeMap::new(),
        }
    }

    /// Adds a memory; descriptors as the message has them.
    pub(super) fn add(&mut self, memory: &LayerMemory, fds: Vec<OwnedFd>) -> Result<(), Trouble> {
        let wrong = |error: std::io::Error| {
            let what = format!("{}: memory {}: {error}", self.name, memory.number);
            Trouble::new(ProblemKind::Refused, what)
        };
        let mut fds = fds.into_iter();
        let mut next = || {
            fds.next()
                .ok_or_else(|| wrong(std::io::ErrorKind::NotFound.into()))
        };
        let pages = memory.pages;
        let part = LayerPart {
            file: PageFile::new(next()?, memory.file_start, pages).map_err(wrong)?,
            kept: PageFile::new(next()?, 0, pages).map_err(wrong)?,
            marks: Marks::open(next()?, pages).map_err(wrong)?,
            loaded: match memory.has_loaded {
                true => Some(SharedBits::open(next()?, pages).map_err(wrong)?),
                false => None,
            },
            origin: memory.origin,
            pages,
        };
        self.memories.insert(memory.number, part);
        Ok(())
    }

    pub(super) fn len(&self) -> usize {
        self.memories.len()
    }

    pub(super) fn part(&self, number: u32) -> Option<&LayerPart> {
        self.memories.get(&number)
    }
}

impl LayerPart {
    pub(super) fn find(&self, page: u64) -> Where {
        if self.marks.is_kept(page) {
            Where::Kept
        } else if self.loaded.as_ref().is_none_or(|loaded| loaded.get(page)) {
            Where::Own
        } else {
            Where::Deeper
        }
    }

    /// Reads pages that are all in one of the two files.
    pub(super) fn read(
        &self,
        found: Where,
        first: u64,
        end: u64,
        into: &mut Contents,
    ) -> std::io::Result<()> {
        let file = if found == Where::Kept {
            &self.kept
        } else {
            &self.file
        };
        let data = file.first_data(first, end)?.unwrap_or(end);
        into.zeroes(first, data - first);
        if data < end {
            // Holes among them are read as zeroes, and stay holes.
            file.read(data, into.room(data, end - data))?;
            into.find_zeroes(data, end - data);
        }
        Ok(())
    }

    /// Gives the memory of kept pages back that nobody reads any more.
    pub(super) fn release(&self, first: u64, end: u64) {
        if let Ok(Some(data)) = self.kept.first_data(first, end) {
            // What stays is given back when the snapshot ends.
            let _ = self.kept.punch(data, end - data);
        }
    }
}
