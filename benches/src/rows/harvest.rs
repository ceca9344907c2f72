//! Harvesting the dirty log: a clean slot of 1 TiB, and a slot of which every page was written.

use std::time::Duration;

use anyhow::ensure;

use super::{
    flat::{Copying, Sweep, Sweeping},
    plan::{Candidate, GIB, Plan, bytes},
};
use crate::{
    clock::timed,
    report::{Limit, Role},
    ring::Subject,
    slat::Slat,
    table::Table as _,
};

const TIB: u64 = 1024 * GIB;

pub(super) fn rows(dirty_slot: u64) -> Vec<Plan> {
    let clean = vec![
        Candidate::new(Role::Slat, Slat::NAME, Clean::new),
        Candidate::new(Role::Baseline, "memcpy of the bitmap", || {
            Copying::new(TIB / 64)
        }),
    ];
    let mut clean = Plan::pages("harvest, clean, 1 TiB", 1, clean)
        .goal("under 5 ms", &[Limit::Nanoseconds(5e6)]);
    clean.per = "operation";
    let dirty = vec![
        Candidate::new(Role::Slat, Slat::NAME, move || Dirty::new(dirty_slot)),
        Candidate::new(Role::Baseline, "AND sweep", move || {
            Sweeping::new(dirty_slot, Sweep::And)
        }),
    ];
    let dirty = Plan::pages(
        format!("harvest, all dirty, {}", bytes(dirty_slot)),
        dirty_slot,
        dirty,
    )
    .goal("at most 2 ns a page", &[Limit::Nanoseconds(2.0)]);
    vec![clean, dirty]
}

/// A slot of 1 TiB, mapped by leaves of 1 GiB, that logs writes and sees none.
struct Clean {
    slat: Slat,
    bitmap: Vec<u64>,
}

impl Clean {
    fn new() -> Self {
        let slat = Slat::huge(TIB);
        slat.populate_huge();
        slat.log_dirty(true);
        let mut bitmap = vec![0; (TIB / 64) as usize];
        // That a harvest sees writes at all: one is, and each later harvest must find nothing.
        let mut vcpu = slat.vcpu();
        assert!(
            slat.write(&mut vcpu, 64 * 1000),
            "a write to a logged page faults"
        );
        slat.harvest(&mut bitmap);
        let found = bitmap.iter().position(|&word| word != 0);
        assert_eq!((found, bitmap[1000]), (Some(1000), 1));
        bitmap[1000] = 0;
        Self { slat, bitmap }
    }
}

impl Subject for Clean {
    fn prepare(&mut self) {
        // A harvest adds to the bitmap, which a caller that wants to know what is new has emptied.
        self.bitmap.fill(0);
    }

    fn run(&mut self) -> Duration {
        timed(|| self.slat.harvest(&mut self.bitmap))
    }

    fn verify(&mut self, _thorough: bool) -> anyhow::Result<()> {
        let dirty = self.bitmap.iter().filter(|&&word| word != 0).count();
        ensure!(dirty == 0, "slat: {dirty} words of a clean slot are set");
        Ok(())
    }
}

/// Every page was written since the last harvest.
struct Dirty {
    slat: Slat,
    pages: u64,
    bitmap: Vec<u64>,
}

impl Dirty {
    fn new(pages: u64) -> Self {
        let slat = Slat::new(pages);
        slat.log_dirty(true);
        Self {
            slat,
            pages,
            bitmap: vec![0; pages.div_ceil(64) as usize],
        }
    }
}

impl Subject for Dirty {
    fn prepare(&mut self) {
        self.slat.write_all();
        self.bitmap.fill(0);
    }

    fn run(&mut self) -> Duration {
        timed(|| self.slat.harvest(&mut self.bitmap))
    }

    fn verify(&mut self, _thorough: bool) -> anyhow::Result<()> {
        let found: u64 = self
            .bitmap
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum();
        ensure!(
            found == self.pages && self.slat.dirty_pages() == 0,
            "slat: {found} of {} dirty pages found",
            self.pages
        );
        let writable = (0..self.pages)
            .step_by(1021)
            .filter(|&frame| self.slat.mapping(frame).is_none_or(|page| page.writable))
            .count();
        ensure!(writable == 0, "slat: {writable} pages were not protected");
        Ok(())
    }
}
