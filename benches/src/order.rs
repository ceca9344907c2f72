//! The order in which pages are touched: the same for every subject of a row.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, OnceLock},
};

/// A sequence of guest frames, each at most once.
#[derive(Clone, Debug)]
pub(crate) enum Order {
    /// 0, 1, 2 …
    Sequential {
        /// How many.
        pages: u64,
    },
    /// The first `count` of a random permutation.
    Random {
        /// All frames, shuffled.
        frames: Arc<[u32]>,
        /// How many of them.
        count: usize,
    },
}

impl Order {
    pub(crate) fn sequential(pages: u64) -> Self {
        Self::Sequential { pages }
    }

    /// At most `count` frames of `pages`, shuffled.
    pub(crate) fn random(pages: u64, count: u64) -> Self {
        Self::Random {
            frames: permutation(pages),
            count: count.min(pages) as usize,
        }
    }

    pub(crate) fn len(&self) -> u64 {
        match self {
            Self::Sequential { pages } => *pages,
            Self::Random { count, .. } => *count as u64,
        }
    }

    /// The sum of all frames.
    pub(crate) fn sum(&self) -> u64 {
        match self {
            Self::Sequential { pages } => pages * (pages - 1) / 2,
            Self::Random { frames, count } => {
                frames[..*count].iter().map(|&frame| u64::from(frame)).sum()
            }
        }
    }
}

/// A permutation of `0..pages`, the same in each run of the program.
fn permutation(pages: u64) -> Arc<[u32]> {
    static MADE: OnceLock<Mutex<HashMap<u64, Arc<[u32]>>>> = OnceLock::new();
    let mut made = MADE
        .get_or_init(Mutex::default)
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    made.entry(pages)
        .or_insert_with(|| {
            let mut frames: Vec<u32> = (0..pages as u32).collect();
            shuffle(&mut frames, 0x5eed);
            frames.into()
        })
        .clone()
}

/// Fisher and Yates, with xorshift64*.
pub(crate) fn shuffle(frames: &mut [u32], seed: u64) {
    let mut state = seed | 1;
    for last in (1..frames.len()).rev() {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        let draw = state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32;
        frames.swap(last, ((draw * (last as u64 + 1)) >> 32) as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_permutation_holds_each_frame_once_and_is_no_sequence() {
        let frames = permutation(1 << 12);
        let mut sorted = frames.to_vec();
        sorted.sort_unstable();
        assert!(sorted.iter().copied().eq(0..1 << 12));
        let neighbours = frames.windows(2).filter(|pair| pair[0] + 1 == pair[1]);
        assert!(neighbours.count() < 16);
    }
}
