//! Listing what is mapped: a bounded part of the leaves over a range, lowest frame first.
//! [`AddressSpace::leaves`](super::AddressSpace::leaves) goes through all of them.
//!
//! For dumps, for comparing tables with a model, for statistics of mapping sizes. The tables may
//! change while they are listed: each leaf is as it was at the moment it was read, and a leaf that
//! is there throughout is listed exactly once, unless it is split or recovered meanwhile: then its
//! parts, or the whole again, may follow. A leaf of a mirror that its owner is just asked about is
//! not listed.
//!
//! *Locking*: none; inside, for one batch at a time. A batch looks at a bounded number of entries,
//! so that no grace period waits for a long listing, and the caller looks at what was found
//! outside, where it may call the MMU.

use alloc::vec::Vec;

use super::mmu::TdpMmu;
use crate::{
    addr::{Gfn, GfnRange, Level},
    format::{Entry, Format, Leaf},
    table::{guard::Guard, memory::TableMemory},
};

/// Entries looked at in one batch, and leaves found in it.
const LOOKS: usize = 4096;
const MOST: usize = 512;

/// A leaf and where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MappedLeaf {
    /// First guest frame that it maps: at or before the range's start if it reaches into it.
    pub gfn: Gfn,
    /// Its level.
    pub level: Level,
    /// Host physical address of the entry, in bytes.
    pub address: u64,
    /// The entry in the hardware's layout.
    pub raw: u64,
    /// The entry decoded.
    pub leaf: Leaf,
}

/// A part of a listing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LeafBatch {
    /// What was found, by guest frame.
    pub leaves: Vec<MappedLeaf>,
    /// What was not looked at yet. Empty at the end.
    pub rest: GfnRange,
}

impl<F: Format, H: TableMemory> TdpMmu<F, H> {
    pub(super) fn do_leaf_batch(&self, as_id: u8, range: GfnRange, mirror: bool) -> LeafBatch {
        let end = range.end.min(F::MAX_GFN);
        let mut rest = GfnRange {
            start: range.start,
            end,
        };
        let mut leaves = Vec::with_capacity(rest.pages().min(MOST as u64) as usize);
        let reader = self.participants.brief_reader_slot();
        let guard = Guard::new(&self.tables, self.participants.pin(&reader));
        let Some(root) = self.valid_root(as_id, mirror) else {
            return LeafBatch::default();
        };
        let mut looks = LOOKS;
        let goes_on = |rest: GfnRange, looks, found: &Vec<_>| {
            !rest.is_empty() && looks > 0 && found.len() < MOST
        };
        while goes_on(rest, looks, &leaves) {
            let (node, _) = guard.descend(&root.table, rest.start);
            let level = node.level();
            for index in F::index(rest.start, level)..node.len() {
                if !goes_on(rest, looks, &leaves) {
                    break;
                }
                looks -= 1;
                let raw = node.load(index);
                let gfn = F::align_down(rest.start, level);
                match F::decode(raw, level) {
                    // Down into it, from the root.
                    Entry::Table { .. } => break,
                    Entry::Leaf(leaf) => leaves.push(MappedLeaf {
                        gfn,
                        level,
                        address: node.address_of(index),
                        raw,
                        leaf,
                    }),
                    _ => {}
                }
                rest.start = Gfn(gfn.0 + F::span(level));
            }
        }
        LeafBatch { leaves, rest }
    }
}
