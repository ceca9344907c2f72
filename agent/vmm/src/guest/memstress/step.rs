//! memstress in portable Rust. Step for step what the machine code of
//! [`arch`](crate::guest::arch) does; change both together.

use slat_proto::model::PAGE_SIZE;

use crate::memory::SlotTable;

use super::{
    control::{ALWAYS, NONE, control_page, offset, pattern},
    random,
};

/// Longest batch, whatever the control page says: it comes with the memory of another host.
const MAX_BATCH: u64 = 4096;
/// Offset in a page of its second stamp.
pub(in crate::guest) const SECOND_STAMP: u64 = PAGE_SIZE - 16;

/// Guest memory as a vCPU sees it. Addresses are guest-physical and multiples of 8; an address
/// outside memory is an error of the access, never a panic (a control page may come from another
/// host).
pub(crate) trait GuestAccess {
    /// Why an access failed.
    type Error;
    /// Loads a little-endian word.
    ///
    /// # Errors
    /// When nothing is there.
    fn read_u64(&mut self, gpa: u64) -> Result<u64, Self::Error>;
    /// Stores a little-endian word.
    ///
    /// # Errors
    /// When nothing is there or it cannot be written.
    fn write_u64(&mut self, gpa: u64, value: u64) -> Result<(), Self::Error>;
}

/// There is no guest memory at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no guest memory at {gpa:#x}")]
pub(crate) struct NoMemory {
    /// The address.
    pub gpa: u64,
}

/// Through the host view: past the second stage, so nothing it writes is in a dirty log.
impl GuestAccess for &SlotTable {
    type Error = NoMemory;

    fn read_u64(&mut self, gpa: u64) -> Result<u64, NoMemory> {
        self.load(gpa).ok_or(NoMemory { gpa })
    }

    fn write_u64(&mut self, gpa: u64, value: u64) -> Result<(), NoMemory> {
        if self.store(gpa, value) {
            Ok(())
        } else {
            Err(NoMemory { gpa })
        }
    }
}

/// Counters of a vCPU after a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BatchEnd {
    /// Visits so far.
    pub visits: u64,
    /// Pages written so far.
    pub pages_written: u64,
    /// Mismatches so far.
    pub errors: u64,
}

/// Runs one batch of a vCPU: some visits, at most 4,096. Ask a [`super::Pacer`] before each.
///
/// # Errors
/// That of the first access that fails. The batch is then unfinished and the vCPU must not go on.
pub(crate) fn run_batch<M: GuestAccess>(memory: &mut M, vcpu: u32) -> Result<BatchEnd, M::Error> {
    let control = control_page(vcpu);
    let parameters = Parameters::read(memory, control)?;
    let mut position = memory.read_u64(control + offset::POSITION)?;
    let mut state = memory.read_u64(control + offset::RANDOM)?;
    let mut written = 0;
    for _ in 0..parameters.batch {
        let page = parameters.pick(&mut position, &mut state);
        let entry = parameters.gpa(parameters.expected.wrapping_add(page.wrapping_mul(4)));
        let at = parameters.gpa(parameters.work.wrapping_add(page.wrapping_mul(PAGE_SIZE)))
            & !(PAGE_SIZE - 1);
        // The table's entries are 32 bits; no other vCPU owns the other entry of the word.
        let (word, shift) = (entry & !7, (entry & 4) * 8);
        let pair = memory.read_u64(word)?;
        let count = u64::from((pair >> shift) as u32);
        if count != 0 && !stamped(memory, at, page, count)? {
            count_error(memory, control, page)?;
        }
        if !parameters.writes(&mut state) {
            continue;
        }
        let next = u64::from((count as u32).wrapping_add(1).max(1));
        for stamp in [at, at + SECOND_STAMP] {
            memory.write_u64(stamp, page)?;
            memory.write_u64(stamp + 8, next)?;
        }
        memory.write_u64(word, pair & !(u64::from(u32::MAX) << shift) | next << shift)?;
        written += 1;
    }
    memory.write_u64(control + offset::POSITION, position)?;
    memory.write_u64(control + offset::RANDOM, state)?;
    let pages_written = add(memory, control + offset::PAGES_WRITTEN, written)?;
    let visits = add(memory, control + offset::VISITS, parameters.batch)?;
    let errors = memory.read_u64(control + offset::ERRORS)?;
    Ok(BatchEnd {
        visits,
        pages_written,
        errors,
    })
}

