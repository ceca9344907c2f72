//! Pages that are mapped before the guest touches them.
//!
//! The pager is asked piece by piece, and slots are looked up anew for each: they may go and move
//! meanwhile. Where the table has a slot that the pager does not have (it is just being added, or
//! taken away), it is asked again for a moment; where the table has none, the frame is refused.
//!
//! As the kernel's KVM_PRE_FAULT_MEMORY it tells progress first: a call that has done some pages
//! succeeds, and the next one meets what is wrong. No lock is held while the pager is asked.

use std::time::{Duration, Instant};

use slat_paging::wire::{Answer, Ask};
use slat_proto::{ApiError, Reason};

use super::super::Machine;
use crate::pager::PagerError;

/// Pages asked for at once: 16 MiB.
const PIECE: u64 = 4096;
/// No piece is begun after this.
const BEGINS: Duration = Duration::from_secs(60);
/// A piece is done within this: together with the bound before, a call takes two minutes at most.
const PATIENCE: Duration = Duration::from_secs(60);
/// A slot that is in the table comes to the pager within this.
const COMES: Duration = Duration::from_secs(5);
/// Between two questions about it.
const PAUSE: Duration = Duration::from_millis(1);

impl Machine {
    /// Maps frames: how many from the first on, and where to go on, unless all are done.
    ///
    /// # Errors
    /// NO_SUCH_VM; STALE_EPOCH; CAPABILITY_MISSING; BAD_PARAMETER for no range, and when the first
    /// frame is in no slot; VM_STATE when its slot is being changed all the time; PAGER_UNREACHABLE
    /// and the pager's. Nothing was mapped then that this could tell of.
    pub(crate) fn prefault_memory(
        &self,
        gfn: u64,
        pages: u64,
    ) -> Result<(u64, Option<u64>), ApiError> {
        self.check_paged_now()?;
        let bad = |message: String| {
            ApiError::bad_parameter("gfn", message)
                .with("gfn", gfn)
                .with("pages", pages)
        };
        let end = gfn.checked_add(pages).filter(|_| pages > 0);
        let end =
            end.ok_or_else(|| bad(format!("{pages} pages from frame {gfn:#x} are no range")))?;
        let begun = Instant::now();
        let (mut at, mut moved) = (gfn, begun);
        while at < end {
            if at > gfn && begun.elapsed() >= BEGINS {
                break;
            }
            let Some(to) = self.end_of_slot(at) else {
                if at > gfn {
                    break;
                }
                return Err(bad(format!("frame {at:#x} is in no slot")));
            };
            let here = PIECE.min(to.min(end) - at);
            match self.prefault_piece(at, here) {
                Ok(0) if moved.elapsed() < COMES => std::thread::sleep(PAUSE),
                Ok(0) if at > gfn => break,
                Ok(0) => return Err(self.slot_in_motion(at)),
                Ok(done) => {
                    at += done;
                    moved = Instant::now();
                }
                Err(error) if at > gfn => {
                    tracing::debug!(%error, gfn = at, "pages are mapped ahead so far");
                    break;
                }
                Err(error) => return Err(self.paged(error)),
            }
        }
        Ok((at - gfn, (at < end).then_some(at)))
    }

    /// Where the slot of a frame ends.
    fn end_of_slot(&self, gfn: u64) -> Option<u64> {
        let table = self.memory.table();
        let (slot, _) = table.find(gfn)?;
        Some(slot.spec().end_gfn())
    }

    fn prefault_piece(&self, gfn: u64, pages: u64) -> Result<u64, PagerError> {
        match self.pager.ask(Ask::Prefault { gfn, pages }, PATIENCE)? {
            // A pager may say anything.
            Answer::Prefaulted { pages: done } => Ok(done.min(pages)),
            _ => Ok(0),
        }
    }

    fn slot_in_motion(&self, gfn: u64) -> ApiError {
        let vm = &self.shared.vm;
        let words = format!("{vm}: the slot of frame {gfn:#x} is being changed");
        ApiError::new(Reason::VmState, words)
            .with("vm", vm)
            .with("state", self.shared.view().state.as_str_name())
            .with("gfn", gfn)
            .with("advice", "try again when its slots are no longer changed")
    }
}
