//! Puts memstress into fresh memory.

use std::thread;

use slat_proto::model::{MemstressFill, MemstressPattern, MemstressSpec, PAGE_SIZE};

use super::{
    control::{ALWAYS, GRAIN, MAGIC, NONE, VERSION, control_page, offset, pattern},
    random,
    step::SECOND_STAMP,
};
use crate::{
    guest::{
        layout::Layout,
        put::{GuestError, put},
    },
    memory::SlotTable,
};

const PAGE: usize = PAGE_SIZE as usize;
/// Visits in a batch without a ceiling: few exits, and counters not older than some milliseconds.
const BATCH: u64 = 512;
/// With a ceiling a vCPU is paced about this often a second.
const TURNS_PER_SECOND: u64 = 100;

pub(in crate::guest) fn install(
    memory: &SlotTable,
    layout: &Layout,
    vcpus: u32,
    spec: &MemstressSpec,
) -> Result<(), GuestError> {
    for vcpu in 0..vcpus {
        for (at, value) in parameters(layout, vcpu, vcpus, spec) {
            put(
                memory,
                control_page(vcpu) + at,
                &value.to_le_bytes(),
                "control page",
            )?;
        }
    }
    match spec.fill {
        MemstressFill::Zero => Ok(()),
        MemstressFill::Random => fill(memory, layout, spec.seed),
    }
}

fn share(percent: u32) -> u64 {
    ALWAYS * u64::from(percent.min(100)) / 100
}

/// The pages a vCPU owns: as even as whole grains allow.
fn owned(pages: u64, vcpu: u32, vcpus: u32) -> (u64, u64) {
    let grains = pages.div_ceil(GRAIN);
    let start = |vcpu: u32| (grains * u64::from(vcpu) / u64::from(vcpus) * GRAIN).min(pages);
    (start(vcpu), start(vcpu + 1) - start(vcpu))
}

fn parameters(layout: &Layout, vcpu: u32, vcpus: u32, spec: &MemstressSpec) -> Vec<(u64, u64)> {
    let (first_page, pages) = owned(layout.working_pages(), vcpu, vcpus);
    let (pattern, hot_percent, hot_visits) = match spec.pattern {
        MemstressPattern::Sequential => (pattern::SEQUENTIAL, 0, 0),
        MemstressPattern::Random => (pattern::RANDOM, 0, 0),
        MemstressPattern::HotCold {
            hot_percent,
            hot_visit_percent,
        } => (pattern::HOT_COLD, hot_percent, hot_visit_percent),
    };
    let hot_pages = (pages * u64::from(hot_percent) / 100).clamp(1, pages.saturating_sub(1).max(1));
    let batch = match spec.dirty_rate {
        None => BATCH,
        Some(rate) => {
            let writes = rate / PAGE_SIZE / u64::from(vcpus) / TURNS_PER_SECOND;
            (writes * 100 / u64::from(spec.write_percent.max(1))).clamp(1, BATCH)
        }
    };
    vec![
        (offset::MAGIC, MAGIC),
        (offset::VERSION, VERSION),
        (offset::VCPU, vcpu.into()),
        (offset::VCPUS, vcpus.into()),
        (offset::PATTERN, pattern),
        (offset::WRITE_SHARE, share(spec.write_percent)),
        (offset::HOT_SHARE, share(hot_visits)),
        (offset::HOT_PAGES, hot_pages),
        (offset::FIRST_PAGE, first_page),
        (offset::PAGES, pages),
        (offset::WORKING_PAGES, layout.working_pages()),
        (offset::RATE, spec.dirty_rate.unwrap_or(NONE)),
        (offset::EXPECTED, layout.expected()),
        (offset::WORK, layout.work()),
        (offset::LOW_LIMIT, layout.low_limit()),
        (offset::HOLE, layout.hole()),
        (offset::BATCH, batch),
        (offset::VISIT_LIMIT, NONE),
        (offset::RANDOM, random::seeded(spec.seed, vcpu.into())),
        (offset::FIRST_ERROR_PAGE, NONE),
    ]
}

/// Random bytes in every working page, each stamped with count 1; the table says 1 throughout.
fn fill(memory: &SlotTable, layout: &Layout, seed: u64) -> Result<(), GuestError> {
    let pages = layout.working_pages();
    let ones = [1u32.to_le_bytes(); PAGE / 4].concat();
    for table_page in 0..(pages * 4).div_ceil(PAGE_SIZE) {
        let entries = (pages - table_page * (PAGE_SIZE / 4)).min(PAGE_SIZE / 4) as usize;
        put(
            memory,
            layout.gpa(layout.expected() + table_page * PAGE_SIZE),
            &ones[..entries * 4],
            "count table",
        )?;
    }
    let threads = thread::available_parallelism().map_or(1, |n| n.get().min(8)) as u64;
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|thread| {
                let range = pages * thread / threads..pages * (thread + 1) / threads;
                thread::Builder::new()
                    .name("guest-fill".to_owned())
                    .spawn_scoped(scope, move || {
                        range
                            .into_iter()
                            .try_for_each(|page| fill_page(memory, layout, seed, page))
                    })
                    .map_err(GuestError::Thread)
            })
            .collect();
        workers.into_iter().try_for_each(|worker| {
            worker?
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    })
}

fn fill_page(memory: &SlotTable, layout: &Layout, seed: u64, page: u64) -> Result<(), GuestError> {
    let mut bytes = [0u8; PAGE];
    let mut state = random::seeded(seed, page | 1 << 63);
    for word in bytes.as_chunks_mut::<8>().0 {
        *word = random::next(&mut state).to_le_bytes();
    }
    for stamp in [0, SECOND_STAMP as usize] {
        bytes[stamp..stamp + 8].copy_from_slice(&page.to_le_bytes());
        bytes[stamp + 8..stamp + 16].copy_from_slice(&1u64.to_le_bytes());
    }
    put(memory, layout.working_page(page), &bytes, "working page")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vcpus_own_every_page_once() {
        for (pages, vcpus) in [(1952, 64), (1952, 3), (1 << 19, 2), (17, 1)] {
            let mut next = 0;
            for vcpu in 0..vcpus {
                let (first, count) = owned(pages, vcpu, vcpus);
                assert_eq!(first, next);
                assert!(count >= GRAIN && first.is_multiple_of(GRAIN));
                next = first + count;
            }
            assert_eq!(next, pages);
        }
    }
}