fn add<M: GuestAccess>(memory: &mut M, gpa: u64, more: u64) -> Result<u64, M::Error> {
    let sum = memory.read_u64(gpa)?.wrapping_add(more);
    memory.write_u64(gpa, sum)?;
    Ok(sum)
}

fn stamped<M: GuestAccess>(
    memory: &mut M,
    at: u64,
    page: u64,
    count: u64,
) -> Result<bool, M::Error> {
    for stamp in [at, at + SECOND_STAMP] {
        if memory.read_u64(stamp)? != page || memory.read_u64(stamp + 8)? != count {
            return Ok(false);
        }
    }
    Ok(true)
}

fn count_error<M: GuestAccess>(memory: &mut M, control: u64, page: u64) -> Result<(), M::Error> {
    add(memory, control + offset::ERRORS, 1)?;
    let first = control + offset::FIRST_ERROR_PAGE;
    if memory.read_u64(first)? == NONE {
        memory.write_u64(first, page)?;
    }
    Ok(())
}

struct Parameters {
    pattern: u64,
    write_share: u64,
    hot_share: u64,
    hot_pages: u64,
    first_page: u64,
    pages: u64,
    expected: u64,
    work: u64,
    low_limit: u64,
    hole: u64,
    batch: u64,
}

impl Parameters {
    fn read<M: GuestAccess>(memory: &mut M, control: u64) -> Result<Self, M::Error> {
        let mut word = |at: u64| memory.read_u64(control + at);
        Ok(Self {
            pattern: word(offset::PATTERN)?,
            write_share: word(offset::WRITE_SHARE)?,
            hot_share: word(offset::HOT_SHARE)?,
            hot_pages: word(offset::HOT_PAGES)?,
            first_page: word(offset::FIRST_PAGE)?,
            pages: word(offset::PAGES)?,
            expected: word(offset::EXPECTED)?,
            work: word(offset::WORK)?,
            low_limit: word(offset::LOW_LIMIT)?,
            hole: word(offset::HOLE)?,
            batch: word(offset::BATCH)?.clamp(1, MAX_BATCH),
        })
    }

    fn pick(&self, position: &mut u64, state: &mut u64) -> u64 {
        // The upper 32 bits of a random number scaled to `pages`.
        let scale = |upper: u64, pages: u64| upper.wrapping_mul(pages) >> 32;
        let owned = if self.pattern == pattern::SEQUENTIAL {
            let now = *position;
            *position = now.wrapping_add(1);
            if *position >= self.pages {
                *position = 0;
            }
            now
        } else {
            let number = random::next(state);
            let (upper, lower) = (number >> 32, number & u64::from(u32::MAX));
            if self.pattern != pattern::HOT_COLD {
                scale(upper, self.pages)
            } else if lower < self.hot_share {
                scale(upper, self.hot_pages)
            } else {
                scale(upper, self.pages.wrapping_sub(self.hot_pages)).wrapping_add(self.hot_pages)
            }
        };
        owned.wrapping_add(self.first_page)
    }

    fn writes(&self, state: &mut u64) -> bool {
        self.write_share == ALWAYS || random::next(state) >> 32 < self.write_share
    }

    fn gpa(&self, linear: u64) -> u64 {
        if linear < self.low_limit {
            linear
        } else {
            linear.wrapping_add(self.hole)
        }
    }
}

#[cfg(test)]
mod tests {
    use slat_proto::model::{
        GuestSpec, MemoryBacking, MemstressFill, MemstressPattern, MemstressSpec, VmSpec,
        slots_for_memory,
    };

    use super::*;
    use crate::{
        guest::{Layout, install, memstress::counters},
        memory::{GuestMemory, SlotMemory},
    };

    fn vm(memory_bytes: u64, vcpus: u32, memstress: MemstressSpec) -> (GuestMemory, Layout) {
        let memory = GuestMemory::new();
        let slots = slots_for_memory(memory_bytes).unwrap();
        memory.publish(
            slots
                .into_iter()
                .map(|spec| SlotMemory::new(spec).unwrap().into())
                .collect(),
        );
        let spec = VmSpec {
            memory_bytes,
            vcpus,
            backend: None,
            format: None,
            dirty_engine: None,
            backing: MemoryBacking::Auto,
            numa_node: None,
            prefault: false,
            paging: slat_proto::model::Paging::Kernel,
            guest: GuestSpec::Memstress(memstress),
            labels: slat_proto::model::Labels::default(),
        };
        install(&memory.table(), &spec).unwrap();
        (memory, Layout::new(memory_bytes).unwrap())
    }

