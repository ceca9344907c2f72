//! The chain of layers.
//!
//! A memory has a number in each layer: the youngest layer knows it by its *origin*, and each
//! snapshot says under which number its own memory goes on in the next. What no layer has is
//! zeroes.
//!
//! *Locking*: none; a chain does not change once it is built.

use std::{
    ops::Range,
    os::fd::OwnedFd,
    sync::atomic::{Ordering, fence},
};

use slat_paging::{
    MOST_LAYERS,
    wire::{Layer, LayerMemory, ProblemKind},
};

use super::{
    contents::Contents,
    file::{FileLayer, together},
    port::Source,
    snapshot::{LayerPart, SnapshotLayer, Where},
};
use crate::error::Trouble;

/// Pages whose place is looked at before any of them is read.
const STEP: u64 = 256;

enum Level {
    File(FileLayer),
    Snapshot(SnapshotLayer),
}

/// See the module.
pub(crate) struct Chain {
    levels: Vec<Level>,
    /// Give the memory of pages back that were taken: nobody else reads the youngest snapshot.
    release: bool,
    /// Others read it, and may need what this reader has.
    shared: bool,
}

impl std::fmt::Debug for Chain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Chain")
            .field("levels", &self.levels.len())
            .finish_non_exhaustive()
    }
}

impl Chain {
    /// The same, which gives kept pages back as they are taken.
    pub(crate) fn releasing(mut self) -> Self {
        self.release = true;
        self
    }

    fn read_level(
        &self,
        depth: usize,
        number: u32,
        pages: Range<u64>,
        into: &mut Contents,
    ) -> Result<(), Trouble> {
        match self.levels.get(depth) {
            None => {
                into.zeroes(pages.start, pages.end - pages.start);
                Ok(())
            }
            Some(Level::File(file)) => file.read(number, pages, into),
            Some(Level::Snapshot(layer)) => {
                let part = part(layer, number, &pages)?;
                self.read_snapshot(depth, layer, part, pages, into)
            }
        }
    }

    fn read_snapshot(
        &self,
        depth: usize,
        layer: &SnapshotLayer,
        part: &LayerPart,
        pages: Range<u64>,
        into: &mut Contents,
    ) -> Result<(), Trouble> {
        let (mut at, mut step) = (pages.start, STEP);
        while at < pages.end {
            let found = part.find(at);
            let last = pages.end.min(at + step);
            let end = (at + 1..last)
                .find(|page| part.find(*page) != found)
                .unwrap_or(last);
            let mark = into.mark();
            match (found, part.origin) {
                (Where::Deeper, Some(origin)) => {
                    self.read_level(depth + 1, origin, at..end, into)?;
                }
                (Where::Deeper, None) => into.zeroes(at, end - at),
                _ => {
                    let read = part.read(found, at, end, into);
                    read.map_err(|error| Trouble::source(&layer.name, &error))?;
                }
            }
            // What was read was read before the second look: see the crate `slat_paging`.
            fence(Ordering::Acquire);
            // Each page moves twice at most, so this comes to an end; and a page that the VM writes
            // just now holds up fewer and fewer neighbours.
            if (at..end).any(|page| part.find(page) != found) {
                into.back_to(&mark);
                step = (step / 2).max(1);
                continue;
            }
            at = end;
        }
        Ok(())
    }
}

impl Source for Chain {
    fn read(&self, memory: u32, pages: Range<u64>, into: &mut Contents) -> Result<(), Trouble> {
        self.read_level(0, memory, pages, into)
    }

    /// The pages of a file's cluster. A page of a snapshot is a page of another VM's memory, which
    /// costs no more alone.
    fn together(&self, _: u32, page: u64) -> Range<u64> {
        match self.levels.first() {
            Some(Level::File(_)) => together(page),
            _ => page..page + 1,
        }
    }

    /// What the youngest file names. A snapshot's VM still has its working set to itself.
    fn first(&self) -> Vec<(u32, Range<u64>)> {
        match self.levels.first() {
            Some(Level::File(file)) => file.working_set(),
            _ => Vec::new(),
        }
    }

    /// The lease of the youngest layer is this reader's own, unless it is shared; deeper ones have
    /// readers of their own.
    fn taken(&self, memory: u32, pages: Range<u64>) {
        if self.shared {
            return;
        }
        if let Some(Level::Snapshot(layer)) = self.levels.first()
            && let Some(part) = layer.part(memory)
        {
            let pages = pages.start..pages.end.min(part.pages);
            for page in pages.clone() {
                part.marks.set_taken(page);
            }
            if self.release {
                part.release(pages.start, pages.end);
            }
        }
    }
}

fn part<'a>(
    layer: &'a SnapshotLayer,
    number: u32,
    pages: &Range<u64>,
) -> Result<&'a LayerPart, Trouble> {
    let part = layer.part(number).filter(|part| pages.end <= part.pages);
    part.ok_or_else(|| {
        let what = format!(
            "{}: no page {} of memory {number}",
            layer.name,
            pages.end - 1
        );
        Trouble::new(ProblemKind::SourceTruncated, what)
    })
}

/// Makes a chain of messages as they come.
#[derive(Default)]
pub(crate) struct ChainBuilder {
    levels: Vec<Level>,
    /// Others read the youngest layer, too.
    shared: bool,
    /// Memories of the last layer that have not come.
    missing: usize,
}

impl ChainBuilder {
    /// The next layer.
    pub(crate) fn layer(&mut self, layer: Layer, mut fds: Vec<OwnedFd>) -> Result<(), Trouble> {
        let refused = |what: &str| Err(Trouble::new(ProblemKind::Refused, what));
        if self.missing > 0 || self.levels.len() == MOST_LAYERS {
            return refused("a layer too many, or before the memories of the last one");
        }
        match layer {
            Layer::File { name } => self.levels.push(Level::File(FileLayer::open(name, fds)?)),
            Layer::Snapshot {
                memories,
                name,
                shared,
            } => {
                let Some(lease) = fds.pop() else {
                    return refused("a snapshot without its lease");
                };
                self.missing = memories as usize;
                self.shared |= shared && self.levels.is_empty();
                self.levels
                    .push(Level::Snapshot(SnapshotLayer::new(name, lease)));
            }
        }
        Ok(())
    }

    /// A memory of the last layer.
    pub(crate) fn memory(
        &mut self,
        memory: &LayerMemory,
        fds: Vec<OwnedFd>,
    ) -> Result<(), Trouble> {
        match self.levels.last_mut() {
            Some(Level::Snapshot(layer)) if self.missing > 0 => {
                let before = layer.len();
                layer.add(memory, fds)?;
                self.missing -= layer.len() - before;
                Ok(())
            }
            _ => Err(Trouble::new(ProblemKind::Refused, "a memory of no layer")),
        }
    }

    /// The chain, if there was any layer.
    pub(crate) fn build(self) -> Result<Option<Chain>, Trouble> {
        if self.missing > 0 {
            let what = "a layer lacks memories";
            return Err(Trouble::new(ProblemKind::Refused, what));
        }
        Ok((!self.levels.is_empty()).then_some(Chain {
            levels: self.levels,
            release: false,
            shared: self.shared,
        }))
    }
}
