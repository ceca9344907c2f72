//! A chain: one file, the base that it builds on, and so on; and what a page is in all of them.
//!
//! A page is what the youngest file says that does not say "as in the base".

use std::sync::Arc;

use super::{
    cluster::Cluster,
    layer::{Group, Layer},
};
use crate::{
    error::ImageError,
    format::block::Kind,
    names::{CLUSTER_PAGES, PageKind},
    storage::Storage,
};

/// Files of a chain at most.
const MAX_CHAIN: usize = 64;

/// See the module.
#[derive(Debug)]
pub(super) struct Chain<S> {
    /// The youngest.
    pub(super) youngest: Layer<S>,
    base: Option<Arc<Chain<S>>>,
    /// How many bases there are below.
    pub(super) depth: usize,
}

/// Where a page is.
pub(super) enum Found {
    Without(PageKind),
    In(Cluster),
}

impl<S: Storage> Chain<S> {
    /// Opens a file over its base.
    pub(super) fn open(storage: S, base: Option<&Arc<Self>>) -> Result<Self, ImageError> {
        let youngest = Layer::open(storage)?;
        let wanted = youngest.header.base;
        let given = base.map(|base| base.youngest.name());
        if wanted != given {
            return Err(ImageError::WrongBase { wanted, given });
        }
        let depth = base.map_or(0, |base| base.depth + 1);
        if depth >= MAX_CHAIN {
            return Err(ImageError::Limit {
                what: "files that build on each other",
                found: depth as u64 + 1,
                most: MAX_CHAIN as u64,
            });
        }
        let base = base.map(Arc::clone);
        Ok(Self {
            youngest,
            base,
            depth,
        })
    }

    /// The file that is so many bases down. The oldest, for more than there are.
    pub(super) fn layer(&self, depth: usize) -> &Layer<S> {
        let mut chain = self;
        for _ in 0..depth {
            match &chain.base {
                Some(base) => chain = base,
                None => break,
            }
        }
        &chain.youngest
    }

    /// Which pages of a group the files above `depth` all say to be as in the base.
    pub(super) fn passes(&self, depth: usize, memory: u32, first: u64) -> Result<u16, ImageError> {
        let mut passes = u16::MAX;
        for above in 0..depth {
            let layer = self.layer(above);
            let of_layer = layer.memory(memory);
            match of_layer.filter(|memory| first < memory.spec.pages) {
                Some(memory) => passes &= layer.group(memory, first)?.of_base(),
                None => return Ok(0),
            }
        }
        Ok(passes)
    }

    /// Where a page is.
    pub(super) fn find(&self, memory: u32, page: u64) -> Result<Found, ImageError> {
        let mut wanted = u16::MAX;
        let mut chain = self;
        let mut depth = 0;
        loop {
            let group = chain.group(memory, page, depth == 0)?;
            let kind = match group.kind(page) {
                Kind::Hole => PageKind::Hole,
                Kind::Zero => PageKind::Zero,
                Kind::Data => {
                    let row = group.row.ok_or(ImageError::NoSuchPage { memory, page })?;
                    return Ok(Found::In(Cluster {
                        memory,
                        first: page / CLUSTER_PAGES as u64 * CLUSTER_PAGES as u64,
                        wanted: wanted & row.mask,
                        row,
                        depth,
                    }));
                }
                Kind::Base => {
                    wanted &= group.of_base();
                    // There is one, or a block that says so is refused.
                    chain = chain
                        .base
                        .as_ref()
                        .ok_or(ImageError::NoSuchPage { memory, page })?;
                    depth += 1;
                    continue;
                }
            };
            return Ok(Found::Without(kind));
        }
    }

    /// What the group of a page is in the youngest file of this chain, which is that of an opened
    /// image or one below.
    fn group(&self, memory: u32, page: u64, youngest: bool) -> Result<Group, ImageError> {
        let found = self.youngest.memory(memory);
        let wrong = |otherwise| {
            if youngest {
                return otherwise;
            }
            let what = "a page as in the base, which has no such page";
            ImageError::corrupt(what, self.youngest.footer.table)
        };
        let found = found.ok_or_else(|| wrong(ImageError::NoSuchMemory { memory }))?;
        if page >= found.spec.pages {
            return Err(wrong(ImageError::NoSuchPage { memory, page }));
        }
        self.youngest.group(found, page)
    }
}
