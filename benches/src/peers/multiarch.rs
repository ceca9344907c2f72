//! `page_table_multiarch`: `X64PageTable` and its cursor.
//!
//! Ranges by `map_region`, `protect_region`, `unmap_region`; faults by `map` on *one* cursor for
//! the whole sequence, which spares it the cursor a fault handler would make each time. It flushes
//! nothing outside bare metal. All tables go back when it is dropped.

use memory_addr::{PhysAddr, VirtAddr};
use page_table_multiarch::{MappingFlags, PageSize, PagingHandler, x86_64::X64PageTable};

use super::{PoolOwner, allocate, free};
use crate::table::{HOST_BASE, Mapping, Table};

struct Handler;

impl PagingHandler for Handler {
    #[inline]
    fn alloc_frame() -> Option<PhysAddr> {
        allocate().map(PhysAddr::from)
    }

    fn alloc_frames(num: usize, _align: usize) -> Option<PhysAddr> {
        (num == 1).then(Self::alloc_frame).flatten()
    }

    #[inline]
    fn dealloc_frame(paddr: PhysAddr) {
        free(paddr.as_usize());
    }

    fn dealloc_frames(paddr: PhysAddr, _num: usize) {
        Self::dealloc_frame(paddr);
    }

    #[inline]
    fn phys_to_virt(paddr: PhysAddr) -> VirtAddr {
        VirtAddr::from(paddr.as_usize())
    }
}

/// The peer.
pub(crate) struct Multiarch {
    table: Option<X64PageTable<Handler>>,
    bytes: usize,
    // Last: the table gives its frames back to it.
    _pool: PoolOwner,
}

const WRITABLE: MappingFlags = MappingFlags::READ
    .union(MappingFlags::WRITE)
    .union(MappingFlags::EXECUTE)
    .union(MappingFlags::USER);
const PROTECTED: MappingFlags = WRITABLE.difference(MappingFlags::WRITE);

fn address(frame: u64) -> VirtAddr {
    VirtAddr::from((frame << 12) as usize)
}

fn target(address: VirtAddr) -> PhysAddr {
    PhysAddr::from(address.as_usize() + (HOST_BASE << 12) as usize)
}

impl Multiarch {
    #[inline]
    fn table(&mut self) -> &mut X64PageTable<Handler> {
        self.table.as_mut().expect("renewed after zap_all")
    }
}

impl Table for Multiarch {
    const NAME: &'static str = "page_table_multiarch";

    fn new(pages: u64) -> Self {
        let pool = PoolOwner::new(pages);
        Self {
            table: X64PageTable::try_new().ok(),
            bytes: (pages << 12) as usize,
            _pool: pool,
        }
    }

    fn populate(&mut self, first: u64, pages: u64) {
        let bytes = (pages << 12) as usize;
        self.table()
            .cursor()
            .map_region(address(first), target, bytes, WRITABLE, false)
            .expect("not mapped, and memory for tables");
    }

    fn fault(&mut self, frames: impl Iterator<Item = u64>) -> u64 {
        let mut cursor = self.table().cursor();
        let mut mapped = 0;
        for frame in frames {
            let address = address(frame);
            let result = cursor.map(address, target(address), PageSize::Size4K, WRITABLE);
            mapped += u64::from(result.is_ok());
        }
        mapped
    }

    fn protect(&mut self) {
        let bytes = self.bytes;
        self.table()
            .cursor()
            .protect_region(address(0), bytes, PROTECTED)
            .expect("mapped");
    }

    fn unprotect(&mut self) {
        let bytes = self.bytes;
        self.table()
            .cursor()
            .protect_region(address(0), bytes, WRITABLE)
            .expect("mapped");
    }

    fn unmap(&mut self) {
        let bytes = self.bytes;
        self.table()
            .cursor()
            .unmap_region(address(0), bytes)
            .expect("mapped");
    }

    fn zap_all(&mut self) {
        self.table = None;
    }

    fn renew(&mut self) {
        self.table = X64PageTable::try_new().ok();
    }

    fn translate(&self, frames: impl Iterator<Item = u64>) -> u64 {
        let Some(table) = &self.table else { return 0 };
        let mut sum = 0;
        for frame in frames {
            if let Ok((pfn, _, _)) = table.query(address(frame)) {
                sum += pfn.as_usize() as u64 >> 12;
            }
        }
        sum
    }

    fn mapping(&self, frame: u64) -> Option<Mapping> {
        let (address, flags, _) = self.table.as_ref()?.query(address(frame)).ok()?;
        Some(Mapping {
            pfn: address.as_usize() as u64 >> 12,
            writable: flags.contains(MappingFlags::WRITE),
        })
    }
}
