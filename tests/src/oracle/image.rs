//! Tables as they lie in memory, and a walk over them.
//!
//! An image is what the emulated hardware gets: a dump of the arena, with patches laid over it. The
//! walk here reads nothing but the image and judges entries by the format's `decode` alone; it is
//! the software's answer for entries that the MMU never writes, and must agree with the MMU's own
//! walk wherever nothing was patched.

use slat_mmu::{Access, AdPolicy, Entry, Gfn, Leaf, Level, Pfn};

use super::{format::Ops, query::Expected};

/// A dump of table memory.
#[derive(Clone, Debug)]
pub struct Image {
    ops: Ops,
    base: u64,
    root: Pfn,
    words: Vec<u64>,
}

/// An entry and where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Host physical address of the entry.
    pub at: u64,
    /// First guest frame that it covers.
    pub gfn: Gfn,
    /// Its level.
    pub level: Level,
    /// Its value.
    pub raw: u64,
    /// Its value decoded.
    pub entry: Entry,
}

impl Image {
    /// An image of `words` from host physical address `base` on, whose root table is at `root`.
    pub fn new(ops: Ops, base: u64, root: Pfn, words: Vec<u64>) -> Self {
        Self {
            ops,
            base,
            root,
            words,
        }
    }

    /// The format's functions.
    pub fn ops(&self) -> &Ops {
        &self.ops
    }

    /// As it is loaded into the machine.
    pub fn bytes(&self) -> Vec<u8> {
        self.words
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect()
    }

    fn word(&self, hpa: u64) -> Option<usize> {
        usize::try_from(hpa.checked_sub(self.base)? / 8).ok()
    }

    /// Overwrites the entry at `hpa`. False if the image does not hold it.
    pub fn patch(&mut self, hpa: u64, raw: u64) -> bool {
        let word = self.word(hpa).and_then(|word| self.words.get_mut(word));
        word.map(|word| *word = raw).is_some()
    }

    fn step(&self, table: Pfn, level: Level, gfn: Gfn) -> Option<Step> {
        let span = Ops::span(level);
        let index = (gfn.0 / span) & (self.ops.entries(level) - 1);
        let at = table.hpa() + index * 8;
        let raw = *self.words.get(self.word(at)?)?;
        Some(Step {
            at,
            gfn: Gfn(gfn.0 & !(span - 1)),
            level,
            raw,
            entry: (self.ops.decode)(raw, level),
        })
    }

    /// The entries on the way to `gfn`, the root's first; none beyond what the format translates.
    pub fn walk(&self, gfn: Gfn) -> Vec<Step> {
        let mut steps = Vec::new();
        if gfn >= self.ops.info.max_gfn {
            return steps;
        }
        let mut next = Some((self.root, self.ops.info.root_level));
        while let Some((table, level)) = next {
            let Some(step) = self.step(table, level, gfn) else {
                break;
            };
            steps.push(step);
            next = match step.entry {
                Entry::Table { pfn } => level.child().map(|level| (pfn, level)),
                _ => None,
            };
        }
        steps
    }

    /// Where an access to the first byte of `gfn` leads, on hardware that sets A and D by itself or
    /// on hardware that does what the format counts on.
    pub fn access(&self, gfn: Gfn, access: Access, sets_ad: bool) -> Expected {
        let (leaf, level) = match self.walk(gfn).last().map(|step| (step.entry, step.level)) {
            Some((Entry::Leaf(leaf), level)) => (leaf, level),
            Some((Entry::Malformed, _)) => return Expected::Malformed,
            Some((Entry::Mmio { .. }, _)) => return Expected::Mmio,
            _ => return Expected::NotPresent,
        };
        let allowed = match access {
            Access::Read => leaf.readable,
            Access::Write => leaf.writable,
            Access::Execute => leaf.executable,
        };
        if !allowed {
            return Expected::Permission;
        }
        let faults = match self.ops.info.ad_policy {
            AdPolicy::Hardware => false,
            AdPolicy::SetAtInstall => {
                !sets_ad && (!leaf.accessed || access == Access::Write && !leaf.dirty)
            }
            // Such a leaf has no permission at all; its real ones are saved where hardware does not
            // look.
            AdPolicy::AccessTracking => !leaf.accessed,
        };
        if faults {
            return Expected::AccessedDirty;
        }
        Expected::Leads(Pfn(leaf.pfn.0 + (gfn.0 & (Ops::span(level) - 1))).hpa())
    }

    /// Every leaf and every entry that points to a table.
    pub fn present(&self) -> Vec<Step> {
        let mut found = Vec::new();
        let mut open = vec![(self.root, self.ops.info.root_level, Gfn(0))];
        while let Some((table, level, first)) = open.pop() {
            for index in 0..self.ops.entries(level) {
                let gfn = Gfn(first.0 + index * Ops::span(level));
                let Some(step) = self.step(table, level, gfn) else {
                    continue;
                };
                match step.entry {
                    Entry::Table { pfn } => {
                        found.push(step);
                        open.extend(level.child().map(|level| (pfn, level, gfn)));
                    }
                    Entry::Leaf(_) => found.push(step),
                    _ => {}
                }
            }
        }
        found
    }
}

impl Step {
    /// The leaf, if the entry is one.
    pub fn leaf(&self) -> Option<Leaf> {
        match self.entry {
            Entry::Leaf(leaf) => Some(leaf),
            _ => None,
        }
    }

    /// Whether the entry points to a table.
    pub fn is_table(&self) -> bool {
        matches!(self.entry, Entry::Table { .. })
    }
}
