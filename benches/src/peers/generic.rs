//! `page-table-generic`: `PageTable` over x86-64's four levels, whose entry format the crate leaves
//! to its user.
//!
//! The format here is as thin as can be: flags are the bits themselves. Ranges by `map`,
//! `protect_region` and `unmap_with_config`; faults by `map` of one page, which is what `map_page`
//! calls; `flush: false` where it can be chosen and an empty `flush` where not. All tables go back
//! when it is dropped.

use page_table_generic::{
    FrameAllocator, MapConfig, PageTable, PageTableEntry, PhysAddr, TableMeta, UnmapConfig,
    VirtAddr,
};

use super::{PoolOwner, allocate, free};
use crate::table::{HOST_BASE, Mapping, Table};

const PRESENT: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const HUGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
struct BareEntry(u64);

impl PageTableEntry for BareEntry {
    type PteConfig = u64;

    #[inline]
    fn new_page(paddr: PhysAddr, config: u64, is_huge: bool) -> Self {
        let huge = if is_huge { HUGE } else { 0 };
        Self(paddr.as_usize() as u64 & ADDRESS | config | huge)
    }

    #[inline]
    fn new_table(paddr: PhysAddr) -> Self {
        Self(paddr.as_usize() as u64 & ADDRESS | PRESENT | WRITE | USER)
    }

    #[inline]
    fn paddr(&self, _is_dir: bool) -> PhysAddr {
        PhysAddr::from_usize((self.0 & ADDRESS) as usize)
    }

    #[inline]
    fn config(&self, _is_dir: bool) -> u64 {
        self.0 & !(ADDRESS | HUGE)
    }

    #[inline]
    fn present(&self) -> bool {
        self.0 & PRESENT != 0
    }

    #[inline]
    fn huge(&self, is_dir: bool) -> bool {
        is_dir && self.0 & HUGE != 0
    }

    #[inline]
    fn unused(&self) -> bool {
        self.0 == 0
    }

    #[inline]
    fn clear(&mut self) {
        self.0 = 0;
    }
}

#[derive(Clone, Copy)]
struct FourLevels;

impl TableMeta for FourLevels {
    type P = BareEntry;
    const PAGE_SIZE: usize = 4096;
    const LEVEL_BITS: &[usize] = &[9, 9, 9, 9];
    const MAX_BLOCK_LEVEL: usize = 3;

    #[inline]
    fn flush(_vaddr: Option<VirtAddr>) {}
}

#[derive(Clone, Copy)]
struct Frames;

impl FrameAllocator for Frames {
    #[inline]
    fn alloc_frame(&self) -> Option<PhysAddr> {
        allocate().map(PhysAddr::from_usize)
    }

    #[inline]
    fn dealloc_frame(&self, frame: PhysAddr) {
        free(frame.as_usize());
    }

    #[inline]
    fn phys_to_virt(&self, paddr: PhysAddr) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(paddr.as_usize())
    }
}

/// The peer.
pub(crate) struct Generic {
    table: Option<PageTable<FourLevels, Frames>>,
    bytes: usize,
    // Last: the table gives its frames back to it.
    _pool: PoolOwner,
}

const WRITABLE: u64 = PRESENT | WRITE | USER;
const PROTECTED: u64 = PRESENT | USER;

fn address(frame: u64) -> VirtAddr {
    VirtAddr::from_usize((frame << 12) as usize)
}

fn request(first: u64, pages: u64) -> MapConfig<u64> {
    MapConfig {
        vaddr: address(first),
        paddr: PhysAddr::from_usize(((HOST_BASE + first) << 12) as usize),
        size: (pages << 12) as usize,
        pte: WRITABLE,
        allow_huge: false,
        flush: false,
    }
}

impl Generic {
    #[inline]
    fn table(&mut self) -> &mut PageTable<FourLevels, Frames> {
        self.table.as_mut().expect("renewed after zap_all")
    }
}

impl Table for Generic {
    const NAME: &'static str = "page-table-generic";

    fn new(pages: u64) -> Self {
        let pool = PoolOwner::new(pages);
        Self {
            table: PageTable::new(Frames).ok(),
            bytes: (pages << 12) as usize,
            _pool: pool,
        }
    }

    fn populate(&mut self, first: u64, pages: u64) {
        self.table()
            .map(&request(first, pages))
            .expect("not mapped, and memory for tables");
    }

    fn fault(&mut self, frames: impl Iterator<Item = u64>) -> u64 {
        let table = self.table();
        let mut mapped = 0;
        for frame in frames {
            mapped += u64::from(table.map(&request(frame, 1)).is_ok());
        }
        mapped
    }

    fn protect(&mut self) {
        let bytes = self.bytes;
        self.table()
            .protect_region(address(0), bytes, PROTECTED)
            .expect("mapped");
    }

    fn unprotect(&mut self) {
        let bytes = self.bytes;
        self.table()
            .protect_region(address(0), bytes, WRITABLE)
            .expect("mapped");
    }

    fn unmap(&mut self) {
        let size = self.bytes;
        self.table()
            .unmap_with_config(&UnmapConfig {
                start_vaddr: address(0),
                size,
                flush: false,
            })
            .expect("in range");
    }

    fn zap_all(&mut self) {
        self.table = None;
    }

    fn renew(&mut self) {
        self.table = PageTable::new(Frames).ok();
    }

    fn translate(&self, frames: impl Iterator<Item = u64>) -> u64 {
        let Some(table) = &self.table else { return 0 };
        let mut sum = 0;
        for frame in frames {
            if let Ok((pfn, _)) = table.translate(address(frame)) {
                sum += pfn.as_usize() as u64 >> 12;
            }
        }
        sum
    }

    fn mapping(&self, frame: u64) -> Option<Mapping> {
        let (address, flags, _) = self.table.as_ref()?.query(address(frame)).ok()?;
        Some(Mapping {
            pfn: address.as_usize() as u64 >> 12,
            writable: flags & WRITE != 0,
        })
    }
}
