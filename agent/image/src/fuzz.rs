//! Damaged images: what a reader must do with one is refuse it or understand it, and never panic.
//! The test beside this gives it damaged ones in bounded rounds; `fuzz/` gives the same function to
//! libFuzzer (`cargo xtask fuzz`).
//!
//! Each input is read twice: as it is, and with all checksums set right, or hardly anything behind
//! them would be reached. An increment is opened over a base that is right.
//!
//! The order is that of a seed: a failure prints seed, round and input. `SLAT_FUZZ_SEED` and
//! `SLAT_FUZZ_ROUNDS` choose others. With `SLAT_FUZZ_SEEDS` a folder gets the valid inputs.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
};

use self::repair::repair;
use crate::{
    Base, ClusterBuffer, Compression, ImageError, ImageId, Mark, MemorySpec, Options, PAGE_SIZE,
    PageKind, Reader, Section, Storage, WorkingRun, Writer, inspect, working_set_section,
};

mod repair;
#[cfg(test)]
mod rounds;

/// As libFuzzer's target is called.
pub const NAME: &str = "image";

/// Pages of a memory that are read one by one.
const READ: u64 = 40;

/// Gives the reader one input. Whether it was understood.
///
/// # Panics
/// When the reader does, or contradicts itself.
#[must_use]
pub fn run(input: &[u8]) -> bool {
    let mut input = input.to_vec();
    let understood = read(&input);
    repair(&mut input);
    understood | read(&input)
}

/// Valid images: without a base, and one over the base that increments are
/// opened over.
///
/// # Panics
/// Never: they are valid.
#[must_use]
pub fn corpus() -> Vec<Vec<u8>> {
    let mut noise = [0; PAGE_SIZE];
    let mut number = 1_u32;
    for byte in &mut noise {
        number = number.wrapping_mul(0x9e37_79b1) ^ (number >> 15);
        *byte = number as u8;
    }
    let written = [
        write(1, Compression::None, None, 3, &[(0, &[7; 3 * PAGE_SIZE])]),
        write(
            1,
            Compression::Zstd(1),
            None,
            1030,
            &[(1023, &[8; PAGE_SIZE]), (5, &noise)],
        ),
        write(1, Compression::Zstd(1), None, 0, &[]),
        write(
            2,
            Compression::Zstd(1),
            Some(base()),
            20,
            &[(9, &[6; PAGE_SIZE])],
        ),
    ];
    written.into_iter().flatten().collect()
}

/// A file in memory.
#[derive(Debug, Default)]
struct Ram(Mutex<Vec<u8>>);

impl Storage for Ram {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let end = offset as usize + bytes.len();
        let longer = all.len().max(end);
        all.resize(longer, 0);
        all[offset as usize..end].copy_from_slice(bytes);
        Ok(bytes.len())
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let from = usize::try_from(offset)
            .ok()
            .and_then(|offset| all.get(offset..));
        let from = from.unwrap_or_default();
        let count = from.len().min(buffer.len());
        buffer[..count].copy_from_slice(&from[..count]);
        Ok(count)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap_or_else(PoisonError::into_inner).len() as u64)
    }
}

