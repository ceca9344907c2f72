//! What was read of a source: runs of pages with contents or without.

use slat_paging::PAGE;

use crate::page_file::is_zero;

/// Runs of pages, in no order, none twice. Its memory is used again after [`Contents::clear`].
#[derive(Debug, Default)]
pub struct Contents {
    bytes: Vec<u8>,
    runs: Vec<Run>,
}

#[derive(Clone, Copy, Debug)]
struct Run {
    first: u64,
    count: u64,
    /// Where in `bytes`; `None`: zeroes.
    at: Option<usize>,
}

impl Run {
    /// Whether a page is the next of the run, in the file and in memory.
    fn goes_on(&self, page: u64, at: Option<usize>) -> bool {
        let next = self.at.map(|at| at + self.count as usize * PAGE);
        self.first + self.count == page && next == at
    }
}

impl Contents {
    /// Nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Nothing again.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.runs.clear();
    }

    /// Pages of zeroes.
    pub fn zeroes(&mut self, first: u64, count: u64) {
        if let Some(last) = self.runs.last_mut()
            && last.at.is_none()
            && last.first + last.count == first
        {
            last.count += count;
        } else if count > 0 {
            let at = None;
            self.runs.push(Run { first, count, at });
        }
    }

    /// Room for the contents of pages, to be filled.
    pub fn room(&mut self, first: u64, count: u64) -> &mut [u8] {
        let at = self.bytes.len();
        self.bytes.resize(at + count as usize * PAGE, 0);
        let end_to_end = self.runs.last_mut();
        let end_to_end = end_to_end.filter(|last| last.goes_on(first, Some(at)));
        match end_to_end {
            Some(last) => last.count += count,
            None if count > 0 => {
                let at = Some(at);
                self.runs.push(Run { first, count, at });
            }
            None => {}
        }
        &mut self.bytes[at..]
    }

    /// Makes zeroes of the pages of zeroes among the last ones that room was made for.
    pub(crate) fn find_zeroes(&mut self, first: u64, count: u64) {
        let Some(run) = self.runs.last_mut() else {
            return;
        };
        let (Some(at), before) = (run.at, run.count - count) else {
            return;
        };
        let at = at + before as usize * PAGE;
        let (pages, _) = self.bytes[at..].as_chunks::<PAGE>();
        if !pages.iter().any(|page| is_zero(page)) {
            return;
        }
        run.count = before;
        if before == 0 {
            self.runs.pop();
        }
        for (page, number) in (0..count).zip(first..) {
            let at = at + page as usize * PAGE;
            let at = (!is_zero(&self.bytes[at..at + PAGE])).then_some(at);
            match self.runs.last_mut() {
                Some(run) if run.goes_on(number, at) => run.count += 1,
                _ => self.runs.push(Run {
                    first: number,
                    count: 1,
                    at,
                }),
            }
        }
    }

    /// First page, how many, and their bytes, or `None` for zeroes.
    pub fn runs(&self) -> impl Iterator<Item = (u64, u64, Option<&[u8]>)> {
        self.runs.iter().map(|run| {
            let bytes = run
                .at
                .map(|at| &self.bytes[at..at + run.count as usize * PAGE]);
            (run.first, run.count, bytes)
        })
    }

    /// How much there is, for [`Contents::back_to`].
    pub(crate) fn mark(&self) -> Mark {
        Mark {
            bytes: self.bytes.len(),
            runs: self.runs.len(),
            last: self.runs.last().map_or(0, |run| run.count),
        }
    }

    /// Forgets what came after the mark.
    pub(crate) fn back_to(&mut self, mark: &Mark) {
        self.bytes.truncate(mark.bytes);
        self.runs.truncate(mark.runs);
        if let Some(run) = self.runs.last_mut() {
            run.count = mark.last;
        }
    }
}

/// See [`Contents::mark`].
#[derive(Debug)]
pub(crate) struct Mark {
    bytes: usize,
    runs: usize,
    last: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_become_one_run_and_what_is_taken_back_is_gone() {
        let mut contents = Contents::new();
        contents.zeroes(0, 2);
        contents.zeroes(2, 1);
        contents.room(3, 1).fill(7);
        let mark = contents.mark();
        contents.room(4, 1).fill(8);
        contents.zeroes(5, 1);
        contents.back_to(&mark);
        contents.room(4, 1).fill(9);
        let runs: Vec<_> = contents.runs().collect();
        assert_eq!(runs.len(), 2);
        assert_eq!((runs[0].0, runs[0].1, runs[0].2), (0, 3, None));
        let bytes = runs[1].2.unwrap();
        assert_eq!((runs[1].0, bytes[PAGE - 1], bytes[PAGE]), (3, 7, 9));
    }

    #[test]
    fn zeroes_among_pages_are_found() {
        let mut contents = Contents::new();
        contents.room(9, 1).fill(1);
        let room = contents.room(10, 5);
        room[PAGE] = 1;
        room[4 * PAGE] = 2;
        contents.find_zeroes(10, 5);
        let runs: Vec<_> = contents
            .runs()
            .map(|run| (run.0, run.1, run.2.map(|b| b[0])))
            .collect();
        let expected = [
            (9, 1, Some(1)),
            (10, 1, None),
            (11, 1, Some(1)),
            (12, 2, None),
        ];
        assert_eq!(runs[..4], expected);
        assert_eq!(runs[4], (14, 1, Some(2)));
    }
}
