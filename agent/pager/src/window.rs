//! How many pages to map beside the one that was asked for.
//!
//! A fault that goes on where an earlier one's pages ended is *sequential*: the next time twice as
//! many pages are taken, up to [`Tuning::most`](crate::Tuning). Any other is *random*: it takes
//! the aligned group that it is in ([`Tuning::around`](crate::Tuning)), as the kernel does for
//! files; mapping a neighbour costs a hundredth of a fault. Where pages before the faulting one are
//! not in the file, which cannot be seen beforehand, a number of faults take only those after them.
//! Several streams are remembered, because a guest has several processors.
//!
//! *Locking*: one lock, held for a look at a handful of numbers.

use std::{ops::Range, sync::Mutex};

use crate::sync::lock;

const STREAMS: usize = 8;
/// Random faults after which it is tried again what is before one.
const FORWARD: u32 = 64;
/// Frames under one table of the mirror: what one batch can map.
const TABLE: u64 = 512;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Windows(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    streams: [Stream; STREAMS],
    /// Which stream is forgotten next.
    hand: usize,
    /// So many random faults more take no pages before them.
    forward: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Stream {
    /// Where it goes on; 0: there is no stream.
    next: u64,
    /// How many pages it took the last time.
    pages: u64,
}

/// What to take with a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    /// The pages, the one asked for among them.
    pub(crate) pages: Range<u64>,
    /// Whether it goes on from an earlier fault.
    pub(crate) sequential: bool,
}

impl Windows {
    /// For a fault at `page` of `all`, of which `base` tells how tables divide frames: a page's
    /// frame is `base + page`.
    pub(crate) fn at(&self, page: u64, all: u64, base: u64, around: u64, most: u64) -> Window {
        let mut inner = lock(&self.0);
        let table_end = ((base + page) / TABLE + 1) * TABLE - base;
        let stream = inner.streams.iter().position(|stream| stream.next == page);
        if let (Some(at), true) = (stream, page > 0) {
            let pages = (inner.streams[at].pages * 2).clamp(1, most.max(1));
            let end = (page + pages).min(all).min(table_end);
            inner.streams[at] = Stream { next: end, pages };
            return Window {
                pages: page..end,
                sequential: true,
            };
        }
        let frame = base + page;
        let group = frame - frame % around.max(1);
        // Only what one table has, whatever the group's size is.
        let start = group.max(frame - frame % TABLE).max(base) - base;
        let start = if inner.forward > 0 { page } else { start };
        inner.forward = inner.forward.saturating_sub(1);
        let end = group + around.max(1) - base;
        let pages = start..end.min(all).min(table_end);
        let hand = inner.hand;
        inner.hand = (hand + 1) % STREAMS;
        inner.streams[hand] = Stream {
            next: pages.end,
            pages: (pages.end - pages.start).max(1),
        };
        Window {
            pages,
            sequential: false,
        }
    }

    /// Whether a fault at `page` goes on from an earlier one.
    pub(crate) fn goes_on(&self, page: u64) -> bool {
        let inner = lock(&self.0);
        page > 0 && inner.streams.iter().any(|stream| stream.next == page)
    }

    /// Pages before a random fault were not in the file.
    pub(crate) fn had_holes(&self) {
        lock(&self.0).forward = FORWARD;
    }

    /// The pages that were taken in the end, if they were fewer: the stream goes on there.
    pub(crate) fn ended(&self, wanted: u64, ended: u64) {
        let mut inner = lock(&self.0);
        if let Some(stream) = inner
            .streams
            .iter_mut()
            .find(|stream| stream.next == wanted)
        {
            stream.next = ended;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequential_faults_widen_and_random_ones_take_their_group() {
        let windows = Windows::default();
        let mut page = 96;
        let mut widths = Vec::new();
        for _ in 0..8 {
            let window = windows.at(page, 1 << 20, 0, 16, 512);
            assert!(window.pages.contains(&page));
            widths.push(window.pages.end - window.pages.start);
            page = window.pages.end;
        }
        assert!(widths[0] == 16 && widths[6] > 128, "{widths:?}");
        for far in 1..10 {
            let window = windows.at(far * 1600 + 7, 1 << 20, 0, 16, 512);
            assert_eq!(window.pages, far * 1600..far * 1600 + 16);
        }
        // By frames, not by pages.
        assert_eq!(windows.at(9000, 1 << 20, 3, 16, 512).pages, 8989..9005);
        windows.had_holes();
        for far in 1..66 {
            let window = windows.at(far * 3200 + 7, 1 << 20, 0, 16, 512);
            let before = if far > 64 { 7 } else { 0 };
            let page = far * 3200 + 7;
            assert_eq!(window.pages, page - before..far * 3200 + 16);
        }
    }

    #[test]
    fn a_window_stays_in_its_memory_and_under_its_table() {
        let windows = Windows::default();
        assert_eq!(windows.at(1, 3, 5, 16, 512).pages, 0..3);
        let windows = Windows::default();
        assert_eq!(windows.at(510, 2000, 0, 16, 512).pages, 496..512);
        assert_eq!(windows.at(512, 2000, 0, 16, 512).pages, 512..544);
        let windows = Windows::default();
        assert_eq!(windows.at(511, 2000, 0, 100, 512).pages, 500..512);
        assert_eq!(windows.at(513, 2000, 0, 100, 512).pages, 512..600);
    }
}
