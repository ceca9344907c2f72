//! Requests about mappings: unmap, protect, age, list.
//!
//! None of them is about contents, so none takes the layout's lock but to answer for a guest that
//! is not watched, and to age, which waits for faults that are being resolved.

use slat_paging::wire::{Answer, Mapped, ProblemKind};

use super::split::{complete, range};
use crate::{
    error::Trouble,
    mirror::Mirror,
    shared::Shared,
    sync::{read, write},
};

/// Runs that fit into an answer: each takes up to 70 bytes of the 64 KiB.
const MOST_MAPPED: usize = 800;
/// Each takes up to 44 bytes.
const MOST_AGED: usize = 1400;

impl Shared {
    pub(super) fn watching(&self) -> Result<&Mirror, Trouble> {
        let what = "the guest is not watched: nothing is mapped by this pager";
        let mirror = self.mirror.as_ref();
        mirror.ok_or_else(|| Trouble::new(ProblemKind::Refused, what))
    }

    pub(super) fn unmap(&self, gfn: u64, pages: u64) -> Result<(), Trouble> {
        let change = self.watching()?.space().zap_mirror(range(gfn, pages));
        complete(&change, "unmapping")
    }

    pub(super) fn protect(&self, gfn: u64, pages: u64) -> Result<(), Trouble> {
        let mirror = self.watching()?;
        if !self.setup.can_protect {
            let what = "this host cannot protect pages";
            return Err(Trouble::new(ProblemKind::Refused, what));
        }
        let change = mirror.space().write_protect_mirror(range(gfn, pages));
        complete(&change, "protecting")
    }

    /// The runs of frames that were mapped. When there are more than fit, runs that are close to
    /// each other are given as one: age is a hint.
    pub(super) fn age(&self, gfn: u64, pages: u64) -> Result<Vec<(u64, u64)>, Trouble> {
        let space = self.watching()?.space();
        for part in read(&self.layout).parts(gfn, pages) {
            part.memory.aged.set(part.pages, part.memory.pages);
        }
        // Faults that did not see it have mapped their neighbours by then.
        drop(write(&self.layout));
        let mut rest = range(gfn, pages);
        let mut runs: Vec<(u64, u64)> = Vec::new();
        while !rest.is_empty() {
            let aged = space.age_mirror(rest);
            complete(&aged.change, "ageing")?;
            for young in aged.young {
                match runs.last_mut() {
                    Some((first, count)) if *first + *count == young.start.0 => {
                        *count += young.pages();
                    }
                    _ => runs.push((young.start.0, young.pages())),
                }
            }
            rest = aged.rest;
        }
        let mut gap = 1;
        while runs.len() > MOST_AGED {
            runs = joined(&runs, gap);
            gap *= 2;
        }
        Ok(runs)
    }

    pub(super) fn mapped(&self, gfn: u64, pages: u64) -> Result<Answer, Trouble> {
        let range = range(gfn, pages);
        let mut runs: Vec<Mapped> = Vec::new();
        let mut next = range.end.0;
        for found in self.watching()?.space().mirror_leaves(range) {
            let (gfn, writable) = (found.gfn.0, found.leaf.writable);
            if let Some(run) = runs.last_mut()
                && run.gfn + run.pages == gfn
                && run.writable == writable
            {
                run.pages += 1;
                continue;
            }
            if runs.len() == MOST_MAPPED {
                next = gfn;
                break;
            }
            let pages = 1;
            runs.push(Mapped {
                gfn,
                pages,
                writable,
            });
        }
        Ok(Answer::Mapped { runs, next })
    }
}

/// The runs with gaps of at most `gap` frames closed.
fn joined(runs: &[(u64, u64)], gap: u64) -> Vec<(u64, u64)> {
    let mut joined: Vec<(u64, u64)> = Vec::new();
    for &(first, count) in runs {
        match joined.last_mut() {
            Some(last) if first - (last.0 + last.1) <= gap => last.1 = first + count - last.0,
            _ => joined.push((first, count)),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::joined;

    #[test]
    fn runs_that_are_close_are_given_as_one() {
        let runs = [(0, 1), (2, 1), (10, 5), (16, 1)];
        assert_eq!(joined(&runs, 1), [(0, 3), (10, 7)]);
        assert_eq!(joined(&runs, 8), [(0, 17)]);
    }
}
