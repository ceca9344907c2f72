//! Which pages the guest of a saved VM had touched: a section that a lazy restore reads first.
//!
//! # The section
//! Name `working-set`, version 1, optional: who does not know it, or knows another version, goes on
//! without. All numbers are little-endian.
//!
//! | at | what |
//! |---|---|
//! | 0 | u32: how many runs, at most 65,536 |
//! | 4 | u32: zero |
//! | 8 | a row of 24 bytes for each run |
//!
//! A row: u32 the memory's number, u32 zero, u64 the first page, u64 how many. Runs stand by
//! memory and page, have at least one page, do not overlap, and lie in memories of the file: so
//! all of them together have no more pages than those. They are read in this order.

use crate::{
    error::ImageError,
    format::bytes::Bytes,
    names::{MemorySpec, Section},
};

/// The section's name.
pub const WORKING_SET: &str = "working-set";
/// Of its contents.
const VERSION: u32 = 1;
/// Runs of a section.
pub const MAX_WORKING_SET: usize = 1 << 16;
const HEAD: usize = 8;
const ROW: usize = 24;

/// Neighbouring pages that the guest had touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkingRun {
    /// The memory's number.
    pub memory: u32,
    /// The first page.
    pub first: u64,
    /// How many.
    pub pages: u64,
}

/// The section that says this of a file with these memories.
///
/// # Errors
/// `Limit` for more than [`MAX_WORKING_SET`] runs; `NoSuchMemory`, `NoSuchPage`, and `Twice` for
/// runs that are not in order.
pub fn working_set_section(
    runs: &[WorkingRun],
    memories: &[MemorySpec],
) -> Result<Section, ImageError> {
    if runs.len() > MAX_WORKING_SET {
        return Err(ImageError::Limit {
            what: "runs of a working set",
            found: runs.len() as u64,
            most: MAX_WORKING_SET as u64,
        });
    }
    let mut contents = Vec::with_capacity(HEAD + runs.len() * ROW);
    // At most 2^16.
    contents.extend((runs.len() as u32).to_le_bytes());
    contents.extend([0; 4]);
    let mut before = None;
    for run in runs {
        let WorkingRun {
            memory,
            first,
            pages,
        } = *run;
        let has = pages_of(memories, memory).ok_or(ImageError::NoSuchMemory { memory })?;
        let end = first.checked_add(pages).filter(|_| pages > 0);
        let end = end.filter(|end| *end <= has);
        let end = end.ok_or(ImageError::NoSuchPage {
            memory,
            page: first,
        })?;
        if before.is_some_and(|before| (memory, first) < before) {
            let what = format!("page {first} of memory {memory} in a working set");
            return Err(ImageError::Twice { what });
        }
        before = Some((memory, end));
        contents.extend(memory.to_le_bytes());
        contents.extend([0; 4]);
        contents.extend(first.to_le_bytes());
        contents.extend(pages.to_le_bytes());
    }
    Ok(Section {
        name: WORKING_SET.to_owned(),
        version: VERSION,
        optional: true,
        contents,
    })
}

/// What a section says, of a file with these memories; `None` for one of another version.
pub(crate) fn decode(
    section: &Section,
    memories: &[MemorySpec],
) -> Result<Option<Vec<WorkingRun>>, ImageError> {
    if section.version != VERSION {
        return Ok(None);
    }
    let mut left = Bytes::new(&section.contents, 0);
    let wrong = |what| ImageError::corrupt(what, 0);
    let count = left.u32()? as usize;
    left.zeroes(4)?;
    if count > MAX_WORKING_SET || section.contents.len() != HEAD + count * ROW {
        return Err(wrong("the length of a working set"));
    }
    let mut runs: Vec<WorkingRun> = Vec::with_capacity(count);
    for _ in 0..count {
        let memory = left.u32()?;
        left.zeroes(4)?;
        let run = WorkingRun {
            memory,
            first: left.u64()?,
            pages: left.u64()?,
        };
        let end = run.first.checked_add(run.pages).filter(|_| run.pages > 0);
        let has = pages_of(memories, memory);
        if end.is_none_or(|end| has.is_none_or(|has| end > has)) {
            return Err(wrong("a working set has pages that the file has not"));
        }
        // The end of the one before was looked at.
        let goes_on =
            |last: &WorkingRun| (last.memory, last.first + last.pages) <= (run.memory, run.first);
        if !runs.last().is_none_or(goes_on) {
            return Err(wrong("the order of a working set"));
        }
        runs.push(run);
    }
    Ok(Some(runs))
}

