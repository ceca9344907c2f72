//! What is common to requests about ranges of frames.

use slat_mmu::{Gfn, GfnRange, MirrorChange};
use slat_paging::wire::ProblemKind;

use crate::error::Trouble;

/// A range of frames, cut where numbers end.
pub(super) fn range(gfn: u64, pages: u64) -> GfnRange {
    GfnRange {
        start: Gfn(gfn),
        end: Gfn(gfn.saturating_add(pages)),
    }
}

/// An error when something was kept as it was.
pub(super) fn complete(change: &MirrorChange, what: &str) -> Result<(), Trouble> {
    match change.refused {
        Some(why) if change.kept > 0 => {
            let message = format!("{what}: {} pages are as they were: {why}", change.kept);
            Err(Trouble::new(ProblemKind::Kernel, message))
        }
        _ => Ok(()),
    }
}
