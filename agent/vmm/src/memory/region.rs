//! The memory of one slot: a backing and its two views.

use std::{io, ops::Range, sync::Arc};

use rustix::mm::Advice;
use slat_proto::model::{MemoryBacking, PAGE_SIZE};

use super::{
    backing::Backing,
    file::MemoryFile,
    huge::{BLOCK, BLOCK_BYTES, Blocks, Cost},
    made_of::MadeOf,
    mode::Mode,
    origin::Origin,
    scan,
    view::{GuestView, HostView},
};

/// Both views of one backing. A clone is the same memory.
#[derive(Clone, Debug)]
pub(crate) struct Region {
    backing: Arc<Backing>,
    guest: Arc<GuestView>,
    host: Arc<HostView>,
    blocks: Arc<Blocks>,
    mode: Mode,
    origin: Option<Arc<Origin>>,
}

impl Region {
    /// `pages` pages of zeroes, not yet populated; reserved, where the mode says so. `name` shows
    /// in /proc.
    ///
    /// # Errors
    /// When the kernel refuses the backing or a mapping of it; ENOMEM when there are too few pages
    /// to reserve.
    pub(crate) fn with(name: &str, pages: u64, mode: Mode) -> io::Result<Self> {
        let backing = Arc::new(Backing::new(name, pages, mode.backing)?);
        let region = Self {
            guest: Arc::new(GuestView::new(&backing)?),
            host: Arc::new(HostView::new(&backing)?),
            blocks: Arc::new(Blocks::new(pages)),
            backing,
            mode,
            origin: None,
        };
        if let Some(node) = mode.node {
            // The policy is the file's.
            region.guest.bind(node)?;
        }
        let hint = match mode.backing {
            MemoryBacking::Thp => Advice::LinuxHugepage,
            MemoryBacking::Small => Advice::LinuxNoHugepage,
            MemoryBacking::Auto | MemoryBacking::Hugetlb2M | MemoryBacking::Hugetlb1G => {
                return Ok(region);
            }
        };
        region.guest.hint(hint)?;
        region.host.hint(hint)?;
        Ok(region)
    }

    /// Several, small ones, each a part of one file; in mode `auto` without a NUMA node.
    ///
    /// # Errors
    /// When the kernel refuses the file or a mapping of it.
    pub(super) fn together(name: &str, pages: &[u64]) -> io::Result<Vec<Self>> {
        let parts = Backing::parts(name, pages)?;
        let parts: Vec<Arc<Backing>> = parts.into_iter().map(Arc::new).collect();
        let guests = GuestView::of_parts(&parts)?;
        let region = |(backing, guest): (Arc<Backing>, GuestView)| {
            Ok(Self {
                guest: Arc::new(guest),
                host: Arc::new(HostView::new(&backing)?),
                blocks: Arc::new(Blocks::new(backing.len() as u64 / PAGE_SIZE)),
                backing,
                mode: Mode::default(),
                origin: None,
            })
        };
        parts.into_iter().zip(guests).map(region).collect()
    }

    /// Its pages come from elsewhere.
    pub(super) fn come_from(&mut self, origin: Origin) {
        self.origin = Some(Arc::new(origin));
    }

    /// Where its pages come from, when they came from elsewhere.
    pub(super) fn origin(&self) -> Option<&Arc<Origin>> {
        self.origin.as_ref()
    }

    /// The file that it is in.
    pub(super) fn file(&self) -> MemoryFile {
        MemoryFile::new(&self.backing)
    }

    /// The same in the usual mode.
    #[cfg(test)]
    pub(crate) fn new(name: &str, pages: u64) -> io::Result<Self> {
        Self::with(name, pages, Mode::default())
    }

