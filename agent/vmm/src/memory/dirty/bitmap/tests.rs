//! The bitmap against a model with one `bool` a page, and what it leaves untouched.

use proptest::prelude::*;

use super::DirtyBitmap;

/// Three groups and a piece of a fourth, which ends within a word.
const MOST: u64 = 3 * 4096 + 100;

/// What the bitmap says is exactly what the model says, whichever way one asks.
fn check(bitmap: &DirtyBitmap, model: &[bool]) -> Result<(), TestCaseError> {
    let dirty = model.iter().filter(|dirty| **dirty).count() as u64;
    prop_assert_eq!(bitmap.count(), dirty);
    prop_assert_eq!(bitmap.is_empty(), dirty == 0);
    let mut back = vec![false; model.len()];
    let mut before = None;
    for (first, len) in bitmap.runs() {
        prop_assert!(
            len > 0 && before.is_none_or(|end| first > end),
            "runs touch or overlap"
        );
        before = Some(first + len);
        back[first as usize..(first + len) as usize].fill(true);
    }
    prop_assert!(back == model, "runs");
    for words in [4, 64, 128] {
        let mut back = vec![false; model.len()];
        let mut from = 0;
        while let Some((first, piece)) = bitmap.next_piece(from, words) {
            prop_assert!(first >= from && first.is_multiple_of(words));
            prop_assert!(
                piece.iter().any(|word| *word != 0),
                "a piece with nothing in it"
            );
            for (index, word) in piece.iter().enumerate() {
                for bit in (0..64).filter(|bit| word >> bit & 1 == 1) {
                    back[(first + index) * 64 + bit] = true;
                }
            }
            from = first + words;
        }
        prop_assert!(back == model, "pieces of {} words", words);
    }
    Ok(())
}

#[derive(Clone, Debug)]
enum Op {
    Set(u64, u64),
    Clear,
    /// With a bitmap of these pages.
    Unite(Vec<(u64, u64)>),
    /// Goes on with what is left of this page, or right of it.
    Split(u64, bool),
    /// Clears, then loads these; whether the source says how many.
    Load(Vec<(u64, u64)>, bool),
}

fn range() -> impl Strategy<Value = (u64, u64)> {
    let len = prop_oneof![4 => 1_u64..4, 2 => 1_u64..200, 1 => 1..MOST];
    (0..MOST, len)
}

fn op() -> impl Strategy<Value = Op> {
    let ranges = || prop::collection::vec(range(), 0..5);
    prop_oneof![
        6 => range().prop_map(|(first, len)| Op::Set(first, len)),
        1 => Just(Op::Clear),
        2 => ranges().prop_map(Op::Unite),
        2 => (0..=MOST, any::<bool>()).prop_map(|(page, right)| Op::Split(page, right)),
        2 => (ranges(), any::<bool>()).prop_map(|(ranges, says)| Op::Load(ranges, says)),
    ]
}

/// A bitmap of `pages` pages with those of `ranges` that it has, and its model.
fn build(pages: u64, ranges: &[(u64, u64)]) -> (DirtyBitmap, Vec<bool>) {
    let (mut bitmap, mut model) = (DirtyBitmap::new(pages), vec![false; pages as usize]);
    for &(first, len) in ranges {
        let first = first.min(pages);
        let len = len.min(pages - first);
        bitmap.set(first, len);
        model[first as usize..(first + len) as usize].fill(true);
    }
    (bitmap, model)
}

proptest! {
    #[test]
    fn it_is_a_set_of_pages(
        pages in prop_oneof![1..MOST, Just(64), Just(4096), Just(8192), Just(MOST)],
        ops in prop::collection::vec(op(), 1..12),
    ) {
        let (mut bitmap, mut model) = build(pages, &[]);
        for op in ops {
            match op {
                Op::Set(first, len) => {
                    let (_, other) = build(pages, &[(first, len)]);
                    let first = first.min(pages);
                    bitmap.set(first, len.min(pages - first));
                    model.iter_mut().zip(other).for_each(|(to, from)| *to |= from);
                }
                Op::Clear => {
                    bitmap.clear();
                    model.fill(false);
                }
                Op::Unite(ranges) => {
                    let (other, theirs) = build(pages, &ranges);
                    bitmap.unite(&other);
                    model.iter_mut().zip(theirs).for_each(|(to, from)| *to |= from);
                }
                Op::Split(page, right) => {
                    let at = page.min(pages) as usize;
                    let rest = bitmap.split_off(page);
                    let mut theirs = model.clone();
                    theirs[..at].fill(false);
                    model[at..].fill(false);
                    check(&rest, &theirs)?;
                    check(&bitmap, &model)?;
                    if right {
                        (bitmap, model) = (rest, theirs);
                    }
                }
                Op::Load(ranges, says) => {
                    bitmap.clear();
                    model = build(pages, &ranges).1;
                    let dirty = model.iter().filter(|dirty| **dirty).count() as u64;
                    let loaded = bitmap.load(|words| {
                        for page in (0..model.len()).filter(|page| model[*page]) {
                            words[page / 64] |= 1 << (page % 64);
                        }
                        if !says && pages % 64 != 0 {
                            // Above the slot's end: not the slot's pages.
                            *words.last_mut().unwrap() |= 1 << 63;
                        }
                        Ok::<_, ()>(if says { dirty } else { u64::MAX })
                    });
                    prop_assert_eq!(loaded, Ok(dirty));
                }
            }
            check(&bitmap, &model)?;
        }
    }
}

