//! Which questions are asked: every kind of leaf, hole, protection and patch in fixed shares, at
//! random addresses.

use anyhow::{Context as _, ensure};
use slat_mmu::{Access, Gfn, Level, MemoryType};

use super::{
    format::Ops,
    guest::{Guest, Plan},
    image::{Image, Step},
    patch::Patch,
    query::{Expected, Query},
    rng::Rng,
};

const PAGE: u64 = slat_mmu::PAGE_SIZE;

/// What questions are made from.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// The MMU.
    pub guest: &'a Guest,
    /// Its tables, patched.
    pub image: &'a Image,
    /// What was patched.
    pub patches: &'a [Patch],
    /// The machine.
    pub plan: Plan,
    /// The hardware sets A and D by itself where the format does not count on it.
    pub sets_ad: bool,
}

/// What is tried: loads and stores more often than fetches.
fn access(rng: &mut Rng) -> Access {
    match rng.below(10) {
        0..=3 => Access::Read,
        4..=7 => Access::Write,
        _ => Access::Execute,
    }
}

impl Subject<'_> {
    /// `count` questions.
    ///
    /// # Errors
    /// When the MMU's walk, the walk over the image and the slots disagree where nothing was
    /// patched, or no questions can be found.
    pub fn queries(&self, rng: &mut Rng, count: usize) -> anyhow::Result<Vec<Query>> {
        let mut leaves = self.image.present();
        leaves.retain(|step| step.leaf().is_some() && !self.guest.is_own(step.gfn));
        let mut queries = Vec::with_capacity(count);
        for _ in 0..count * 16 {
            if queries.len() == count {
                break;
            }
            if let Some(gpa) = self.somewhere(&leaves, rng)
                && let Some(query) = self.query(gpa, access(rng))?
            {
                queries.push(query);
            }
        }
        ensure!(
            queries.len() == count,
            "only {} questions found",
            queries.len()
        );
        Ok(queries)
    }

    /// `count` questions about one patched entry.
    ///
    /// # Errors
    /// As for [`queries`](Self::queries).
    pub fn queries_of(
        &self,
        patch: &Patch,
        rng: &mut Rng,
        count: usize,
    ) -> anyhow::Result<Vec<Query>> {
        let step = self
            .image
            .walk(patch.gfn)
            .into_iter()
            .find(|step| step.at == patch.at);
        let step = step.context("the patch is not in the image")?;
        let mut queries = Vec::with_capacity(count);
        for _ in 0..count * 16 {
            if queries.len() == count {
                break;
            }
            if let Some(gfn) = self.inside(&step, rng)
                && let Some(query) = self.query(gfn * PAGE + 8 * rng.below(512), access(rng))?
            {
                queries.push(query);
            }
        }
        ensure!(
            queries.len() == count,
            "only {} questions found",
            queries.len()
        );
        Ok(queries)
    }

    fn somewhere(&self, leaves: &[Step], rng: &mut Rng) -> Option<u64> {
        let offset = 8 * rng.below(512);
        let limit = self.plan.max_gfn().0;
        let gfn = match rng.below(100) {
            0..=41 => {
                let level = Level::new(1 + rng.below(5) as u8)?;
                let of_level: Vec<&Step> =
                    leaves.iter().filter(|step| step.level == level).collect();
                self.inside(rng.pick(&of_level)?, rng)?
            }
            42..=61 => {
                let slot = rng.pick(self.guest.slots())?;
                (slot.base_gfn.0 + rng.below(slot.npages.min(1 << 16) + 64)).checked_sub(32)?
            }
            62..=87 => {
                let patch = rng.pick(self.patches)?;
                let step = self
                    .image
                    .walk(patch.gfn)
                    .into_iter()
                    .find(|step| step.at == patch.at)?;
                self.inside(&step, rng)?
            }
            88..=91 => limit - 1 - rng.below(128),
            92 | 93 => rng.below(limit),
            94 | 95 => rng.pick(self.guest.devices())?.0,
            // Beyond what the format translates, near and far, where the machine can utter it.
            _ => {
                let uttered = 1 << (self.plan.gpa_bits - slat_mmu::PAGE_SHIFT);
                if limit == uttered {
                    return None;
                }
                if rng.chance(30) {
                    limit + rng.below(16)
                } else {
                    limit + rng.below(uttered - limit)
                }
            }
        };
        Some(gfn * PAGE + offset)
    }

    /// A frame that an entry covers. Of a leaf larger than the windows, one that leads into a
    /// window.
    fn inside(&self, step: &Step, rng: &mut Rng) -> Option<u64> {
        let span = Ops::span(step.level);
        match step.leaf() {
            Some(leaf) if step.level > Level::SIZE_2M => {
                let (start, end) = *rng.pick(&self.plan.layout.windows())?;
                let pfn = (start + rng.below(end - start)) / PAGE;
                let distance = pfn.checked_sub(leaf.pfn.0).filter(|pages| *pages < span)?;
                Some(step.gfn.0 + distance)
            }
            _ => Some(step.gfn.0 + rng.below(span)),
        }
    }

    /// The question with its answer; `None` if it leads where nothing names its address, or must
    /// not be asked.
    fn query(&self, gpa: u64, access: Access) -> anyhow::Result<Option<Query>> {
        let gfn = Gfn::from_gpa(gpa);
        if self.guest.is_own(gfn) || gpa >> self.plan.gpa_bits != 0 {
            return Ok(None);
        }
        let walk = self.image.walk(gfn);
        let patch = self
            .patches
            .iter()
            .find(|patch| walk.iter().any(|step| step.at == patch.at));
        let typed = |step: &Step| {
            let leaf = step.leaf();
            leaf.is_some_and(|leaf| leaf.memory != MemoryType::Normal)
        };
        let expected = if !self.plan.memory_types && walk.last().is_some_and(typed) {
            Expected::Malformed
        } else {
            self.image.access(gfn, access, self.sets_ad)
        };
        if patch.is_none() {
            let own = self.guest.access(gfn, access)?;
            let walked = self.image.access(gfn, access, false);
            // An MMIO entry of an earlier generation of slots is none to the MMU, but hardware
            // cannot know.
            let stale = own == Expected::NotPresent && walked == Expected::Mmio;
            ensure!(
                own == walked || stale,
                "{access:?} of {gfn}: the MMU's walk {own}, decode over the image {walked}"
            );
        }
        if let (None, Expected::Leads(page)) = (patch, expected) {
            let backing = self.guest.backing(gfn);
            let right = backing.is_some_and(|(hpa, writable)| {
                hpa == page && (writable || access != Access::Write)
            });
            ensure!(
                right,
                "{access:?} of {gfn} leads to {page:#x}, but its slot says {backing:x?}"
            );
        }
        let expected = match expected {
            Expected::Leads(page) if !self.plan.layout.in_window(page) => return Ok(None),
            Expected::Leads(page) => Expected::Leads(page + gpa % PAGE),
            other => other,
        };
        let kind = match (patch, expected, walk.last()) {
            (Some(patch), ..) => patch.name,
            (None, Expected::Leads(_), Some(step)) => match step.level {
                Level::SIZE_4K => "4k leaf",
                Level::SIZE_2M => "2m leaf",
                Level::SIZE_1G => "1g leaf",
                Level::SIZE_512G => "512g leaf",
                _ => "256t leaf",
            },
            (None, _, None) => "beyond the format",
            (None, Expected::Permission, _) => "write-protected",
            (None, Expected::AccessedDirty, _) => "aged",
            (None, Expected::Mmio, _) => "MMIO by the MMU",
            _ if gfn.0 + 128 >= self.plan.max_gfn().0 => "hole at the top",
            _ => "hole",
        };
        Ok(Some(Query {
            gpa,
            access,
            kind,
            expected,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::{layout::Layout, patch};

    /// All that a run does but for the emulator, for every format.
    #[test]
    fn the_mmu_and_its_dump_agree_for_every_format() {
        let names = [
            "ept4",
            "ept4-noad",
            "ept5",
            "npt4",
            "npt5",
            "sv39x4",
            "sv48x4",
            "sv57x4",
        ];
        for name in names {
            let plan = Plan {
                ops: Ops::named(name).unwrap(),
                layout: Layout { base: 0 },
                gpa_bits: 62,
                below_root: false,
                own_guest: true,
                memory_types: true,
            };
            let mut rng = Rng::new(1);
            let guest = Guest::build(plan, &mut rng).unwrap();
            let mut image = guest.image().unwrap();
            let patches = patch::apply(&mut image, &guest, plan, &mut rng).unwrap();
            let subject = Subject {
                guest: &guest,
                image: &image,
                patches: &patches,
                plan,
                sets_ad: false,
            };
            let queries = subject.queries(&mut rng, 2000).unwrap();
            let leads = |query: &&Query| matches!(query.expected, Expected::Leads(_));
            let led = queries.iter().filter(leads).count();
            assert!(
                (400..1600).contains(&led),
                "{name}: {led} of 2000 lead somewhere"
            );
            for kind in [
                "4k leaf",
                "2m leaf",
                "1g leaf",
                "hole",
                "write-protected",
                "frozen",
            ] {
                assert!(
                    queries.iter().any(|query| query.kind == kind),
                    "{name}: no {kind}"
                );
            }
        }
    }
}
