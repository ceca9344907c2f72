//! What a snapshot asks of a memory: that no page of it is written to before it was kept.
//!
//! A page is *guarded* as long as it is neither in the kept file nor taken by the reader. No
//! guarded page is writable for the guest. So keeping may copy it from the memory file at any time,
//! under the lock of the page's stripe, so that two threads do not keep it, one before and one
//! after the guest's first write.

use std::{ops::Range, os::fd::OwnedFd, sync::Arc};

use slat_paging::{PAGE, bits::Marks};

use crate::{
    error::{PagerError, Trouble},
    memory::{Memory, stripes},
    page_file::{PageFile, is_zero},
    stats::Stats,
};

/// One memory's part of a snapshot.
#[derive(Debug)]
pub(crate) struct Guard {
    pub(crate) snapshot: u64,
    kept: PageFile,
    marks: Marks,
}

impl Guard {
    /// With the descriptors of the message.
    pub(crate) fn new(snapshot: u64, pages: u64, fds: Vec<OwnedFd>) -> Result<Self, PagerError> {
        let wrong = |what: String| PagerError::Protocol(format!("snapshot {snapshot}: {what}"));
        let Ok([kept, marks]) = <[OwnedFd; 2]>::try_from(fds) else {
            return Err(wrong("not two descriptors".to_owned()));
        };
        let kept = PageFile::new(kept, 0, pages);
        let marks = Marks::open(marks, pages);
        Ok(Self {
            snapshot,
            kept: kept.map_err(|error| wrong(format!("the kept file: {error}")))?,
            marks: marks.map_err(|error| wrong(format!("the marks: {error}")))?,
        })
    }

    pub(crate) fn guards(&self, page: u64) -> bool {
        !self.marks.is_kept(page) && !self.marks.is_taken(page)
    }
}

/// Whether any of the snapshots needs the page as it is.
pub(crate) fn is_guarded(guards: &[Arc<Guard>], page: u64) -> bool {
    guards.iter().any(|guard| guard.guards(page))
}

/// Keeps what is guarded of a range that is there, for each snapshot.
pub(crate) fn keep(
    memory: &Memory,
    guards: &[Arc<Guard>],
    range: Range<u64>,
    stats: &Stats,
) -> Result<(), Trouble> {
    if guards.is_empty() {
        return Ok(());
    }
    stripes(range).try_for_each(|part| {
        let _stripe = memory.stripe(part.start);
        keep_part(memory, guards, part, stats)
    })
}

/// As [`keep`], of pages of one stripe, under its lock.
pub(crate) fn keep_part(
    memory: &Memory,
    guards: &[Arc<Guard>],
    part: Range<u64>,
    stats: &Stats,
) -> Result<(), Trouble> {
    let mut page = [0; PAGE];
    for at in part {
        if !is_guarded(guards, at) {
            continue;
        }
        debug_assert!(memory.is_there(at), "page {at} is kept before it is there");
        let read = memory.file.read(at, &mut page);
        read.map_err(|error| Trouble::memory("reading guest memory", &error))?;
        let zero = is_zero(&page);
        for guard in guards.iter().filter(|guard| guard.guards(at)) {
            // A hole is a page of zeroes.
            if !zero {
                let written = guard.kept.write(at, &page);
                written.map_err(|error| Trouble::memory("keeping a page", &error))?;
            }
            guard.marks.set_kept(at);
            stats
                .kept
                .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
    }
    Ok(())
}
