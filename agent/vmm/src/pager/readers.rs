//! What each named reader of the working set has not been told.
//!
//! A harvest takes mappings away, so what it found nobody finds again. It is therefore put down for
//! every named reader, and a reader that looks is told what is put down for it, and loses that. A
//! question to the pager that fails loses nothing: what was found before it is put down already.
//!
//! A reader's frames are bits in pieces of 4,096 frames, so it takes at most a bit for each frame
//! of the guest. Frames that are in no slot any more are not told.
//!
//! Pure: the machine has it behind a lock that is a leaf, held for changes of bits.

use std::collections::BTreeMap;

use slat_proto::{ApiError, Reason, model::CursorName};

/// Readers of a VM.
const MOST: usize = 16;
/// Frames of a piece.
const PIECE: u64 = 4096;
const WORDS: usize = (PIECE / 64) as usize;

/// Frames, as bits.
#[derive(Debug, Default)]
struct Frames(BTreeMap<u64, Box<[u64; WORDS]>>);

impl Frames {
    fn add(&mut self, gfn: u64, pages: u64) {
        let end = gfn.saturating_add(pages);
        for frame in gfn..end {
            let piece = self.0.entry(frame / PIECE);
            let piece = piece.or_insert_with(|| Box::new([0; WORDS]));
            let bit = frame % PIECE;
            piece[(bit / 64) as usize] |= 1 << (bit % 64);
        }
    }

    /// Takes those of a range out, as runs by frame.
    fn take(&mut self, gfn: u64, pages: u64, runs: &mut Vec<(u64, u64)>) {
        let end = gfn.saturating_add(pages);
        let numbers = gfn / PIECE..end.div_ceil(PIECE);
        for (number, piece) in self.0.range_mut(numbers) {
            let from = gfn.max(number * PIECE);
            let to = end.min(number.saturating_add(1).saturating_mul(PIECE));
            for frame in from..to {
                let (word, bit) = ((frame % PIECE / 64) as usize, frame % 64);
                if piece[word] >> bit & 1 == 0 {
                    continue;
                }
                piece[word] &= !(1 << bit);
                match runs.last_mut() {
                    Some((first, len)) if *first + *len == frame => *len += 1,
                    _ => runs.push((frame, 1)),
                }
            }
        }
        self.0
            .retain(|_, piece| piece.iter().any(|word| *word != 0));
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Readers(BTreeMap<CursorName, Frames>);

impl Readers {
    /// Makes a reader, unless there is one of that name. Whether it was made.
    ///
    /// # Errors
    /// LIMIT_REACHED.
    pub(crate) fn begin(&mut self, name: &CursorName) -> Result<bool, ApiError> {
        if self.0.contains_key(name) {
            return Ok(false);
        }
        if self.0.len() >= MOST {
            let words = format!("the VM has {MOST} readers of its working set");
            return Err(ApiError::new(Reason::LimitReached, words)
                .with("limit", MOST)
                .with("cursor", name)
                .with("advice", "end one that is no longer used"));
        }
        self.0.insert(name.clone(), Frames::default());
        Ok(true)
    }

    /// Somebody found these frames.
    pub(crate) fn found(&mut self, runs: &[(u64, u64)]) {
        for frames in self.0.values_mut() {
            runs.iter()
                .for_each(|(gfn, pages)| frames.add(*gfn, *pages));
        }
    }

    /// What a reader has not been told of these ranges.
    pub(crate) fn take(
        &mut self,
        name: &CursorName,
        ranges: &[(u64, u64)],
        end: bool,
    ) -> Vec<(u64, u64)> {
        let mut runs = Vec::new();
        if let Some(frames) = self.0.get_mut(name) {
            for (gfn, pages) in ranges {
                frames.take(*gfn, *pages, &mut runs);
            }
        }
        if end {
            self.0.remove(name);
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> CursorName {
        CursorName::from_id(text).unwrap()
    }

    #[test]
    fn each_reader_is_told_what_any_found_since_its_own_last_look() {
        let mut readers = Readers::default();
        let (a, b) = (name("a"), name("b"));
        assert!(readers.begin(&a).unwrap() && !readers.begin(&a).unwrap());
        let all = [(0, u64::MAX)];
        readers.found(&[(10, 2), (4090, 10)]);
        readers.begin(&b).unwrap();
        assert!(readers.take(&b, &all, false).is_empty(), "it was not there");
        readers.found(&[(11, 2)]);
        assert_eq!(readers.take(&a, &all, false), [(10, 3), (4090, 10)]);
        assert_eq!(readers.take(&b, &all, false), [(11, 2)]);
        assert!(readers.take(&a, &all, false).is_empty());
        assert!(readers.0.values().all(|frames| frames.0.is_empty()));
    }

    #[test]
    fn what_is_not_asked_for_is_told_another_time() {
        let mut readers = Readers::default();
        let a = name("a");
        readers.begin(&a).unwrap();
        readers.found(&[(0, 10_000)]);
        assert_eq!(readers.take(&a, &[(5000, 10)], false), [(5000, 10)]);
        let rest = readers.take(&a, &[(0, 20_000)], true);
        assert_eq!(rest, [(0, 5000), (5010, 4990)]);
        assert!(readers.0.is_empty(), "it has ended");
    }

    #[test]
    fn there_is_a_limit_and_an_end() {
        let mut readers = Readers::default();
        for number in 0..MOST {
            readers.begin(&name(&format!("r{number}"))).unwrap();
        }
        let error = readers.begin(&name("more")).unwrap_err();
        assert_eq!(error.reason, Reason::LimitReached);
        assert_eq!(error.metadata["limit"], "16");
        readers.take(&name("r3"), &[], true);
        assert!(readers.begin(&name("more")).unwrap());
    }
}
