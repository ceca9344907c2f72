//! A guest's life, from its first fault to its last table, told for one format.
//!
//! | chapter | what |
//! |---|---|
//! | `faults` | slots; faults that map huge and 4 KiB pages, and those that are not the MMU's |
//! | `dump` | what is mapped, entry by entry |
//! | `logging` | dirty logging and ageing |
//! | `ending` | memory taken back, slots deleted |
//!
//! Each step is checked three times over: what the MMU says, what the processor's walker sees, and
//! what is in the guest's memory.

mod dump;
mod ending;
mod faults;
mod logging;

use alloc::{format, string::String, sync::Arc};
use core::sync::atomic::Ordering;

use slat_mmu::{Access, Gfn, MmuConfig, Pfn, SecondStage, SlotId, TdpMmu};

use crate::{
    console::say,
    frames::Frames,
    hardware::{Found, Manual, Trap},
    heap,
    host::Machine,
    ram,
    vcpu::{Exit, Mmu, VirtualCpu},
};

/// Ordinary memory, congruent modulo 2 MiB on both sides, so that huge pages fit: two of them.
const RAM: SlotId = 0;
const RAM_GFN: Gfn = Gfn(0);
const RAM_PAGES: u64 = 1024;
/// Memory that is not congruent: 4 KiB pages only.
const ODD: SlotId = 1;
const ODD_GFN: Gfn = Gfn(0x1000);
const ODD_PAGES: u64 = 32;
const ODD_PFN: Pfn = Pfn(ram::BASE.0 + RAM_PAGES + 1);
/// Memory that the guest may not write.
const ROM: SlotId = 2;
const ROM_GFN: Gfn = Gfn(0x2000);
const ROM_PAGES: u64 = 8;
const ROM_PFN: Pfn = Pfn(ODD_PFN.0 + ODD_PAGES);
/// A device: no slot.
const DEVICE_GFN: Gfn = Gfn(0x3000);

/// Pages of 2 MiB and of 4 KiB, as walks report them.
const HUGE: u64 = 512;
const SMALL: u64 = 1;

/// The line that did not hold.
#[derive(Debug)]
pub(crate) struct Failed {
    /// Source file.
    pub(crate) file: &'static str,
    /// Its line.
    pub(crate) line: u32,
    /// What was seen instead.
    pub(crate) what: String,
}

/// Ends the story here unless the condition holds.
macro_rules! check {
    ($condition:expr, $($what:tt)+) => {
        if !$condition {
            return Err($crate::story::Failed {
                file: file!(),
                line: line!(),
                what: alloc::format!($($what)+),
            });
        }
    };
}

/// Ends the story here unless both are equal.
macro_rules! same {
    ($seen:expr, $meant:expr) => {{
        let (seen, meant) = (&$seen, &$meant);
        check!(
            seen == meant,
            "{} is {seen:?}, not {meant:?}",
            stringify!($seen)
        );
    }};
}

use {check, same};

/// Makes a failed call the end of the story, with its line.
impl Failed {
    #[track_caller]
    fn because(what: String) -> Self {
        let at = core::panic::Location::caller();
        Self {
            file: at.file(),
            line: at.line(),
            what,
        }
    }
}

/// One guest.
struct Guest<'a, M: Manual> {
    mmu: &'a Mmu<M>,
    machine: &'a Machine,
    cpu: VirtualCpu<'a, M>,
}

impl<M: Manual> Guest<'_, M> {
    /// The guest writes; the write must land in the frame that the slot names.
    #[track_caller]
    fn write(&mut self, gfn: Gfn, value: u64) -> Result<Pfn, Failed> {
        let pfn = self.touch(gfn, Access::Write)?;
        match ram::word(pfn) {
            Some(word) => word.store(value, Ordering::Relaxed),
            None => return Err(Failed::because(format!("{gfn} led to {pfn}, no memory"))),
        }
        Ok(pfn)
    }

    /// The guest reads.
    #[track_caller]
    fn read(&mut self, gfn: Gfn) -> Result<u64, Failed> {
        let pfn = self.touch(gfn, Access::Read)?;
        let word = ram::word(pfn)
            .ok_or_else(|| Failed::because(format!("{gfn} led to {pfn}, no memory")))?;
        Ok(word.load(Ordering::Relaxed))
    }

    /// The guest touches a frame that it has.
    #[track_caller]
    fn touch(&mut self, gfn: Gfn, access: Access) -> Result<Pfn, Failed> {
        let touched = self.cpu.touch(gfn, access);
        touched.map_err(|exit| Failed::because(format!("{access:?} of {gfn}: {exit:?}")))
    }

    /// Why touching a frame ends outside.
    fn exit(&mut self, gfn: Gfn, access: Access) -> Option<Exit> {
        self.cpu.touch(gfn, access).err()
    }

    /// What the processor's walker sees, past the TLB.
    fn walk(&self, gfn: Gfn) -> Result<Found, Trap> {
        self.cpu.walk(gfn, Access::Read)
    }

    /// The mapping that the processor's walker sees, past the TLB.
    #[track_caller]
    fn found(&self, gfn: Gfn) -> Result<Found, Failed> {
        let trapped = |trap| format!("the processor's walk of {gfn} ended with {trap:?}");
        self.walk(gfn)
            .map_err(|trap| Failed::because(trapped(trap)))
    }

    fn say(&self, what: core::fmt::Arguments<'_>) {
        say!("{:<12} {what}", M::NAME);
    }
}

/// Tells it all.
pub(crate) fn tell<M: Manual>(frames: &Arc<Frames>) -> Result<(), Failed> {
    ram::clear();
    let heap_before = heap::used();
    let machine = Arc::new(Machine::new());
    // The defaults are KVM's. A slot's number costs a place in a table, so say how many there will
    // be.
    let config = MmuConfig::default().with_max_slots(4);
    let mmu: Mmu<M> = TdpMmu::new(Arc::clone(frames), Arc::clone(&machine), config);
    {
        let mut guest = Guest {
            mmu: &mmu,
            machine: &machine,
            cpu: VirtualCpu::new(&mmu, &machine, frames),
        };
        faults::create(&mut guest)?;
        faults::huge(&mut guest)?;
        faults::small(&mut guest)?;
        faults::not_ours(&mut guest)?;
        dump::dump(&guest)?;
        logging::switch_on(&mut guest)?;
        logging::harvest(&mut guest)?;
        logging::switch_off(&mut guest)?;
        logging::age(&mut guest)?;
        ending::take_back(&mut guest)?;
        ending::withdraw(&mut guest)?;
        ending::delete(&mut guest)?;
    }
    // The vCPU is gone; its cached tables are given back when somebody asks, or with the MMU.
    mmu.reclaim();
    let stats = mmu.stats();
    say!(
        "{:<12} {} faults, {} of them without the lock; {} splits, {} recoveries, {} flushes",
        M::NAME,
        stats.faults_taken,
        stats.faults_fast,
        stats.splits,
        stats.recovered,
        machine.flushes(),
    );
    drop(mmu);
    drop(machine);
    same!(frames.used(), 0);
    same!(heap::used(), heap_before);
    say!(
        "{:<12} gone: no table frame and no byte of the heap is left in use",
        M::NAME
    );
    Ok(())
}
