//! Pages as a caller gives them: side by side, or anywhere, with gaps.

use crate::names::Page;

/// Consecutive pages, of which some may not be given.
#[derive(Clone, Copy)]
pub(super) enum Given<'a> {
    All(&'a [Page]),
    Some(&'a [Option<&'a Page>]),
}

impl<'a> Given<'a> {
    pub(super) fn len(self) -> usize {
        match self {
            Self::All(pages) => pages.len(),
            Self::Some(pages) => pages.len(),
        }
    }

    pub(super) fn split_at(self, at: usize) -> (Self, Self) {
        match self {
            Self::All(pages) => {
                let (group, rest) = pages.split_at(at);
                (Self::All(group), Self::All(rest))
            }
            Self::Some(pages) => {
                let (group, rest) = pages.split_at(at);
                (Self::Some(group), Self::Some(rest))
            }
        }
    }

    pub(super) fn get(self, at: usize) -> Option<&'a Page> {
        match self {
            Self::All(pages) => pages.get(at),
            Self::Some(pages) => pages.get(at).copied().flatten(),
        }
    }
}

/// Whether a page is all zeroes.
pub(super) fn is_zero(page: &Page) -> bool {
    page.as_chunks::<16>()
        .0
        .iter()
        .all(|bytes| u128::from_ne_bytes(*bytes) == 0)
}
