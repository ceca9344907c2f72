//! What the tests of all formats share: page-table walkers written from the manuals, which know
//! nothing of `Format`, a host that records flushes, and a runner of properties.

#![allow(dead_code, reason = "each test uses a part")]

pub(crate) mod property;

use std::sync::Mutex;

use slat_arch::GuestStage;
use slat_mmu::{Arena, Flush, FlushCause, FlushRequest, Host, Pfn};

/// What a hardware walker finds in a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// First guest frame of the leaf.
    pub(crate) gfn: u64,
    /// Pages that it maps.
    pub(crate) pages: u64,
    /// First host frame.
    pub(crate) pfn: u64,
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    pub(crate) executable: bool,
}

/// All that hardware of one kind can reach from a root.
#[derive(Debug, Default)]
pub(crate) struct Reach {
    /// Leaves that allow something, by guest frame.
    pub(crate) leaves: Vec<Found>,
    /// Tables, the root included.
    pub(crate) tables: u64,
}

/// What an entry is to the hardware.
enum Pte {
    Absent,
    Table(u64),
    Leaf { pfn: u64, rwx: (bool, bool, bool) },
}

/// The walkers' geometry: Arm's and RISC-V's roots are wider than the other tables.
struct Shape {
    levels: u32,
    root_bits: u32,
    judge: fn(u64, u32) -> Pte,
}

fn shape(stage: GuestStage) -> Shape {
    let (levels, root_bits, judge): (u32, u32, fn(u64, u32) -> Pte) = match stage {
        GuestStage::Ept4 => (4, 9, ept_pte),
        GuestStage::Ept5 => (5, 9, ept_pte),
        GuestStage::Ept4NoAd => (4, 9, ept_pte),
        GuestStage::Ept5NoAd => (5, 9, ept_pte),
        GuestStage::Npt4 => (4, 9, npt_pte),
        GuestStage::Npt5 => (5, 9, npt_pte),
        GuestStage::Sv39x4 => (3, 11, g_stage_pte),
        GuestStage::Sv48x4 => (4, 11, g_stage_pte),
        GuestStage::Sv57x4 => (5, 11, g_stage_pte),
        GuestStage::Arm64Ipa40 => (3, 10, arm64_pte),
        GuestStage::Arm64Ipa48 => (4, 9, arm64_pte),
        other => panic!("no walker for {other}"),
    };
    Shape {
        levels,
        root_bits,
        judge,
    }
}

impl Shape {
    fn bits(&self, level: u32) -> u32 {
        if level + 1 == self.levels {
            self.root_bits
        } else {
            9
        }
    }

    fn collect(&self, arena: &Arena, table: u64, level: u32, base: u64, reach: &mut Reach) {
        reach.tables += 1;
        let pages = 1 << (9 * level);
        for index in 0..1 << self.bits(level) {
            let pte = word(arena, table + index * 8);
            let gfn = base + index * pages;
            match (self.judge)(pte, level) {
                Pte::Absent => {}
                Pte::Table(pfn) => self.collect(arena, pfn << 12, level - 1, gfn, reach),
                Pte::Leaf { pfn, rwx } => reach.leaves.push(found(gfn, level, pfn, rwx)),
            }
        }
    }
}

fn found(gfn: u64, level: u32, pfn: u64, rwx: (bool, bool, bool)) -> Found {
    let pages = 1 << (9 * level);
    assert_eq!(pfn & (pages - 1), 0, "a misaligned leaf of level {level}");
    Found {
        gfn: gfn & !(pages - 1),
        pages,
        pfn,
        readable: rwx.0,
        writable: rwx.1,
        executable: rwx.2,
    }
}

/// Walks the tables in `arena` to `gfn` as the hardware of `stage` does.
pub(crate) fn hardware_walk(
    stage: GuestStage,
    arena: &Arena,
    root: Pfn,
    gfn: u64,
) -> Option<Found> {
    let shape = shape(stage);
    let top = shape.levels - 1;
    if gfn >> (9 * top + shape.root_bits) != 0 {
        return None;
    }
    assert!(
        root.hpa().is_multiple_of(8 << shape.root_bits),
        "root alignment"
    );
    let mut table = root.hpa();
    for level in (0..shape.levels).rev() {
        let index = gfn >> (9 * level) & ((1 << shape.bits(level)) - 1);
        let pte = word(arena, table + index * 8);
        match (shape.judge)(pte, level) {
            Pte::Absent => return None,
            Pte::Table(pfn) => table = pfn << 12,
            Pte::Leaf { pfn, rwx } => return Some(found(gfn, level, pfn, rwx)),
        }
    }
    panic!("a pointer at the last level");
}

/// Everything that hardware of `stage` can reach from `root`.
pub(crate) fn hardware_reach(stage: GuestStage, arena: &Arena, root: Pfn) -> Reach {
    let (shape, mut reach) = (shape(stage), Reach::default());
    shape.collect(arena, root.hpa(), shape.levels - 1, 0, &mut reach);
    reach
}