#[test]
fn every_page_of_a_full_bitmap_is_in_one_run() {
    for pages in [1, 63, 64, 65, 4096, 4097, MOST] {
        let bitmap = DirtyBitmap::full(pages);
        assert_eq!(bitmap.count(), pages);
        assert_eq!(bitmap.runs().collect::<Vec<_>>(), vec![(0, pages)]);
    }
}

#[test]
fn what_a_failed_load_has_set_is_kept() {
    let mut bitmap = DirtyBitmap::new(200);
    let failed = bitmap.load(|words| {
        words[1] = 1;
        words[3] = u64::MAX;
        Err("in the middle")
    });
    assert_eq!(failed, Err("in the middle"));
    assert_eq!(bitmap.runs().collect::<Vec<_>>(), vec![(64, 1), (192, 8)]);
}

#[test]
#[should_panic(expected = "not all in the slot's 10")]
fn pages_beyond_the_slot_are_refused() {
    DirtyBitmap::new(10).set(9, 2);
}

/// Pages of the bitmap's words that are in memory: what was never touched is not.
pub(in super::super) fn touched(bitmap: &DirtyBitmap) -> usize {
    const PAGE: usize = 4096;
    let start = bitmap.words.as_ptr().addr();
    // The allocator's own words share the first page.
    let first = start.next_multiple_of(PAGE);
    let pages = (start + size_of_val(&*bitmap.words) - first) / PAGE;
    let mut state = vec![0_u8; pages];
    // SAFETY: whole pages of an allocation that lives, and a byte of `state` for each.
    let result = unsafe {
        libc::mincore(
            std::ptr::without_provenance_mut(first),
            pages * PAGE,
            state.as_mut_ptr(),
        )
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    state.iter().filter(|page| **page & 1 == 1).count()
}

#[test]
fn clean_regions_of_a_bitmap_of_4_tib_are_never_touched() {
    const PAGES: u64 = 4 << 28;
    let mut bitmap = DirtyBitmap::new(PAGES);
    let untouched = |bitmap: &DirtyBitmap| {
        assert_eq!(touched(bitmap), 0, "pages of a bitmap of 32768");
    };
    assert_eq!(bitmap.load(|_| Ok::<_, ()>(0)), Ok(0));
    assert_eq!((bitmap.count(), bitmap.is_empty()), (0, true));
    assert_eq!(bitmap.runs().next(), None);
    assert!(bitmap.next_piece(0, 4).is_none());
    bitmap.unite(&DirtyBitmap::new(PAGES));
    untouched(&bitmap.split_off(PAGES / 2));
    bitmap.clear();
    untouched(&bitmap);

    // Distant pages cost a page of the bitmap each, and no operation touches another.
    let dirty = [(5, 1), (PAGES / 2 - 1, 2), (PAGES - 1, 1)];
    for (first, len) in dirty {
        bitmap.set(first, len);
    }
    let mut other = DirtyBitmap::new(PAGES);
    other.unite(&bitmap);
    let rest = other.split_off(PAGES / 2);
    assert_eq!(bitmap.runs().collect::<Vec<_>>(), dirty);
    assert_eq!((other.count(), rest.count()), (2, 2));
    let mut pieces = 0;
    let mut from = 0;
    while let Some((first, _)) = bitmap.next_piece(from, 4) {
        pieces += 1;
        from = first + 4;
    }
    assert_eq!(pieces, 4);
    bitmap.clear();
    assert!(bitmap.is_empty());
    for bitmap in [bitmap, other, rest] {
        let touched = touched(&bitmap);
        // Of 32768; with transparent huge pages each brings its neighbours.
        assert!((1..=4 * 512).contains(&touched), "{touched}");
    }
}