fn write(
    id: u8,
    compression: Compression,
    base: Option<Base>,
    pages: u64,
    given: &[(u64, &[u8])],
) -> Result<Vec<u8>, ImageError> {
    let storage = Arc::new(Ram::default());
    let options = Options {
        id: ImageId([id; 16]),
        compression,
        base,
    };
    let writer = Writer::new(&*storage, &options)?;
    for (number, pages) in [(0, pages), (9, pages / 3)] {
        writer.add_memory(MemorySpec { number, pages })?;
    }
    for (first, pages) in given {
        writer.write(0, *first, pages)?;
    }
    if pages > 0 {
        writer
            .mark(0, 2, 1, Mark::Zero)
            .or_else(|error| match error {
                ImageError::Twice { .. } => Ok(()),
                error => Err(error),
            })?;
    }
    for (name, contents) in [("spec", &b"a VM"[..]), ("slots", &[])] {
        writer.add_section(Section {
            name: name.to_owned(),
            version: 1,
            optional: contents.is_empty(),
            contents: contents.to_vec(),
        })?;
    }
    let last = |number, pages: u64| {
        let first = pages.saturating_sub(1);
        (pages > 0).then_some(WorkingRun {
            memory: number,
            first,
            pages: 1,
        })
    };
    let runs: Vec<WorkingRun> = [last(0, pages), last(9, pages / 3)]
        .into_iter()
        .flatten()
        .collect();
    let memories = [(0, pages), (9, pages / 3)].map(|(number, pages)| MemorySpec { number, pages });
    writer.add_section(working_set_section(&runs, &memories)?)?;
    writer.finish()?;
    let bytes = storage.0.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(bytes.clone())
}

/// What increments are opened over, always the same.
fn opened_base() -> Option<Reader<Arc<Ram>>> {
    let page = [3; 6 * PAGE_SIZE];
    let bytes = write(3, Compression::Zstd(1), None, 25, &[(6, &page)]).ok()?;
    Reader::open(Arc::new(Ram(Mutex::new(bytes))), None).ok()
}

fn base() -> Base {
    let opened = opened_base();
    #[expect(
        clippy::expect_used,
        reason = "it is written here, and always the same"
    )]
    opened.expect("a valid base").as_base()
}

/// Opens and reads all of it. Whether nothing was wrong.
fn read(bytes: &[u8]) -> bool {
    let storage = Arc::new(Ram(Mutex::new(bytes.to_vec())));
    let wants_base = inspect(&storage).is_ok_and(|summary| summary.base.is_some());
    let base = if wants_base { opened_base() } else { None };
    let Ok(reader) = Reader::open(storage, base.map(Arc::new)) else {
        return false;
    };
    let whole = reader.verify(3).is_ok_and(|verified| {
        assert!(verified.faults.len() <= 3);
        verified.faults.is_empty()
    });
    let mut right = reader.sections().is_ok();
    // What it says of a working set is in its memories, in order, and does not make it wrong.
    if let Ok(Some(runs)) = reader.working_set() {
        let ends = |run: &WorkingRun| (run.memory, run.first + run.pages);
        let ordered = runs
            .windows(2)
            .all(|two| ends(&two[0]) <= (two[1].memory, two[1].first));
        let memories: std::collections::BTreeMap<u32, u64> = reader
            .memories()
            .iter()
            .map(|memory| (memory.number, memory.pages))
            .collect();
        let within = |run: &WorkingRun| run.pages > 0 && ends(run).1 <= memories[&run.memory];
        assert!(ordered && runs.iter().all(within), "{runs:?}");
    }
    let mut page = [0; PAGE_SIZE];
    let mut buffer = ClusterBuffer::default();
    for memory in reader.memories() {
        let last = memory.pages.saturating_sub(1);
        for number in (0..memory.pages.min(READ)).chain([last]) {
            let kind = reader.page(memory.number, number, &mut page);
            right &= kind.is_ok() || memory.pages == 0;
            let cluster = reader.cluster_of(memory.number, number);
            if let (Ok(kind), Ok(cluster)) = (kind, cluster) {
                assert_eq!(kind == PageKind::Data, cluster.is_some());
                let has = |cluster: crate::Cluster| cluster.pages().any(|of| of == number);
                assert!(cluster.is_none_or(has));
            }
        }
    }
    if let Ok(clusters) = reader.clusters() {
        for cluster in clusters {
            let pages = cluster.and_then(|cluster| {
                let pages = reader.read_cluster(&cluster, &mut buffer)?.count();
                assert_eq!(pages as u32, cluster.count());
                Ok(pages)
            });
            right &= pages.is_ok();
        }
    } else {
        right = false;
    }
    assert!(right || !whole, "what can be verified can be read");
    whole
}