    /// See [`SlotMemory::populate`](super::SlotMemory::populate).
    pub(super) fn populate(&self, page: u64, pages: u64) -> io::Result<()> {
        if self.guest.is_watched() {
            return self.populate_unseen(page, pages);
        }
        if self.mode.backing != MemoryBacking::Auto {
            return self.populate_by_touch(page, pages);
        }
        let (mut at, end) = (page, page + pages);
        while at < end {
            let block = at / BLOCK;
            let blocks = block..end / BLOCK;
            let whole = at.is_multiple_of(BLOCK) && !blocks.is_empty();
            if whole && self.blocks.has(block) {
                self.map(at, BLOCK)?;
                at += BLOCK;
                continue;
            }
            let run = if whole { self.blocks.choose(blocks) } else { 0 };
            if run > 0 {
                self.populate_huge(block..block + run)?;
                at += run * BLOCK;
                continue;
            }
            let next = ((block + 1) * BLOCK).min(end);
            let cost = Cost::begin();
            self.populate_small(at, next - at)?;
            if whole {
                self.blocks.small_cost(cost.of_each(1));
            }
            at = next;
        }
        Ok(())
    }

    /// See [`SlotMemory::has_page`](super::SlotMemory::has_page).
    pub(super) fn has_page(&self, page: u64) -> bool {
        self.backing.has_data(page * PAGE_SIZE, PAGE_SIZE)
    }

    /// Without a touch of the guest's view.
    fn populate_unseen(&self, page: u64, pages: u64) -> io::Result<()> {
        self.backing.allocate(page * PAGE_SIZE, pages * PAGE_SIZE)?;
        self.host.populate(page, pages)
    }

    /// Blocks as one page each, or as small pages where the kernel has none.
    fn populate_huge(&self, blocks: Range<u64>) -> io::Result<()> {
        let count = blocks.end - blocks.start;
        let (first, pages) = (blocks.start * BLOCK, count * BLOCK);
        let cost = Cost::begin();
        // An empty block cannot become one page.
        for block in blocks.clone() {
            self.guest.populate(block * BLOCK, 1)?;
        }
        match self.guest.collapse(blocks.clone()) {
            Ok(()) => {
                self.blocks.made(blocks, cost.of_each(count));
                self.host.map(first, pages)
            }
            Err(error) if count == 1 => {
                let cost = cost.of_each(1);
                self.blocks.not_made(blocks.start, cost, errno(&error));
                self.populate_small(first, pages)
            }
            // Some of them; each by itself says whether it is one.
            Err(_) => {
                for block in blocks {
                    self.populate_huge(block..block + 1)?;
                }
                Ok(())
            }
        }
    }

    fn map(&self, page: u64, pages: u64) -> io::Result<()> {
        self.guest.map(page, pages)?;
        self.host.map(page, pages)
    }

    /// Whatever pages a touch brings in this mode.
    fn populate_by_touch(&self, page: u64, pages: u64) -> io::Result<()> {
        self.guest.populate(page, pages)?;
        self.host.map(page, pages)?;
        for block in page / BLOCK..(page + pages).div_ceil(BLOCK) {
            self.look(block);
        }
        Ok(())
    }

    /// Pages that the guest's pager is about to give back: their blocks stay in small pages.
    pub(super) fn keep_small(&self, page: u64, pages: u64) {
        for block in page / BLOCK..(page + pages).div_ceil(BLOCK) {
            self.blocks.keep_small(block);
        }
    }

    /// Goes on with a block that is there in part: makes it one page in mode `auto`, sees whether
    /// it is one in mode `thp`.
    pub(super) fn tidy(&self, block: u64) {
        if self.guest.is_watched() {
            return;
        }
        match self.mode.backing {
            MemoryBacking::Auto => self.collapse(block),
            MemoryBacking::Thp => self.look(block),
            MemoryBacking::Hugetlb2M | MemoryBacking::Hugetlb1G | MemoryBacking::Small => {}
        }
    }

