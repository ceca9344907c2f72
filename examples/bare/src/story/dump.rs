//! What is mapped, entry by entry: the first thing one prints when something is wrong.

use core::sync::atomic::Ordering;

use slat_mmu::{Gfn, GfnRange, SecondStage};

use super::guest::{Failed, Guest, check, same};
use crate::hardware::Manual;

/// Each leaf with the place of its entry; the processor's walk must end in the same mapping.
pub(super) fn dump<M: Manual>(guest: &Guest<'_, M>) -> Result<(), Failed> {
    let all = GfnRange::new(Gfn(0), M::MAX_GFN.0);
    let mut count = 0;
    for found in guest.mmu.space(0).leaves(all) {
        let (leaf, right) = (found.leaf, |on, letter| if on { letter } else { '-' });
        guest.say(format_args!(
            "  {:#7x} {:<2} -> {:#7x} {}{}{}  {:#018x} at {:#x}",
            found.gfn.0,
            found.level,
            leaf.pfn.0,
            right(leaf.readable, 'r'),
            right(leaf.writable, 'w'),
            right(leaf.executable, 'x'),
            found.raw,
            found.address,
        ));
        let word = guest.mmu.memory().word(found.address);
        let stored = word.map(|word| word.load(Ordering::Acquire));
        same!(stored, Some(found.raw));
        let walked = guest.found(found.gfn)?;
        same!(walked.first, leaf.pfn);
        count += 1;
    }
    let pages: i64 = guest.mmu.stats().pages.iter().sum();
    check!(count == pages, "{count} leaves listed of {pages}");
    Ok(())
}
