//! 2 MiB pages for guest memory: which blocks of a slot are one page, and whether the next is worth
//! it.
//!
//! A memfd gets 4 KiB pages unless the whole machine is set up otherwise (`shmem_enabled`). Asked
//! for a block, the kernel makes one page of 2 MiB of it whatever that setting says: a page is
//! touched, then MADV_COLLAPSE ([`Region`](super::region::Region) does both). That takes a fraction
//! of the time of 512 small pages, the guest is mapped by 2 MiB, and so are our own threads.
//!
//! Blocks are asked for in runs: at each call the kernel waits until every processor has emptied
//! its lists of pages on their way to the LRU, which takes milliseconds where they are busy. The
//! first block, and each one that is tried after others were dear, is asked for alone.
//!
//! # When huge pages are dear
//! Where the kernel must compact memory first, or get it from its own hypervisor, one block can
//! cost several times what its small pages would. The cost is processor time, or an eighth of the
//! time that passes where that is more: on a busy machine most of it is spent waiting for a
//! processor, and says nothing of pages. A block within [`CHEAP`] is never dear: its small pages
//! cost more on any machine. After a dearer one a block of small pages is measured beside it; when
//! it cost more than half as much again, or was refused, the next [`REST`] blocks get small pages,
//! twice as many after each further such block, up to [`LONGEST_REST`]. So populating costs at most
//! half as much again as small pages, and one dear block in sixteen, then in thirty-two, and so on.
//!
//! Which blocks were passed over so, and which the kernel refused, is remembered until they are one
//! page ([`Short`]): nobody gets smaller pages than asked for in silence.
//!
//! *Locking*: `chooser` is a leaf mutex, held for a few words. The map of blocks is atomic.

use std::{
    ops::Range,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicI32, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use slat_proto::model::PAGE_SIZE;

use crate::cpu_time::thread_cpu_time;

/// Pages of a block.
pub(crate) const BLOCK: u64 = 512;
/// Bytes of a block.
pub(crate) const BLOCK_BYTES: u64 = BLOCK * PAGE_SIZE;
/// A block that costs no more is taken without a question.
const CHEAP: Duration = Duration::from_micros(500);
/// Blocks of one call at most.
pub(super) const RUN: u64 = 8;
/// Blocks of small pages after one that was too dear, first and at most.
const REST: u32 = 15;
const LONGEST_REST: u32 = 255;

/// Measures what making pages costs.
#[derive(Debug)]
pub(super) struct Cost {
    passed: Instant,
    worked: Duration,
}

impl Cost {
    pub(super) fn begin() -> Self {
        Self {
            passed: Instant::now(),
            worked: thread_cpu_time(),
        }
    }

    /// Of each of so many blocks.
    pub(super) fn of_each(self, blocks: u64) -> Duration {
        let worked = thread_cpu_time().saturating_sub(self.worked);
        let cost = worked.max(self.passed.elapsed() / 8);
        cost / u32::try_from(blocks).unwrap_or(u32::MAX).max(1)
    }
}

/// See the module.
#[derive(Debug, Default)]
struct Chooser {
    small: Option<Duration>,
    rest: u32,
    left: u32,
    /// The last one was no dearer than small pages.
    cheap: bool,
}

impl Chooser {
    /// How many blocks are to be huge, none when the next is to be of small pages.
    fn next(&mut self) -> u64 {
        if self.left == 0 {
            return if self.cheap { RUN } else { 1 };
        }
        self.left -= 1;
        0
    }

    /// A huge block was made at this cost, or refused.
    fn made(&mut self, cost: Duration, refused: bool) {
        self.cheap = !refused && cost <= CHEAP;
        if self.cheap {
            self.rest = 0;
            return;
        }
        self.left = match self.small {
            // Timed first, for the comparison.
            None => 1,
            Some(small) if !refused && cost <= small * 3 / 2 => {
                self.cheap = true;
                0
            }
            Some(_) => {
                self.rest = (self.rest * 2 + 1).clamp(REST, LONGEST_REST);
                self.rest
            }
        };
    }
}

/// A bit for each block.
#[derive(Debug)]
struct Bits(Vec<AtomicU64>);

impl Bits {
    fn new(pages: u64) -> Self {
        let words = (pages / BLOCK).div_ceil(64);
        Self((0..words).map(|_| AtomicU64::new(0)).collect())
    }

    /// The rest of a slot that fills no block has no bit.
    fn put(&self, block: u64, value: bool) {
        let bit = 1 << (block % 64);
        match (self.0.get((block / 64) as usize), value) {
            (Some(word), true) => word.fetch_or(bit, Relaxed),
            (Some(word), false) => word.fetch_and(!bit, Relaxed),
            (None, _) => 0,
        };
    }

    fn has(&self, block: u64) -> bool {
        let word = self.0.get((block / 64) as usize);
        word.is_some_and(|word| word.load(Relaxed) & (1 << (block % 64)) != 0)
    }

    fn count(&self) -> u64 {
        let ones = self.0.iter().map(|word| word.load(Relaxed).count_ones());
        ones.map(u64::from).sum()
    }
}

/// Why blocks are not one page, in blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Short {
    /// Passed over while huge pages were dear.
    pub(crate) dear: u64,
    /// The kernel had none, or could not move what was there.
    pub(crate) refused: u64,
    /// What it said last.
    pub(crate) errno: i32,
    /// Pages of them were given back.
    pub(crate) given_back: u64,
}

