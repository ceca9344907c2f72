//! Runs: which pages of a slot a frame is about.

use super::{Header, Kind, PAGE, RUN, WireError};

/// Consecutive pages of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) page: u32,
    pub(crate) pages: u32,
}

/// Appends runs to a payload.
pub(crate) fn encode_runs(runs: &[Run], to: &mut Vec<u8>) {
    for run in runs {
        to.extend_from_slice(&run.page.to_le_bytes());
        to.extend_from_slice(&run.pages.to_le_bytes());
    }
}

/// Runs of a frame, each within a slot of `slot_pages` pages, and for `Pages` exactly as many pages
/// as it carries.
pub(crate) fn decode_runs(
    header: &Header,
    bytes: &[u8],
    slot_pages: u64,
) -> Result<Vec<Run>, WireError> {
    let runs: Vec<Run> = bytes
        .chunks_exact(RUN)
        .map(|chunk| Run {
            page: u32::from_le_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]),
            pages: u32::from_le_bytes([chunk[4], chunk[5], chunk[6], chunk[7]]),
        })
        .collect();
    let mut total = 0_u64;
    for run in &runs {
        if run.pages == 0 || u64::from(run.page) + u64::from(run.pages) > slot_pages {
            return Err(WireError::OutOfSlot {
                slot: header.slot,
                page: run.page.into(),
                pages: run.pages.into(),
            });
        }
        total += u64::from(run.pages);
    }
    let carried = u64::from(header.length) - (runs.len() * RUN) as u64;
    if header.kind == Kind::Pages && carried != total * PAGE as u64 {
        return Err(WireError::corrupt(
            "length",
            format!("{carried} bytes for {total} pages"),
        ));
    }
    Ok(runs)
}