    /// Makes one page of a block that is there in part, if it is not one yet and the kernel has
    /// one.
    fn collapse(&self, block: u64) {
        let first = block * BLOCK;
        if self.blocks.has(block) || self.blocks.stays_small(block) {
            return;
        }
        if !self.backing.has_data(first * PAGE_SIZE, BLOCK_BYTES) {
            return;
        }
        match self.guest.collapse(block..block + 1) {
            Ok(()) => {
                self.blocks.set(block);
                // Our view lost its translations; a fault would bring them as well.
                drop(self.host.map(first, BLOCK));
            }
            Err(error) => self.blocks.refuse(block, errno(&error)),
        }
    }

    /// Remembers whether the kernel maps a block by one page.
    fn look(&self, block: u64) {
        let whole = (block + 1) * BLOCK_BYTES <= self.backing.len() as u64;
        if self.mode.backing != MemoryBacking::Thp || !whole {
            return;
        }
        let start = self.guest.address() + block * BLOCK_BYTES;
        match scan::is_huge(start, BLOCK_BYTES) {
            Some(true) => self.blocks.set(block),
            Some(false) | None => self.blocks.unset(block),
        }
    }

    pub(super) fn mode(&self) -> Mode {
        self.mode
    }

    /// See [`SlotMemory::discard`](super::SlotMemory::discard).
    pub(super) fn discard(&self, page: u64, pages: u64) -> io::Result<()> {
        if self.mode.backing.reserved_page().is_some() {
            self.host.clear(page, pages);
            return Ok(());
        }
        // First: a block that is half gone is not to be made whole again.
        self.keep_small(page, pages);
        self.backing.punch(page * PAGE_SIZE, pages * PAGE_SIZE)
    }

    /// Bytes of the host's memory that it takes now.
    pub(super) fn allocated(&self) -> io::Result<u64> {
        self.backing.allocated()
    }

    /// Pages that it is made of now.
    pub(super) fn made_of(&self) -> MadeOf {
        let all = self.allocated().ok();
        let short = self.blocks.short();
        match self.mode.backing {
            MemoryBacking::Small => MadeOf::of(all, Some(0), Some(0), short),
            MemoryBacking::Hugetlb2M => MadeOf::of(Some(0), all, Some(0), short),
            MemoryBacking::Hugetlb1G => MadeOf::of(Some(0), Some(0), all, short),
            MemoryBacking::Auto => self.made_of_blocks(all),
            MemoryBacking::Thp if scan::is_said() => self.made_of_blocks(all),
            MemoryBacking::Thp => MadeOf::of(None, None, Some(0), short),
        }
    }

    fn made_of_blocks(&self, all: Option<u64>) -> MadeOf {
        let huge = self.blocks.bytes();
        // The two are not read at one moment.
        let small = all.map(|all| all.saturating_sub(huge));
        MadeOf::of(small, Some(huge), Some(0), self.blocks.short())
    }

    /// The mapping that it shares with others.
    #[cfg(test)]
    pub(super) fn backing_span(&self) -> Option<&Arc<super::span::Span>> {
        self.backing.span()
    }

    /// The file that it shares with others.
    #[cfg(test)]
    pub(super) fn whole_file(&self) -> Backing {
        self.backing.whole()
    }

    /// Bytes in 2 MiB pages, as far as is known.
    #[cfg(test)]
    pub(super) fn huge_bytes(&self) -> u64 {
        self.made_of().huge.unwrap_or(0)
    }

    fn populate_small(&self, page: u64, pages: u64) -> io::Result<()> {
        if self.backing.allocate(page * PAGE_SIZE, pages * PAGE_SIZE)? {
            self.guest.map(page, pages)?;
        } else {
            self.guest.populate(page, pages)?;
        }
        self.host.map(page, pages)
    }

    /// What the guest's slot maps.
    #[must_use]
    pub(crate) fn guest(&self) -> &Arc<GuestView> {
        &self.guest
    }

    /// What our own threads use.
    #[must_use]
    pub(crate) fn host(&self) -> &HostView {
        &self.host
    }
}

fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}