impl Short {
    /// Of both.
    #[must_use]
    pub(crate) fn and(self, other: Self) -> Self {
        Self {
            dear: self.dear + other.dear,
            refused: self.refused + other.refused,
            errno: if other.errno == 0 {
                self.errno
            } else {
                other.errno
            },
            given_back: self.given_back + other.given_back,
        }
    }
}

/// The blocks of one slot.
#[derive(Debug)]
pub(super) struct Blocks {
    huge: Bits,
    /// Of which pages were given back.
    small: Bits,
    dear: Bits,
    refused: Bits,
    errno: AtomicI32,
    chooser: Mutex<Chooser>,
}

impl Blocks {
    /// Of a slot of so many pages, none of them huge.
    pub(super) fn new(pages: u64) -> Self {
        Self {
            huge: Bits::new(pages),
            small: Bits::new(pages),
            dear: Bits::new(pages),
            refused: Bits::new(pages),
            errno: AtomicI32::new(0),
            chooser: Mutex::default(),
        }
    }

    fn with<T>(&self, act: impl FnOnce(&mut Chooser) -> T) -> T {
        act(&mut self.chooser.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// How many of these blocks, from the first on, are to be made huge by one call; none when the
    /// first is to be of small pages.
    pub(super) fn choose(&self, blocks: Range<u64>) -> u64 {
        let run = self.with(Chooser::next);
        if run == 0 {
            self.dear.put(blocks.start, true);
        }
        run.min(blocks.end - blocks.start)
    }

    /// Blocks were made huge, at this cost each.
    pub(super) fn made(&self, blocks: Range<u64>, cost: Duration) {
        self.with(|chooser| chooser.made(cost, false));
        blocks.for_each(|block| self.set(block));
    }

    /// The kernel did not make a block huge, and said so.
    pub(super) fn not_made(&self, block: u64, cost: Duration, errno: i32) {
        self.with(|chooser| chooser.made(cost, true));
        self.refuse(block, errno);
    }

    /// The kernel did not make a block one page.
    pub(super) fn refuse(&self, block: u64, errno: i32) {
        self.refused.put(block, true);
        self.errno.store(errno, Relaxed);
    }

    /// What a block of small pages cost.
    pub(super) fn small_cost(&self, cost: Duration) {
        self.with(|chooser| chooser.small = Some(cost));
    }

    /// A block is one page now.
    pub(super) fn set(&self, block: u64) {
        self.huge.put(block, true);
        self.dear.put(block, false);
        self.refused.put(block, false);
    }

    /// A block is not one page.
    pub(super) fn unset(&self, block: u64) {
        self.huge.put(block, false);
    }

    /// Whether a block was made one page.
    pub(super) fn has(&self, block: u64) -> bool {
        self.huge.has(block)
    }

    /// Pages of a block are about to be given back: it is not one page any more, and is not to be
    /// made one, which would take all of it again.
    pub(super) fn keep_small(&self, block: u64) {
        self.small.put(block, true);
        self.dear.put(block, false);
        self.refused.put(block, false);
        self.unset(block);
    }

    /// Whether pages of a block were given back.
    pub(super) fn stays_small(&self, block: u64) -> bool {
        self.small.has(block)
    }

    /// Bytes in huge pages.
    pub(super) fn bytes(&self) -> u64 {
        self.huge.count() * BLOCK_BYTES
    }

    /// Why not all of it is.
    pub(super) fn short(&self) -> Short {
        Short {
            dear: self.dear.count(),
            refused: self.refused.count(),
            errno: self.errno.load(Relaxed),
            given_back: self.small.count(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US_400: Duration = Duration::from_micros(400);

    const fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn rests(chooser: &mut Chooser) -> u32 {
        let mut rests = 0;
        while chooser.next() == 0 {
            rests += 1;
        }
        rests
    }

    #[test]
    fn cheap_blocks_are_always_huge() {
        let mut chooser = Chooser::default();
        assert_eq!(chooser.next(), 1, "the first alone");
        for _ in 0..1000 {
            chooser.made(US_400, false);
            assert_eq!(chooser.next(), RUN);
        }
    }

    #[test]
    fn a_dear_block_is_compared_before_it_is_given_up() {
        let mut chooser = Chooser::default();
        chooser.made(ms(30), false);
        assert_eq!(rests(&mut chooser), 1);
        // Small pages are no cheaper: memory itself is dear.
        chooser.small = Some(ms(20));
        chooser.made(ms(30), false);
        assert_eq!(rests(&mut chooser), 0);
        assert_eq!(chooser.next(), RUN);
    }

    #[test]
    fn the_rest_grows_while_huge_pages_stay_dear_and_ends_with_a_cheap_one() {
        let mut chooser = Chooser {
            small: Some(ms(1)),
            ..Chooser::default()
        };
        let mut seen = Vec::new();
        for refused in [false, true, false, true, false, true] {
            chooser.made(ms(30), refused);
            seen.push(rests(&mut chooser));
        }
        assert_eq!(seen, [15, 31, 63, 127, 255, 255]);
        assert_eq!(chooser.next(), 1, "tried alone");
        chooser.made(US_400, false);
        chooser.made(ms(30), false);
        assert_eq!(rests(&mut chooser), 15);
    }

    #[test]
    fn blocks_are_counted_once() {
        let blocks = Blocks::new(BLOCK * 70 + 3);
        for block in [0, 63, 64, 69, 64] {
            blocks.set(block);
        }
        assert!(blocks.has(69) && !blocks.has(1));
        assert_eq!(blocks.bytes(), 4 * BLOCK_BYTES);
        for block in [64, 2, 70, 200] {
            blocks.keep_small(block);
        }
        assert!(blocks.stays_small(64) && !blocks.has(64) && !blocks.stays_small(63));
        assert_eq!(blocks.bytes(), 3 * BLOCK_BYTES);
    }

    #[test]
    fn why_a_block_is_small_is_known_until_it_is_huge() {
        let blocks = Blocks::new(BLOCK * 40);
        blocks.not_made(0, ms(30), libc::ENOMEM);
        assert_eq!(blocks.choose(1..40), 0, "timed for the comparison");
        blocks.small_cost(ms(1));
        blocks.made(2..3, ms(30));
        for block in 3..3 + u64::from(REST) {
            assert_eq!(blocks.choose(block..40), 0);
        }
        blocks.keep_small(30);
        let short = Short {
            dear: 1 + u64::from(REST),
            refused: 1,
            errno: libc::ENOMEM,
            given_back: 1,
        };
        assert_eq!(blocks.short(), short);
        blocks.set(0);
        blocks.set(1);
        let later = blocks.short();
        assert_eq!((later.dear, later.refused), (u64::from(REST), 0));
        assert_eq!(short.and(later).dear, 31);
        // Its pages are wanted no more: there is nothing to explain.
        blocks.keep_small(3);
        let later = blocks.short();
        assert_eq!((later.dear, later.given_back), (u64::from(REST) - 1, 2));
    }

    #[test]
    fn a_run_ends_with_the_blocks() {
        let blocks = Blocks::new(BLOCK * 40);
        blocks.made(0..1, US_400);
        assert_eq!(blocks.choose(1..40), RUN);
        assert_eq!(blocks.choose(1..4), 3);
        blocks.made(1..4, US_400);
        assert_eq!(blocks.bytes(), 4 * BLOCK_BYTES);
    }

    #[test]
    fn waiting_for_a_processor_is_no_cost_of_a_page() {
        let begun = Instant::now();
        let cost = Cost::begin();
        std::thread::sleep(ms(80));
        let slept = cost.of_each(1);
        assert!(slept <= begun.elapsed() / 4, "{slept:?}: no work was done");
        assert!(slept >= ms(10), "{slept:?}: an eighth of what passed");
        let cost = Cost::begin();
        std::thread::sleep(ms(80));
        let each = cost.of_each(4);
        assert!(each >= ms(2), "{each:?}");
    }
}
