//! A source that fails as it is told to.

use std::{
    ops::Range,
    sync::{
        Condvar, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use slat_pager::{Contents, Source, Trouble};
use slat_paging::{PAGE, wire::ProblemKind};

/// What goes wrong with a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wrong {
    Nothing,
    /// An error of this kind.
    Fails(ProblemKind),
    /// It gives less than it is asked for.
    Short,
    /// It does not come back.
    Hangs,
}

pub(crate) struct Fake {
    wrong: Mutex<(Wrong, Range<u64>)>,
    mended: Condvar,
    pub(crate) reads: AtomicU64,
    pub(crate) pages: AtomicU64,
    /// Pages that are best read together.
    pub(crate) together: u64,
    pub(crate) delay: Duration,
    /// What is best read first.
    pub(crate) first: Vec<(u32, Range<u64>)>,
    /// The first page of each read.
    pub(crate) begun: Mutex<Vec<u64>>,
}

impl Fake {
    pub(crate) fn new() -> Self {
        Self {
            wrong: Mutex::new((Wrong::Nothing, 0..0)),
            mended: Condvar::new(),
            reads: AtomicU64::new(0),
            pages: AtomicU64::new(0),
            together: 16,
            delay: Duration::ZERO,
            first: Vec::new(),
            begun: Mutex::default(),
        }
    }

    /// From now on reads of these pages go wrong.
    pub(crate) fn set(&self, wrong: Wrong, pages: Range<u64>) {
        *self.wrong.lock().unwrap() = (wrong, pages);
        self.mended.notify_all();
    }

    /// What a page has. Every fourth is zeroes.
    pub(crate) fn word(memory: u32, page: u64) -> u64 {
        if page % 4 == 3 {
            0
        } else {
            page * 1000 + u64::from(memory) + 1
        }
    }
}

impl Source for Fake {
    fn read(&self, memory: u32, pages: Range<u64>, into: &mut Contents) -> Result<(), Trouble> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.begun.lock().unwrap().push(pages.start);
        self.pages
            .fetch_add(pages.end - pages.start, Ordering::Relaxed);
        if !self.delay.is_zero() {
            std::thread::sleep(self.delay);
        }
        let mut wrong = self.wrong.lock().unwrap();
        let meets = |range: &Range<u64>| pages.start < range.end && range.start < pages.end;
        let mut end = pages.end;
        loop {
            match wrong.0 {
                _ if !meets(&wrong.1) => break,
                Wrong::Nothing => break,
                Wrong::Fails(kind) => return Err(Trouble::new(kind, "told to fail")),
                Wrong::Short => {
                    end = end.min(wrong.1.start.max(pages.start));
                    break;
                }
                Wrong::Hangs => wrong = self.mended.wait(wrong).unwrap(),
            }
        }
        drop(wrong);
        for page in pages.start..end {
            match Self::word(memory, page) {
                0 => into.zeroes(page, 1),
                word => {
                    let room = into.room(page, 1);
                    room.fill(0);
                    room[..8].copy_from_slice(&word.to_ne_bytes());
                    room[PAGE - 8..].copy_from_slice(&word.to_ne_bytes());
                }
            }
        }
        Ok(())
    }

    fn first(&self) -> Vec<(u32, Range<u64>)> {
        self.first.clone()
    }

    fn together(&self, _: u32, page: u64) -> Range<u64> {
        let first = page / self.together * self.together;
        first..first + self.together
    }
}