/// Memories stand by number.
fn pages_of(memories: &[MemorySpec], number: u32) -> Option<u64> {
    let at = memories.binary_search_by_key(&number, |memory| memory.number);
    at.ok().map(|at| memories[at].pages)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMORIES: [MemorySpec; 2] = [
        MemorySpec {
            number: 0,
            pages: 100,
        },
        MemorySpec {
            number: 7,
            pages: 10,
        },
    ];

    fn run(memory: u32, first: u64, pages: u64) -> WorkingRun {
        WorkingRun {
            memory,
            first,
            pages,
        }
    }

    /// A section with any rows in it.
    fn hostile(runs: &[WorkingRun]) -> Section {
        let mut contents = (runs.len() as u32).to_le_bytes().to_vec();
        contents.extend([0; 4]);
        for run in runs {
            contents.extend(run.memory.to_le_bytes());
            contents.extend([0; 4]);
            contents.extend(run.first.to_le_bytes());
            contents.extend(run.pages.to_le_bytes());
        }
        Section {
            name: WORKING_SET.to_owned(),
            version: VERSION,
            optional: true,
            contents,
        }
    }

    #[test]
    fn what_is_said_is_read() {
        for runs in [
            vec![],
            vec![run(0, 0, 5), run(0, 5, 1), run(0, 99, 1), run(7, 0, 10)],
        ] {
            let section = working_set_section(&runs, &MEMORIES).unwrap();
            assert!(section.optional);
            assert_eq!(decode(&section, &MEMORIES).unwrap(), Some(runs));
        }
        let newer = Section {
            version: 2,
            ..hostile(&[run(9, 9, 9)])
        };
        assert_eq!(decode(&newer, &MEMORIES).unwrap(), None);
    }

    #[test]
    fn what_means_nothing_is_refused_from_both_sides() {
        for runs in [
            &[run(0, 5, 1), run(0, 4, 1)][..],
            &[run(0, 5, 2), run(0, 6, 1)],
            &[run(7, 0, 1), run(0, 0, 1)],
            &[run(0, 100, 1)],
            &[run(0, 99, 2)],
            &[run(0, u64::MAX, 1)],
            &[run(0, 1, u64::MAX)],
            &[run(0, 3, 0)],
            &[run(3, 0, 1)],
        ] {
            assert!(working_set_section(runs, &MEMORIES).is_err(), "{runs:?}");
            let error = decode(&hostile(runs), &MEMORIES).unwrap_err();
            assert!(matches!(error, ImageError::Corrupt { .. }), "{runs:?}");
        }
    }

    #[test]
    fn a_length_is_bounded_before_it_is_used() {
        let many: Vec<WorkingRun> = (0..=MAX_WORKING_SET as u64)
            .map(|at| run(0, at, 1))
            .collect();
        let memories = [MemorySpec {
            number: 0,
            pages: 1 << 20,
        }];
        assert!(working_set_section(&many, &memories).is_err());
        assert!(decode(&hostile(&many), &memories).is_err());
        let most = &many[..MAX_WORKING_SET];
        assert!(decode(&hostile(most), &memories).is_ok());
        let mut claims = hostile(&[run(0, 0, 1)]);
        claims.contents[..4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(decode(&claims, &memories).is_err());
        for length in 0..claims.contents.len() {
            let mut cut = hostile(&[run(0, 0, 1)]);
            cut.contents.truncate(length);
            assert!(decode(&cut, &memories).is_err(), "{length}");
        }
        let mut longer = hostile(&[run(0, 0, 1)]);
        longer.contents.push(0);
        assert!(decode(&longer, &memories).is_err());
    }
}