    fn run(memory: &GuestMemory, vcpu: u32, batches: u64) -> BatchEnd {
        let table = memory.table();
        let mut end = None;
        for _ in 0..batches {
            end = Some(run_batch(&mut &*table, vcpu).unwrap());
        }
        end.unwrap()
    }

    #[test]
    fn sequential_writes_every_page_of_the_smallest_vm_and_finds_nothing_wrong() {
        for vcpus in [1, 64] {
            let (memory, layout) = vm(8 << 20, vcpus, MemstressSpec::default());
            for vcpu in 0..vcpus {
                run(&memory, vcpu, 20);
            }
            let sum = counters(&memory.table(), vcpus).unwrap();
            assert_eq!(sum.errors, 0);
            assert_eq!(sum.pages, layout.working_pages());
            assert_eq!(sum.pages_written, 20 * 512 * u64::from(vcpus));
            assert_eq!(sum.passes, sum.pages_written / sum.pages);
            for page in 0..layout.working_pages() {
                let mut word = &*memory.table();
                assert_eq!(word.read_u64(layout.working_page(page)), Ok(page));
            }
        }
    }

    #[test]
    fn every_damage_to_a_page_is_found() {
        let random = MemstressSpec {
            fill: MemstressFill::Random,
            ..Default::default()
        };
        for (offset, fill) in [(0, false), (8, false), (4080, true), (4088, true)] {
            let spec = if fill {
                random
            } else {
                MemstressSpec::default()
            };
            let (memory, layout) = vm(8 << 20, 1, spec);
            if !fill {
                run(&memory, 0, 4);
            }
            let at = layout.working_page(77) + offset;
            let table = memory.table();
            let old = (&*table).read_u64(at).unwrap();
            (&*table).write_u64(at, old ^ 1 << 20).unwrap();
            assert_eq!(run(&memory, 0, 4).errors, 1, "at {offset}");
            let sum = counters(&table, 1).unwrap();
            assert_eq!((sum.errors, sum.first_error_page), (1, 77));
        }
    }

    #[test]
    fn a_random_fill_covers_every_page() {
        let (memory, layout) = vm(
            64 << 20,
            2,
            MemstressSpec {
                fill: MemstressFill::Random,
                ..Default::default()
            },
        );
        let table = memory.table();
        for page in 0..layout.working_pages() {
            let gpa = layout.working_page(page);
            let zero = (0..512)
                .filter(|word| (&*table).read_u64(gpa + word * 8).unwrap() == 0)
                .count();
            assert!(zero <= 2, "page {page} has {zero} zero words");
        }
    }

    #[test]
    fn hot_pages_get_their_visits_and_some_visits_only_read() {
        let (memory, layout) = vm(
            16 << 20,
            1,
            MemstressSpec {
                pattern: MemstressPattern::HotCold {
                    hot_percent: 10,
                    hot_visit_percent: 90,
                },
                write_percent: 50,
                ..Default::default()
            },
        );
        let end = run(&memory, 0, 40);
        assert_eq!(end.errors, 0);
        let written = end.pages_written * 100 / end.visits;
        assert!((45..55).contains(&written), "{written} % written");
        let table = memory.table();
        let hot = layout.working_pages() / 10;
        let writes = |pages: std::ops::Range<u64>| -> u64 {
            pages
                .map(|page| (&*table).read_u64(layout.working_page(page) + 8).unwrap())
                .sum()
        };
        let share = writes(0..hot) * 100 / writes(0..layout.working_pages());
        assert!((87..93).contains(&share), "{share} % to the hot pages");
    }

    #[test]
    fn damaged_control_pages_end_in_an_error_or_a_bounded_batch() {
        let offsets = (0..0x160).step_by(8);
        for (offset, value) in offsets.flat_map(|at| [(at, 0), (at, u64::MAX), (at, 1 << 63)]) {
            let (memory, _) = vm(8 << 20, 1, MemstressSpec::default());
            let table = memory.table();
            (&*table)
                .write_u64(control_page(0) + offset, value)
                .unwrap();
            let _ = run_batch(&mut &*table, 0);
            let _ = counters(&table, 1);
        }
    }
}
