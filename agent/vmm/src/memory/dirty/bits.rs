//! Bit arithmetic on dirty bitmaps: bit `i % 64` of word `i / 64` is page `i` of the slot, as in KVM's dirty log.
//!
//! Bits at and above the slot's number of pages are never set by these functions.

/// Words that hold `pages` bits.
pub(super) fn words(pages: u64) -> usize {
    pages.div_ceil(64) as usize
}

/// An empty bitmap for `pages` pages.
pub(super) fn empty(pages: u64) -> Vec<u64> {
    vec![0; words(pages)]
}

/// Number of set bits.
pub(super) fn count(bits: &[u64]) -> u64 {
    bits.iter().map(|word| u64::from(word.count_ones())).sum()
}

/// Clears the bits at and above `pages`.
pub(super) fn trim(bits: &mut [u64], pages: u64) {
    if !pages.is_multiple_of(64)
        && let Some(last) = bits.get_mut((pages / 64) as usize)
    {
        *last &= (1 << (pages % 64)) - 1;
    }
}

/// `to |= from`, as far as both reach.
pub(super) fn or(to: &mut [u64], from: &[u64]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to |= from;
    }
}

/// Sets bits `[first, first + len)`; the caller has checked that they are inside.
pub(super) fn set(bits: &mut [u64], first: u64, len: u64) {
    let end = first + len;
    let mut page = first;
    while page < end {
        let (word, bit) = ((page / 64) as usize, page % 64);
        let here = (64 - bit).min(end - page);
        let mask = if here == 64 {
            u64::MAX
        } else {
            ((1 << here) - 1) << bit
        };
        if let Some(word) = bits.get_mut(word) {
            *word |= mask;
        }
        page += here;
    }
}

/// Runs of set bits as (first, length), ascending.
pub(super) fn runs(bits: &[u64]) -> impl Iterator<Item = (u64, u64)> {
    let end = bits.len() as u64 * 64;
    let mut at = 0;
    std::iter::from_fn(move || {
        let first = next(bits, at, false)?;
        at = next(bits, first, true).unwrap_or(end);
        Some((first, at - first))
    })
}

/// First bit at or after `from` that is set (or clear, when `inverted`).
fn next(bits: &[u64], from: u64, inverted: bool) -> Option<u64> {
    let flip = if inverted { u64::MAX } else { 0 };
    let mut index = (from / 64) as usize;
    let mut word = (bits.get(index)? ^ flip) & (u64::MAX << (from % 64));
    while word == 0 {
        index += 1;
        word = bits.get(index)? ^ flip;
    }
    Some(index as u64 * 64 + u64::from(word.trailing_zeros()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn ranges_and_runs_agree_with_single_bits(
            pages in 1_u64..400,
            ranges in prop::collection::vec((0_u64..400, 0_u64..200), 0..12),
        ) {
            let mut bits = empty(pages);
            let mut model = vec![false; pages as usize];
            for (first, len) in ranges {
                let first = first.min(pages);
                let len = len.min(pages - first);
                set(&mut bits, first, len);
                model[first as usize..(first + len) as usize].fill(true);
            }
            prop_assert_eq!(count(&bits), model.iter().filter(|set| **set).count() as u64);
            let mut back = vec![false; pages as usize];
            let mut before = None;
            for (first, len) in runs(&bits) {
                prop_assert!(len > 0 && before.is_none_or(|end| first > end), "runs touch or overlap");
                before = Some(first + len);
                back[first as usize..(first + len) as usize].fill(true);
            }
            prop_assert_eq!(back, model);
        }

        #[test]
        fn trimming_keeps_exactly_the_slots_pages(pages in 1_u64..300) {
            let mut bits = vec![u64::MAX; words(pages)];
            trim(&mut bits, pages);
            prop_assert_eq!(runs(&bits).collect::<Vec<_>>(), vec![(0, pages)]);
        }
    }
}
