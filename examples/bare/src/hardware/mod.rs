//! The page-table walker of a processor, written from the manuals alone: it does not ask
//! `slat-arch` what an entry means. What the MMU builds is right when this walker agrees.
//!
//! All four architectures walk alike: from a register to the root, down by index, to an entry that
//! maps memory. What differs is in [`Manual`]: the register, the size of the root, and how one
//! entry reads.
//!
//! On a real machine this folder does not exist.

mod arm64;
mod ept;
mod npt;
mod riscv;

use core::sync::atomic::Ordering;

use slat_mmu::{Access, Format, Gfn, Pfn};

use crate::frames::Frames;

/// Index bits below the root and bits of an address within a page.
const INDEX_BITS: u32 = 9;
const PAGE_BITS: u32 = 12;

/// What the manual of a format says. Levels count from 0, where entries map 4 KiB.
pub(crate) trait Manual: Format {
    /// Levels of tables.
    const LEVELS: u32;
    /// Index bits of the root.
    const ROOT_BITS: u32 = INDEX_BITS;
    /// Whether the processor sets Accessed and Dirty, or faults where they are clear.
    const SETS_BITS: bool;
    /// Whether the processor logs the address when it sets Dirty.
    const LOGS_WRITES: bool = false;
    /// Whether the processor may remember that an entry mapped nothing.
    const REMEMBERS_ABSENCE: bool = false;

    /// What the hypervisor loads before it enters the guest, as `slat-arch` computes it.
    fn register(root: Pfn) -> u64;

    /// The physical address of the root that the processor finds in the register; `None` if the
    /// register selects another format.
    fn root(register: u64) -> Option<u64>;

    /// Reads one entry of a table at `level`.
    fn read(raw: u64, level: u32) -> Seen;
}

/// How a processor reads an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    /// Nothing is mapped.
    Absent,
    /// A combination that the manual forbids.
    Reserved,
    /// Something is mapped, or another table is pointed to.
    Present(Present),
}

/// A valid entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Present {
    /// Physical address of the next table, or of the memory.
    pub(crate) address: u64,
    /// It maps memory.
    pub(crate) leaf: bool,
    /// It allows loads.
    pub(crate) read: bool,
    /// It allows stores.
    pub(crate) write: bool,
    /// It allows instruction fetches.
    pub(crate) execute: bool,
    /// The bit that must be set for any use; 0 if there is none.
    pub(crate) accessed: u64,
    /// The bit that must be set for stores; 0 if there is none.
    pub(crate) dirty: u64,
}

/// What a walk found: a mapping of `pages` frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// Frame of the mapping's first byte.
    pub(crate) first: Pfn,
    /// Frame of exactly the guest frame asked for.
    pub(crate) pfn: Pfn,
    /// Length in frames.
    pub(crate) pages: u64,
    /// Loads are allowed.
    pub(crate) read: bool,
    /// Stores are allowed.
    pub(crate) write: bool,
    /// Instruction fetches are allowed.
    pub(crate) execute: bool,
    /// A store needs no further walk: Dirty is set, or the processor has no such bit.
    pub(crate) dirty: bool,
    /// This walk set Dirty.
    pub(crate) dirtied: bool,
}

impl Found {
    /// Whether a cached copy of this serves the access.
    pub(crate) fn allows(&self, access: Access) -> bool {
        match access {
            Access::Read => self.read,
            Access::Write => self.write && self.dirty,
            Access::Execute => self.execute,
        }
    }
}

/// Why the processor left the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trap {
    /// Nothing is mapped.
    NotPresent {
        /// Frames that the entry covers which says so.
        pages: u64,
    },
    /// What is mapped does not allow the access.
    Permission,
    /// Accessed or Dirty is clear and the processor does not set it.
    AccessedDirty,
    /// A register or an entry that the manual forbids, or a table outside table RAM.
    Malformed,
}

impl Trap {
    /// Whether nothing is mapped.
    pub(crate) fn is_absent(self) -> bool {
        matches!(self, Self::NotPresent { .. })
    }
}

/// Translates one access.
pub(crate) fn walk<M: Manual>(
    memory: &Frames,
    register: u64,
    gfn: Gfn,
    access: Access,
) -> Result<Found, Trap> {
    let mut table = M::root(register).ok_or(Trap::Malformed)?;
    if gfn.0 >> (INDEX_BITS * (M::LEVELS - 1) + M::ROOT_BITS) != 0 {
        return Err(Trap::NotPresent { pages: 1 });
    }
    let mut rights = [true; 3];
    for level in (0..M::LEVELS).rev() {
        let top = level + 1 == M::LEVELS;
        let bits = if top { M::ROOT_BITS } else { INDEX_BITS };
        let index = gfn.0 >> (INDEX_BITS * level) & ((1 << bits) - 1);
        let word = memory.word(table + index * 8).ok_or(Trap::Malformed)?;
        // Begins anew when the hypervisor changed the entry while bits were to be set in it.
        let (entry, dirtied) = loop {
            let raw = word.load(Ordering::Acquire);
            let entry = match M::read(raw, level) {
                Seen::Absent => {
                    let pages = 1 << (INDEX_BITS * level);
                    return Err(Trap::NotPresent { pages });
                }
                Seen::Reserved => return Err(Trap::Malformed),
                Seen::Present(entry) => entry,
            };
            let allowed = [
                rights[0] && entry.read,
                rights[1] && entry.write,
                rights[2] && entry.execute,
            ];
            if entry.leaf && !allowed[access as usize] {
                return Err(Trap::Permission);
            }
            let store = entry.leaf && access == Access::Write;
            let needed = entry.accessed | if store { entry.dirty } else { 0 };
            if raw & needed != needed {
                if !M::SETS_BITS {
                    return Err(Trap::AccessedDirty);
                }
                let set =
                    word.compare_exchange(raw, raw | needed, Ordering::AcqRel, Ordering::Relaxed);
                if set.is_err() {
                    continue;
                }
            }
            rights = allowed;
            break (entry, store && raw & entry.dirty != entry.dirty);
        };
        if !entry.leaf {
            table = entry.address;
            continue;
        }
        let pages = 1 << (INDEX_BITS * level);
        let first = Pfn(entry.address >> PAGE_BITS);
        if first.0 & (pages - 1) != 0 {
            return Err(Trap::Malformed);
        }
        let [read, write, execute] = rights;
        return Ok(Found {
            first,
            pfn: Pfn(first.0 + (gfn.0 & (pages - 1))),
            pages,
            read,
            write,
            execute,
            dirty: word.load(Ordering::Acquire) & entry.dirty == entry.dirty,
            dirtied,
        });
    }
    // The last level's entries are leaves or nothing; `read` said otherwise.
    Err(Trap::Malformed)
}
