//! What a page table is asked to do here. Slat and each peer answer in their own fastest way.
//!
//! Guest frame `g` maps to host frame `HOST_BASE + g`, 4 KiB each, readable, writable and
//! executable.

/// Host frame behind guest frame 0. The guest's memory is never touched, only mapped.
pub(crate) const HOST_BASE: u64 = 1 << 20;

/// What a frame leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mapping {
    /// Host frame.
    pub(crate) pfn: u64,
    /// The guest may write.
    pub(crate) writable: bool,
}

/// A page table over `pages` 4 KiB pages with memory for all its tables, touched before.
pub(crate) trait Table: Sized {
    /// The name in reports.
    const NAME: &'static str;

    /// An empty table.
    fn new(pages: u64) -> Self;

    /// Maps a range that is not mapped.
    fn populate(&mut self, first: u64, pages: u64);

    /// Maps page by page; how many were mapped.
    fn fault(&mut self, frames: impl Iterator<Item = u64>) -> u64;

    /// Maps in batches of `batch` neighbours, each a call of its own.
    fn fault_batches(&mut self, pages: u64, batch: u64) {
        for first in (0..pages).step_by(batch as usize) {
            self.populate(first, batch);
        }
    }

    /// Takes the right to write from all pages.
    fn protect(&mut self);

    /// Makes all pages writable again.
    fn unprotect(&mut self);

    /// Unmaps everything, by range.
    fn unmap(&mut self);

    /// Gives back all tables at once, mapped or not. The table is empty and usable after
    /// [`Self::renew`].
    fn zap_all(&mut self);

    /// An empty table again, after [`zap_all`](Self::zap_all).
    fn renew(&mut self);

    /// Looks frames up; the sum of their host frames.
    fn translate(&self, frames: impl Iterator<Item = u64>) -> u64;

    /// Looks one frame up, to check what was done.
    fn mapping(&self, frame: u64) -> Option<Mapping>;
}
