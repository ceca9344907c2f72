//! Clusters as callers see them: which pages are read at once, and the pages that were read.

use crate::{
    format::block::Row,
    names::{CLUSTER_PAGES, Page},
};

/// Which pages are read at once, and where they are. Only the reader that said it can read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cluster {
    pub(super) memory: u32,
    /// Of its group.
    pub(super) first: u64,
    /// Pages that the image has from here; the cluster may have more.
    pub(super) wanted: u16,
    pub(super) row: Row,
    /// 0: in the opened file itself; 1: in its base, and so on.
    pub(super) depth: usize,
}

impl Cluster {
    /// The memory's number.
    #[must_use]
    pub fn memory(&self) -> u32 {
        self.memory
    }

    /// Numbers of its pages, ascending.
    pub fn pages(&self) -> impl Iterator<Item = u64> + use<> {
        let (first, wanted) = (self.first, self.wanted);
        (0..CLUSTER_PAGES as u64)
            .filter(move |at| wanted >> at & 1 == 1)
            .map(move |at| first + at)
    }

    /// How many pages it has.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.wanted.count_ones()
    }

    /// Bytes that are read for it.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        self.row.length.into()
    }
}

/// Pages that were read, with their numbers, ascending.
#[derive(Clone, Debug)]
pub struct Pages<'b> {
    /// Of the group.
    pub(super) page: u64,
    pub(super) stored: u16,
    pub(super) wanted: u16,
    pub(super) left: &'b [Page],
}

impl<'b> Iterator for Pages<'b> {
    type Item = (u64, &'b Page);

    fn next(&mut self) -> Option<Self::Item> {
        while self.stored != 0 {
            let (page, stored, wanted) = (self.page, self.stored, self.wanted);
            self.page += 1;
            self.stored >>= 1;
            self.wanted >>= 1;
            if stored & 1 == 0 {
                continue;
            }
            let (contents, left) = self.left.split_first()?;
            self.left = left;
            if wanted & 1 == 1 {
                return Some((page, contents));
            }
        }
        None
    }
}