/// RISC-V privileged specification, "Virtual Address Translation Process", as modified for
/// two-stage translation, on a hart that faults where A or D is clear (Svade).
fn g_stage_pte(pte: u64, level: u32) -> Pte {
    let bit = |n: u32| pte >> n & 1 == 1;
    if !bit(0) {
        return Pte::Absent;
    }
    let (r, w, x) = (bit(1), bit(2), bit(3));
    assert!(r || !w, "reserved: W without R");
    assert_eq!(pte >> 54 & 0x7f, 0, "reserved bits");
    assert!(!bit(63), "N");
    let ppn = pte >> 10 & ((1 << 44) - 1);
    if r || x {
        assert!(bit(4), "U");
        assert!(!w || bit(7), "W without D faults on Svade");
        if !bit(6) {
            return Pte::Absent;
        }
        return Pte::Leaf {
            pfn: ppn,
            rwx: (r, w, x),
        };
    }
    assert_eq!(
        (pte & 0b1101_0000, pte >> 61),
        (0, 0),
        "reserved in a pointer"
    );
    assert!(level > 0, "a pointer at the last level");
    Pte::Table(ppn)
}

/// Intel SDM vol. 3C, "EPT Translation Mechanism", without mode-based execute control.
fn ept_pte(entry: u64, level: u32) -> Pte {
    let (r, w, x) = (entry & 1 != 0, entry & 2 != 0, entry & 4 != 0);
    if !(r || w || x) {
        return Pte::Absent;
    }
    if entry & 7 == 6 && entry >> 11 & 1 == 0 {
        // Misconfigured on purpose: the MMU's way to remember that there is no memory.
        return Pte::Absent;
    }
    assert!(r || !w, "misconfiguration: W without R");
    let pfn = entry >> 12 & ((1 << 40) - 1);
    if level == 0 || entry >> 7 & 1 == 1 {
        assert!(level < 3, "misconfiguration: leaf at level 4");
        assert!(
            matches!(entry >> 3 & 7, 0 | 1 | 4 | 5 | 6),
            "misconfiguration: memory type"
        );
        return Pte::Leaf {
            pfn,
            rwx: (r, w, x),
        };
    }
    assert_eq!(
        entry >> 3 & 0x1f,
        0,
        "misconfiguration: reserved in a pointer"
    );
    assert!(r && w && x, "a pointer with every permission");
    Pte::Table(pfn)
}

/// AMD APM vol. 2, 5.3 "Long-Mode Page Translation" and 15.25 "Nested Paging", 51 physical address
/// bits.
fn npt_pte(entry: u64, level: u32) -> Pte {
    let bit = |n: u32| entry >> n & 1 == 1;
    if !bit(0) {
        return Pte::Absent;
    }
    if bit(51) {
        assert!(!bit(11), "a reserved bit in an entry meant as present");
        return Pte::Absent;
    }
    assert!(bit(2), "a nested walk is a user access");
    let pfn = entry >> 12 & ((1 << 39) - 1);
    if level == 0 || bit(7) {
        assert!(level < 3, "reserved: PS at level 4");
        assert!(level > 0 || !bit(7), "PAT");
        return Pte::Leaf {
            pfn,
            rwx: (true, bit(1), !bit(63)),
        };
    }
    assert!(bit(1) && !bit(63), "a pointer with every permission");
    Pte::Table(pfn)
}

/// Arm ARM D8, stage 2 with a 4 KiB granule, on a processor that faults where AF is clear.
fn arm64_pte(descriptor: u64, level: u32) -> Pte {
    let bit = |n: u32| descriptor >> n & 1 == 1;
    if !bit(0) {
        return Pte::Absent;
    }
    assert_eq!(descriptor >> 48 & 7, 0, "reserved address bits");
    let pfn = descriptor >> 12 & ((1 << 36) - 1);
    if level == 0 || !bit(1) {
        assert!(level < 3, "no block at level 0");
        assert!(level > 0 || bit(1), "reserved at level 3");
        assert_eq!(descriptor >> 8 & 3, 3, "inner shareable");
        if !bit(10) {
            return Pte::Absent;
        }
        return Pte::Leaf {
            pfn,
            rwx: (bit(6), bit(7), descriptor >> 53 & 3 == 0),
        };
    }
    Pte::Table(pfn)
}

/// A host that remembers what it was asked to flush.
#[derive(Debug, Default)]
pub(crate) struct Recorder(Mutex<Vec<FlushRequest>>);

impl Host for Recorder {
    fn flush(&self, request: &FlushRequest) {
        self.0.lock().unwrap().push(*request);
    }
}

impl Recorder {
    /// What was asked since the last time, without what break-before-make adds.
    pub(crate) fn take(&self) -> Vec<(Flush, FlushCause)> {
        let requests = std::mem::take(&mut *self.0.lock().unwrap());
        requests
            .iter()
            .filter(|request| request.cause != FlushCause::BreakBeforeMake)
            .map(|request| (request.flush, request.cause))
            .collect()
    }
}

/// An entry of a table that was walked to.
fn word(arena: &Arena, hpa: u64) -> u64 {
    // SAFETY: who compares walks lets nobody make tables meanwhile.
    let word = unsafe { arena.read(hpa) };
    word.expect("table outside the arena")
}
