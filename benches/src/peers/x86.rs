//! `x86_64`: `OffsetPageTable` with offset 0.
//!
//! It has no range operations, so a range is a loop of `map_to_with_table_flags`, `update_flags`
//! and `unmap`, each with `flush().ignore()`; pages and frames are built without checks. It cannot
//! give back all tables at once (`clean_up` frees empty tables only), so it has no part in that
//! row. To start anew, its tables are forgotten and its pool refilled.

use x86_64::{
    PhysAddr, VirtAddr,
    structures::paging::{
        FrameAllocator, Mapper, OffsetPageTable, Page, PageTable, PageTableFlags, PhysFrame,
        Size4KiB, Translate, mapper::TranslateResult,
    },
};

use super::{PoolOwner, allocate, refill};
use crate::table::{HOST_BASE, Mapping, Table};

struct Frames;

// SAFETY: the pool hands out each frame once until it is freed.
unsafe impl FrameAllocator<Size4KiB> for Frames {
    #[inline]
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        let address = allocate()?;
        // SAFETY: frames are aligned to 4 KiB, and a user-space address has no bits above 47.
        Some(unsafe {
            PhysFrame::from_start_address_unchecked(PhysAddr::new_unsafe(address as u64))
        })
    }
}

/// The peer.
pub(crate) struct X86 {
    table: OffsetPageTable<'static>,
    pages: u64,
    // Last: it holds the tables.
    _pool: PoolOwner,
}

const TABLE: PageTableFlags = PageTableFlags::PRESENT
    .union(PageTableFlags::WRITABLE)
    .union(PageTableFlags::USER_ACCESSIBLE);
const WRITABLE: PageTableFlags = TABLE;
const PROTECTED: PageTableFlags = TABLE.difference(PageTableFlags::WRITABLE);

#[inline]
fn page(frame: u64) -> Page<Size4KiB> {
    // SAFETY: aligned, and below 2^47.
    unsafe { Page::from_start_address_unchecked(VirtAddr::new_unsafe(frame << 12)) }
}

#[inline]
fn target(frame: u64) -> PhysFrame<Size4KiB> {
    // SAFETY: aligned, and below 2^52.
    unsafe {
        PhysFrame::from_start_address_unchecked(PhysAddr::new_unsafe((HOST_BASE + frame) << 12))
    }
}

fn empty() -> OffsetPageTable<'static> {
    let root = allocate().expect("memory for the root");
    let root: *mut PageTable = std::ptr::with_exposed_provenance_mut(root);
    // SAFETY: a frame of our own, aligned to its size, which outlives the table (field order); it
    // is made an empty table first. Offset 0 is right because the pool's physical addresses are
    // virtual ones.
    unsafe {
        root.write(PageTable::new());
        OffsetPageTable::new(&mut *root, VirtAddr::zero())
    }
}

impl X86 {
    #[inline]
    fn map(&mut self, frame: u64) -> bool {
        // SAFETY: nothing runs on this table; the frames mapped are never touched.
        let result = unsafe {
            self.table.map_to_with_table_flags(
                page(frame),
                target(frame),
                WRITABLE,
                TABLE,
                &mut Frames,
            )
        };
        match result {
            Ok(flush) => {
                flush.ignore();
                true
            }
            Err(_) => false,
        }
    }

    fn update(&mut self, flags: PageTableFlags) {
        for frame in 0..self.pages {
            // SAFETY: nothing runs on this table.
            let result = unsafe { self.table.update_flags(page(frame), flags) };
            result.expect("mapped").ignore();
        }
    }
}

impl Table for X86 {
    const NAME: &'static str = "x86_64";

    fn new(pages: u64) -> Self {
        let pool = PoolOwner::new(pages);
        Self {
            table: empty(),
            pages,
            _pool: pool,
        }
    }

    fn populate(&mut self, first: u64, pages: u64) {
        for frame in first..first + pages {
            assert!(self.map(frame), "not mapped, and memory for tables");
        }
    }

    fn fault(&mut self, frames: impl Iterator<Item = u64>) -> u64 {
        let mut mapped = 0;
        for frame in frames {
            mapped += u64::from(self.map(frame));
        }
        mapped
    }

    fn protect(&mut self) {
        self.update(PROTECTED);
    }

    fn unprotect(&mut self) {
        self.update(WRITABLE);
    }

    fn unmap(&mut self) {
        for frame in 0..self.pages {
            let (_, flush) = self.table.unmap(page(frame)).expect("mapped");
            flush.ignore();
        }
    }

    fn zap_all(&mut self) {
        refill();
        self.table = empty();
    }

    fn renew(&mut self) {}

    fn translate(&self, frames: impl Iterator<Item = u64>) -> u64 {
        let mut sum = 0;
        for frame in frames {
            if let Some(address) = self.table.translate_addr(page(frame).start_address()) {
                sum += address.as_u64() >> 12;
            }
        }
        sum
    }

    fn mapping(&self, frame: u64) -> Option<Mapping> {
        match self.table.translate(page(frame).start_address()) {
            TranslateResult::Mapped {
                frame,
                offset,
                flags,
            } => Some(Mapping {
                pfn: (frame.start_address().as_u64() + offset) >> 12,
                writable: flags.contains(PageTableFlags::WRITABLE),
            }),
            _ => None,
        }
    }
}
