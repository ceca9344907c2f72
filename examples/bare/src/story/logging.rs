//! Which pages were written, which were used.

use slat_mmu::{Access, Flush, Gfn, GfnRange, Level, SecondStage, SlotFlags};

use super::guest::{Failed, Guest, HUGE, RAM, RAM_GFN, RAM_PAGES, SMALL, check, same};
use crate::hardware::Manual;

/// One bit a page.
type Bitmap = [u64; RAM_PAGES as usize / 64];

/// Switching logging on splits huge pages and sees to it that the next write to each page is
/// noticed.
pub(super) fn switch_on<M: Manual>(guest: &mut Guest<'_, M>) -> Result<(), Failed> {
    let before = guest.machine.flushes();
    let set = guest.mmu.space(0).set_slot_flags(RAM, SlotFlags::LOG_DIRTY);
    // None was left whole for want of table memory.
    same!(set, Ok(0));
    check!(
        guest.machine.flushes() > before,
        "no flush: TLBs hold the right to write"
    );
    let gfn = Gfn(5);
    let found = guest.found(gfn)?;
    same!(found.pages, SMALL);
    check!(
        !found.allows(Access::Write),
        "a write would go unseen: {found:?}"
    );
    same!(guest.read(gfn)?, 0x5555);
    same!(guest.mmu.space(0).dirty_pages(RAM), Ok(0));
    guest.say(format_args!(
        "logging on: 4 KiB pages, no write goes unseen"
    ));
    Ok(())
}

/// Each harvest reports what was written since the last, and nothing else.
pub(super) fn harvest<M: Manual>(guest: &mut Guest<'_, M>) -> Result<(), Failed> {
    for gfn in [3, 64, 64, 600] {
        guest.write(Gfn(gfn), gfn)?;
        guest.read(Gfn(gfn + 1))?;
    }
    let mut meant: Bitmap = [0; _];
    for gfn in [3, 64, 600] {
        meant[gfn / 64] |= 1 << (gfn % 64);
    }
    same!(collect(guest)?, meant);

    // A TLB that had missed the harvest's flush would let this write through.
    guest.write(Gfn(64), 0x6464)?;
    let mut meant: Bitmap = [0; _];
    meant[1] = 1;
    same!(collect(guest)?, meant);
    same!(collect(guest)?, [0; _]);
    same!(guest.read(Gfn(64))?, 0x6464);
    guest.say(format_args!(
        "harvests of 3, 1 and 0 pages, exactly those written"
    ));
    Ok(())
}

fn collect<M: Manual>(guest: &mut Guest<'_, M>) -> Result<Bitmap, Failed> {
    guest.cpu.drain();
    let mut bitmap: Bitmap = [0; _];
    let taken = guest.mmu.space(0).harvest_dirty_log(RAM, &mut bitmap);
    let set = bitmap.iter().map(|word| u64::from(word.count_ones())).sum();
    same!(taken, Ok(set));
    Ok(bitmap)
}

/// Without logging, what may be huge becomes huge again, in place.
pub(super) fn switch_off<M: Manual>(guest: &mut Guest<'_, M>) -> Result<(), Failed> {
    same!(
        guest.mmu.space(0).set_slot_flags(RAM, SlotFlags::empty()),
        Ok(0)
    );
    for (gfn, value) in [(3, 3), (64, 0x6464), (600, 600)] {
        same!(guest.read(Gfn(gfn))?, value);
        same!(guest.found(Gfn(gfn))?.pages, HUGE);
    }
    same!(guest.mmu.stats().pages_at(Level::SIZE_2M), 2);
    guest.say(format_args!(
        "logging off: 2 MiB pages again, with what was written"
    ));
    Ok(())
}

/// Ageing asks whether memory was used. It owes no flush, so a page that is still in a TLB may look
/// idle: who must know for sure flushes first.
pub(super) fn age<M: Manual>(guest: &mut Guest<'_, M>) -> Result<(), Failed> {
    let range = GfnRange::new(RAM_GFN, HUGE);
    check!(guest.mmu.space(0).age(range), "used memory looks idle");
    check!(!guest.mmu.space(0).test_age(range), "Accessed stayed set");
    guest.machine.flush_locally(Flush::All);
    // The processor sets Accessed, or faults and the MMU does, whichever the format has.
    guest.read(Gfn(7))?;
    check!(guest.mmu.space(0).test_age(range), "a use went unseen");
    check!(guest.mmu.space(0).age(range), "a use went unseen");
    check!(!guest.mmu.space(0).age(range), "idle memory looks used");
    guest.say(format_args!("aged twice: used, then idle"));
    Ok(())
}
