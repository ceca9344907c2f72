//! The guest of the story: where its memory is, and how it touches it.

use alloc::{format, string::String};
use core::sync::atomic::Ordering;

use slat_mmu::{Access, Gfn, Pfn, SlotId};

use crate::{
    console::say,
    hardware::{Found, Manual, Trap},
    host::BareHost,
    ram,
    vcpu::{Exit, Mmu, VirtualCpu},
};

/// Ordinary memory, congruent modulo 2 MiB on both sides, so that huge pages fit: two of them.
pub(super) const RAM: SlotId = 0;
pub(super) const RAM_GFN: Gfn = Gfn(0);
pub(super) const RAM_PAGES: u64 = 1024;
/// Memory that is not congruent: 4 KiB pages only.
pub(super) const ODD: SlotId = 1;
pub(super) const ODD_GFN: Gfn = Gfn(0x1000);
pub(super) const ODD_PAGES: u64 = 32;
pub(super) const ODD_PFN: Pfn = Pfn(ram::BASE.0 + RAM_PAGES + 1);
/// Memory that the guest may not write.
pub(super) const ROM: SlotId = 2;
pub(super) const ROM_GFN: Gfn = Gfn(0x2000);
pub(super) const ROM_PAGES: u64 = 8;
pub(super) const ROM_PFN: Pfn = Pfn(ODD_PFN.0 + ODD_PAGES);
/// A device: no slot.
pub(super) const DEVICE_GFN: Gfn = Gfn(0x3000);

/// Pages of 2 MiB and of 4 KiB, as walks report them.
pub(super) const HUGE: u64 = 512;
pub(super) const SMALL: u64 = 1;

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
            return Err($crate::story::guest::Failed {
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
        $crate::story::guest::check!(
            seen == meant,
            "{} is {seen:?}, not {meant:?}",
            stringify!($seen)
        );
    }};
}

pub(super) use {check, same};

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
pub(super) struct Guest<'a, M: Manual> {
    pub(super) mmu: &'a Mmu<M>,
    pub(super) machine: &'a BareHost,
    pub(super) cpu: VirtualCpu<'a, M>,
}

impl<M: Manual> Guest<'_, M> {
    /// The guest writes; the write must land in the frame that the slot names.
    #[track_caller]
    pub(super) fn write(&mut self, gfn: Gfn, value: u64) -> Result<Pfn, Failed> {
        let pfn = self.touch(gfn, Access::Write)?;
        match ram::word(pfn) {
            Some(word) => word.store(value, Ordering::Relaxed),
            None => return Err(Failed::because(format!("{gfn} led to {pfn}, no memory"))),
        }
        Ok(pfn)
    }

    /// The guest reads.
    #[track_caller]
    pub(super) fn read(&mut self, gfn: Gfn) -> Result<u64, Failed> {
        let pfn = self.touch(gfn, Access::Read)?;
        let word = ram::word(pfn)
            .ok_or_else(|| Failed::because(format!("{gfn} led to {pfn}, no memory")))?;
        Ok(word.load(Ordering::Relaxed))
    }

    /// The guest touches a frame that it has.
    #[track_caller]
    pub(super) fn touch(&mut self, gfn: Gfn, access: Access) -> Result<Pfn, Failed> {
        let touched = self.cpu.touch(gfn, access);
        touched.map_err(|exit| Failed::because(format!("{access:?} of {gfn}: {exit:?}")))
    }

    /// Why touching a frame ends outside.
    pub(super) fn exit(&mut self, gfn: Gfn, access: Access) -> Option<Exit> {
        self.cpu.touch(gfn, access).err()
    }

    /// What the processor's walker sees, past the TLB.
    pub(super) fn walk(&self, gfn: Gfn) -> Result<Found, Trap> {
        self.cpu.walk(gfn, Access::Read)
    }

    /// The mapping that the processor's walker sees, past the TLB.
    #[track_caller]
    pub(super) fn found(&self, gfn: Gfn) -> Result<Found, Failed> {
        let trapped = |trap| format!("the processor's walk of {gfn} ended with {trap:?}");
        self.walk(gfn)
            .map_err(|trap| Failed::because(trapped(trap)))
    }

    pub(super) fn say(&self, what: core::fmt::Arguments<'_>) {
        say!("{:<12} {what}", M::NAME);
    }
}
