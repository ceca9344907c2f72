//! `slat memory prefault`: maps memory before the guest touches it, call by call until all of it is
//! done.
//!
//! A call is of [`STEP`] at most, so that there is progress to tell, and ends by itself before its
//! time is over; the next goes on where it ended. The first error ends all, after what was done is
//! said.

use std::time::Duration;

use slat_proto::{ApiError, Reason, json::to_json, model::PAGE_SIZE, v1};

use super::{super::target::VmTarget, slots::to_slots};
use crate::{
    client::Session,
    failure::Failure,
    term::{
        out,
        units::{Size, Span},
    },
};

/// Pages of a call: 256 MiB.
const STEP: u64 = 1 << 16;

fn bytes(pages: u64) -> Size {
    Size(pages.saturating_mul(PAGE_SIZE))
}

/// How much is done, told by tenths.
#[derive(Debug, Default)]
struct Progress {
    done: u64,
    all: u64,
    told: u64,
}

impl Progress {
    /// More is done: a line when another tenth is, but not for the end.
    fn add(&mut self, pages: u64) -> Option<String> {
        self.done = self.done.saturating_add(pages);
        let tenth = u128::from(self.done) * 10 / u128::from(self.all.max(1));
        let tenth = u64::try_from(tenth).unwrap_or(u64::MAX);
        if tenth <= self.told || self.done >= self.all {
            return None;
        }
        self.told = tenth;
        Some(self.words())
    }

    fn words(&self) -> String {
        format!("{} of {} mapped", bytes(self.done), bytes(self.all))
    }
}

/// Maps a range, or all slots.
pub(super) async fn prefault(
    session: &Session,
    target: &VmTarget,
    range: Option<v1::GfnRange>,
) -> Result<(), Failure> {
    let ranges = match range {
        Some(range) => vec![range],
        None => slots(session, target).await?,
    };
    let mut progress = Progress {
        all: ranges
            .iter()
            .fold(0, |sum, range| sum.saturating_add(range.pages)),
        ..Progress::default()
    };
    let mut nanos: u64 = 0;
    for range in ranges {
        let (mut gfn, mut left) = (range.gfn, range.pages);
        // A range of no pages is refused by who is asked.
        loop {
            let answer = call(session, target, gfn, left.min(STEP)).await;
            let answer = answer.inspect_err(|_| {
                if progress.done > 0 {
                    out::say(progress.words());
                }
            })?;
            nanos = nanos.saturating_add(answer.duration_nanos);
            if let Some(words) = progress.add(answer.pages) {
                out::say(words);
            }
            gfn = gfn.saturating_add(answer.pages);
            left = left.saturating_sub(answer.pages);
            if left == 0 {
                break;
            }
        }
    }
    let answer = v1::PrefaultMemoryResponse {
        pages: progress.done,
        next_gfn: 0,
        duration_nanos: nanos,
    };
    session.answer(
        || to_json(&answer),
        &target.name(),
        || {
            let took = Span(Duration::from_nanos(nanos));
            format!("{target}: {} mapped in {took}", bytes(progress.done))
        },
    )
}

async fn call(
    session: &Session,
    target: &VmTarget,
    gfn: u64,
    pages: u64,
) -> Result<v1::PrefaultMemoryResponse, Failure> {
    let request = v1::PrefaultMemoryRequest {
        name: target.name(),
        uid: target.uid(),
        host: target.host(),
        gfn,
        pages,
    };
    let doing = format!("map memory of {target}");
    let answer = session.client.pagings().prefault_memory(request).await;
    let answer = answer
        .map_err(|status| to_slots(Failure::call(doing.clone(), status), target))?
        .into_inner();
    if answer.pages == 0 {
        let words = "nothing was mapped, and nothing was said to be wrong";
        return Err(Failure::api(doing, ApiError::new(Reason::Internal, words)));
    }
    Ok(answer)
}

async fn slots(session: &Session, target: &VmTarget) -> Result<Vec<v1::GfnRange>, Failure> {
    let request = v1::ListSlotsRequest {
        vm: target.name(),
        uid: target.uid(),
        host: target.host(),
    };
    let answer = session.client.memory().list_slots(request).await;
    let answer = answer
        .map_err(|status| Failure::call(format!("list the slots of {target}"), status))?
        .into_inner();
    let range = |slot: v1::Slot| v1::GfnRange {
        gfn: slot.base_gfn,
        pages: slot.pages,
    };
    Ok(answer.slots.into_iter().map(range).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_told_by_tenths_and_the_end_is_left_to_the_answer() {
        let mut progress = Progress {
            all: 2560,
            ..Progress::default()
        };
        assert_eq!(progress.add(100), None);
        assert_eq!(progress.add(412).as_deref(), Some("2 MiB of 10 MiB mapped"));
        assert_eq!(progress.add(1), None);
        assert!(progress.add(600).is_some());
        assert_eq!(progress.add(5000), None);
    }
}
