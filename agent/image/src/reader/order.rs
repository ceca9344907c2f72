//! All clusters of a chain in the order of the files, so that a whole restore reads forwards.
//!
//! The list of one file is made when its turn comes, sorted by place, and dropped after it: 16
//! bytes a cluster, 16 MiB for 64 GiB of whole clusters. A file has an index row of 24 bytes for
//! each, so a list is never longer than its file.

use super::{chain::Chain, cluster::Cluster, layer::Layer};
use crate::{
    error::ImageError,
    format::{BLOCK_PAGES, block::Row},
    names::CLUSTER_PAGES,
    storage::Storage,
};

/// A cluster in a list.
#[derive(Clone, Copy, Debug)]
pub(super) struct Listed {
    offset: u64,
    block: u32,
    row: u16,
}

impl Listed {
    /// Adds the rows of a block.
    pub(super) fn list(block: usize, rows: &[Row], list: &mut Vec<Self>) {
        let listed = (0..).zip(rows).map(|(row, contents)| Self {
            offset: contents.offset,
            block: block as u32,
            row,
        });
        list.extend(listed);
    }

    /// Memory, first page of the group, and row.
    pub(super) fn find<S: Storage>(
        self,
        layer: &Layer<S>,
    ) -> Result<Option<(u32, u64, Row)>, ImageError> {
        let number = self.block as usize;
        let Some((memory, first)) = layer.place_of(number) else {
            return Ok(None);
        };
        let Some(block) = layer.block(number)? else {
            return Ok(None);
        };
        let found = block.rows.get(usize::from(self.row)).map(|row| {
            let first = first + u64::from(row.group) * CLUSTER_PAGES as u64;
            (memory.spec.number, first, *row)
        });
        Ok(found)
    }

    /// Lists by place.
    pub(super) fn sort(list: &mut [Self]) {
        list.sort_unstable_by_key(|listed| listed.offset);
    }
}

/// See [`crate::Reader::clusters`].
#[derive(Debug)]
pub struct Clusters<'r, S> {
    chain: &'r Chain<S>,
    /// Of the file whose turn it is.
    depth: usize,
    list: std::vec::IntoIter<Listed>,
    failed: bool,
}

impl<'r, S: Storage> Clusters<'r, S> {
    pub(super) fn new(chain: &'r Chain<S>) -> Result<Self, ImageError> {
        let depth = chain.depth;
        Ok(Self {
            chain,
            depth,
            list: list(chain.layer(depth))?.into_iter(),
            failed: false,
        })
    }

    fn step(&mut self) -> Result<Option<Cluster>, ImageError> {
        loop {
            let Some(listed) = self.list.next() else {
                let Some(depth) = self.depth.checked_sub(1) else {
                    return Ok(None);
                };
                self.list = list(self.chain.layer(depth))?.into_iter();
                self.depth = depth;
                continue;
            };
            let layer = self.chain.layer(self.depth);
            let Some((memory, first, row)) = listed.find(layer)? else {
                continue;
            };
            let wanted = row.mask & self.chain.passes(self.depth, memory, first)?;
            if wanted != 0 {
                return Ok(Some(Cluster {
                    memory,
                    first,
                    wanted,
                    row,
                    depth: self.depth,
                }));
            }
        }
    }
}

fn list<S: Storage>(layer: &Layer<S>) -> Result<Vec<Listed>, ImageError> {
    let mut found = Vec::new();
    for number in 0..layer.table.blocks.len() {
        if let Some(block) = layer.block(number)? {
            Listed::list(number, &block.rows, &mut found);
        }
    }
    Listed::sort(&mut found);
    Ok(found)
}

impl<S: Storage> Iterator for Clusters<'_, S> {
    type Item = Result<Cluster, ImageError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let next = self.step();
        self.failed = next.is_err();
        next.transpose()
    }
}

const _: () = assert!(BLOCK_PAGES <= u16::MAX as u64);
