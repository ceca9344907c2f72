//! A memory of the guest: its file, and which of its pages have been brought from the source.
//!
//! # What a page is
//! A page *is there* when its bit in the loaded bitmap is set, or when the memory has no source.
//! A page that is there has its contents in the file; if it is not in the file it is zeroes. Bits
//! are never cleared, so what is there stays there.
//!
//! # Locking
//! Pages are brought, kept and discarded under the lock of their *stripe*: 16 neighbours, beginning
//! at a multiple of 16, share one, and far groups share it by chance. It is held for copies from
//! memory to memory, never while a source is read or the guest is asked for anything, and it is the
//! last lock that anybody takes.

use std::{
    ops::Range,
    os::fd::OwnedFd,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
};

use slat_paging::{PAGE, bits::SharedBits, wire};

use crate::{
    aged::Aged,
    error::{PagerError, Trouble},
    page_file::PageFile,
    source::Contents,
    sync::lock,
    window::Windows,
};

/// Neighbours under one lock.
pub(crate) const STRIPE: u64 = 16;
const STRIPES: usize = 64;

/// See the module.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) id: u32,
    pub(crate) slot: u32,
    pub(crate) pages: u64,
    pub(crate) read_only: bool,
    /// The first frame that stands for it in the mirror.
    pub(crate) pfn: u64,
    /// Its number in the source, if it has one.
    pub(crate) origin: Option<u32>,
    pub(crate) file: PageFile,
    loaded: Option<SharedBits>,
    /// How many bits are set.
    brought: AtomicU64,
    stripes: [Mutex<()>; STRIPES],
    /// Of faults of pages that are not mapped.
    pub(crate) windows: Windows,
    /// Of faults of pages that are protected.
    pub(crate) written: Windows,
    pub(crate) aged: Aged,
}

impl Memory {
    /// What the message says, with its descriptors.
    pub(crate) fn new(
        message: &wire::Memory,
        fds: Vec<OwnedFd>,
        pfn: u64,
    ) -> Result<Self, PagerError> {
        let wrong = |what: &str| {
            let memory = message.memory;
            PagerError::Protocol(format!("memory {memory}: {what}"))
        };
        let mut fds = fds.into_iter();
        let file = fds.next().ok_or_else(|| wrong("no file"))?;
        let file = PageFile::new(file, message.file_start, message.pages)
            .map_err(|error| wrong(&format!("its file: {error}")))?;
        let bits = match message.has_loaded {
            true => Some(fds.next().ok_or_else(|| wrong("no bitmap"))?),
            false => None,
        };
        let bits = bits
            .map(|fd| SharedBits::open(fd, message.pages))
            .transpose();
        let bits = bits.map_err(|error| wrong(&format!("its bitmap: {error}")))?;
        if message.origin.is_some() && bits.is_none() {
            return Err(wrong("a source, and no bitmap of what was brought"));
        }
        if message.pages == 0 {
            return Err(wrong("no pages"));
        }
        // Without a source there is nothing to bring.
        let loaded = bits.filter(|_| message.origin.is_some());
        Ok(Self {
            id: message.memory,
            slot: message.slot,
            pages: message.pages,
            read_only: message.read_only,
            pfn,
            origin: message.origin,
            file,
            brought: AtomicU64::new(loaded.as_ref().map_or(0, SharedBits::count)),
            loaded,
            stripes: [const { Mutex::new(()) }; STRIPES],
            windows: Windows::default(),
            written: Windows::default(),
            aged: Aged::default(),
        })
    }

    pub(crate) fn is_there(&self, page: u64) -> bool {
        self.loaded.as_ref().is_none_or(|loaded| loaded.get(page))
    }

    /// The first page of the range that is not there, or its end.
    pub(crate) fn there_until(&self, range: Range<u64>) -> u64 {
        match &self.loaded {
            None => range.end,
            Some(loaded) => loaded.next_clear(range.start).min(range.end),
        }
    }

    /// How many pages of a range are there, about now.
    pub(crate) fn there_in(&self, range: Range<u64>) -> u64 {
        match &self.loaded {
            None => range.end - range.start,
            Some(loaded) => loaded.count_in(range),
        }
    }

    /// Pages that are there of those that have to be brought, and how many that are.
    pub(crate) fn progress(&self) -> (u64, u64) {
        match self.loaded {
            None => (0, 0),
            Some(_) => (self.brought.load(Ordering::Acquire), self.pages),
        }
    }

    pub(crate) fn is_loaded(&self) -> bool {
        let (loaded, all) = self.progress();
        loaded == all
    }

    /// The lock of a page's stripe.
    pub(crate) fn stripe(&self, page: u64) -> MutexGuard<'_, ()> {
        lock(&self.stripes[(page / STRIPE) as usize % STRIPES])
    }

    /// Says that pages are there. Under their stripe's lock.
    pub(crate) fn set_there(&self, pages: Range<u64>) {
        if let Some(loaded) = &self.loaded {
            let new = pages.filter(|page| loaded.set(*page)).count();
            self.brought.fetch_add(new as u64, Ordering::AcqRel);
        }
    }

    /// Puts what was read of the source where it belongs. Pages that are there meanwhile keep what
    /// they have: the guest may have written to them.
    pub(crate) fn store(&self, contents: &Contents) -> Result<(), Trouble> {
        for (first, count, bytes) in contents.runs() {
            for part in stripes(first..first + count) {
                let _stripe = self.stripe(part.start);
                let bytes = bytes.map(|bytes| {
                    let at = |page: u64| (page - first) as usize * PAGE;
                    &bytes[at(part.start)..at(part.end)]
                });
                self.store_part(part, bytes)?;
            }
        }
        Ok(())
    }

    fn store_part(&self, part: Range<u64>, bytes: Option<&[u8]>) -> Result<(), Trouble> {
        let Some(bytes) = bytes else {
            // A page that is not in the file is zeroes.
            self.set_there(part);
            return Ok(());
        };
        let mut page = part.start;
        while page < part.end {
            if self.is_there(page) {
                page += 1;
                continue;
            }
            let run = (page + 1..part.end).find(|next| self.is_there(*next));
            let run = page..run.unwrap_or(part.end);
            let at = |page: u64| (page - part.start) as usize * PAGE;
            let written = self
                .file
                .write(run.start, &bytes[at(run.start)..at(run.end)]);
            written.map_err(|error| Trouble::memory("writing guest memory", &error))?;
            page = run.end;
            self.set_there(run);
        }
        Ok(())
    }
}

/// The parts of a range that share a lock.
pub(crate) fn stripes(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        (at < range.end).then(|| {
            let start = at;
            at = ((start / STRIPE + 1) * STRIPE).min(range.end);
            start..at
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_cut_where_locks_change() {
        let parts: Vec<_> = stripes(5..33).collect();
        assert_eq!(parts, [5..16, 16..32, 32..33]);
        assert_eq!(stripes(7..7).count(), 0);
    }
}
