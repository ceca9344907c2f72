//! Entries that this MMU does not write, laid over a dump of its tables.
//!
//! Each recipe turns an entry that is there into one with a single property, and says what the
//! format's `decode` must make of it. Only what the manuals settle is here: a value that `decode`
//! calls malformed and hardware must not refuse (an EPT leaf of type WT, a global RISC-V leaf)
//! proves nothing about either.

use anyhow::{Context as _, ensure};
use slat_mmu::{AdPolicy, Entry, Gfn, Leaf, Level, MemoryType, Pfn};

use super::{
    format::Ops,
    guest::{Guest, Plan},
    image::{Image, Step},
    rng::Rng,
};

/// Each recipe is used so often.
const TIMES: usize = 5;

/// Whose manual holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Intel extended page tables.
    Ept,
    /// AMD nested page tables.
    Npt,
    /// The G-stage of RISC-V.
    RiscV,
}

impl Family {
    /// The family of a format.
    ///
    /// # Errors
    /// When no oracle knows it.
    pub fn of(ops: &Ops) -> anyhow::Result<Self> {
        match ops.info.flush.name() {
            "INVEPT" => Ok(Self::Ept),
            "TLB_CONTROL" => Ok(Self::Npt),
            "HFENCE.GVMA" => Ok(Self::RiscV),
            other => anyhow::bail!("no oracle flushes by {other}"),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    /// A leaf of 4 KiB or 2 MiB.
    Leaf,
    Leaf4K,
    Leaf2M,
    /// A pointer to a table of 4 KiB leaves.
    Table,
    /// An empty entry of the root.
    RootHole,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Leaf,
    Absent,
    Malformed,
    Mmio,
}

#[derive(Clone, Copy)]
struct Recipe {
    name: &'static str,
    target: Target,
    kind: Kind,
    /// `None` if the format has no such entry.
    make: fn(&Ops, Plan, &Step, &mut Rng) -> Option<u64>,
}

/// An entry that was overwritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patch {
    /// The recipe.
    pub name: &'static str,
    /// Host physical address of the entry.
    pub at: u64,
    /// First frame that it covers.
    pub gfn: Gfn,
    /// Its level.
    pub level: Level,
}

macro_rules! recipe {
    ($name:literal, $target:ident => $kind:ident, |$step:ident| $raw:expr) => {
        recipe!($name, $target => $kind, |$step, _rng| $raw)
    };
    ($name:literal, $target:ident => $kind:ident, |$step:ident, $rng:ident| $raw:expr) => {
        recipe!($name, $target => $kind, with |_, _, $step, $rng| Some($raw))
    };
    ($name:literal, $target:ident => $kind:ident, with $make:expr) => {
        Recipe {
            name: $name,
            target: Target::$target,
            kind: Kind::$kind,
            make: $make,
        }
    };
}

/// A writable leaf at the root, over memory from 0 on or, where 1 GiB is the most, over the
/// machine's RAM.
fn root_leaf(ops: &Ops, plan: Plan, step: &Step, _: &mut Rng) -> Option<u64> {
    let ram = plan.layout.base >> slat_mmu::PAGE_SHIFT;
    let leaf = Leaf {
        pfn: Pfn(ram & !(Ops::span(step.level) - 1)),
        readable: true,
        writable: true,
        executable: true,
        mmu_writable: true,
        host_writable: true,
        accessed: true,
        dirty: true,
        memory: MemoryType::Normal,
    };
    Some((ops.make_leaf)(&leaf, step.level))
}

fn frozen(ops: &Ops, _: Plan, _: &Step, _: &mut Rng) -> Option<u64> {
    Some(ops.frozen)
}

fn mmio(ops: &Ops, _: Plan, step: &Step, rng: &mut Rng) -> Option<u64> {
    (ops.make_mmio)(step.gfn, rng.word() as u32)
}

#[rustfmt::skip]
const RISC_V: &[Recipe] = &[
    recipe!("write without read", Leaf => Malformed, |step| step.raw & !2 | 4),
    recipe!("U clear", Leaf => Malformed, |step| step.raw & !0x10),
    recipe!("reserved bit", Leaf => Malformed, |step, rng| step.raw | 1 << (54 + rng.below(7))),
    recipe!("N without Svnapot", Leaf => Malformed, |step| step.raw | 1 << 63),
    recipe!("memory type NC", Leaf => Leaf, |step| step.raw & !(3 << 61) | 1 << 61),
    recipe!("memory type IO", Leaf => Leaf, |step| step.raw & !(3 << 61) | 2 << 61),
    recipe!("memory type reserved", Leaf => Malformed, |step| step.raw | 3 << 61),
    recipe!("misaligned superpage", Leaf2M => Malformed, |step, rng| step.raw | 1 << (10 + rng.below(9))),
    recipe!("no execute", Leaf => Leaf, |step| step.raw & !8),
    recipe!("execute only", Leaf => Leaf, |step| step.raw & !0x106),
    recipe!("W clear", Leaf => Leaf, |step| step.raw & !4),
    recipe!("A clear", Leaf => Leaf, |step| step.raw & !0x40),
    recipe!("D clear", Leaf => Leaf, |step| step.raw & !0x80 | 0x40),
    recipe!("V clear, others at random", Leaf => Absent, |step, rng| (step.raw | rng.word()) & !1 | 1 << 63),
    recipe!("frozen", Leaf => Absent, with frozen),
    recipe!("pointer at the last level", Leaf4K => Malformed, |step| step.raw & !0xff | 1),
    recipe!("pointer with U", Table => Malformed, |step| step.raw | 0x10),
    recipe!("pointer with A", Table => Malformed, |step| step.raw | 0x40),
    recipe!("pointer with D", Table => Malformed, |step| step.raw | 0x80),
    recipe!("pointer with memory type", Table => Malformed, |step, rng| step.raw | (1 + rng.below(3)) << 61),
    recipe!("pointer with N", Table => Malformed, |step| step.raw | 1 << 63),
    recipe!("pointer with reserved bit", Table => Malformed, |step, rng| step.raw | 1 << (54 + rng.below(7))),
    recipe!("leaf in the root", RootHole => Leaf, with root_leaf),
];

#[rustfmt::skip]
const EPT: &[Recipe] = &[
    recipe!("write without read", Leaf => Malformed, |step| step.raw & !5 | 2),
    recipe!("write and execute without read", Leaf => Malformed, |step| step.raw & !1 | 6),
    recipe!("memory type reserved", Leaf => Malformed, |step, rng| {
        step.raw & !0x38 | rng.pick(&[2, 3, 7]).unwrap_or(&2) << 3
    }),
    recipe!("memory type UC", Leaf => Leaf, |step| step.raw & !0x78),
    recipe!("memory type WC", Leaf => Leaf, |step| step.raw & !0x78 | 1 << 3),
    // Bit 12 is reserved too, but Bochs takes it for PAT, as it is in an ordinary table.
    recipe!("misaligned superpage", Leaf2M => Malformed, |step, rng| step.raw | 1 << (13 + rng.below(8))),
    recipe!("no execute", Leaf => Leaf, |step| step.raw & !4),
    recipe!("execute only", Leaf => Leaf, |step| step.raw & !(3 | 1 << 58)),
    recipe!("W clear", Leaf => Leaf, |step| step.raw & !2),
    recipe!("no permission", Leaf => Absent, |step| step.raw & !0x807),
    recipe!("frozen", Leaf => Absent, with frozen),
    recipe!("MMIO", Leaf => Mmio, with mmio),
    recipe!("pointer with reserved bit", Table => Malformed, |step, rng| step.raw | 1 << (3 + rng.below(4))),
    recipe!("leaf in the root", RootHole => Malformed, |_step| 0x8f7),
];

/// With Accessed and Dirty kept by hardware.
#[rustfmt::skip]
const EPT_AD: &[Recipe] = &[
    recipe!("A and D clear", Leaf => Leaf, |step| step.raw & !0x300),
];

/// Without: a leaf that was not used has no permission, and its real ones 54 bits up.
#[rustfmt::skip]
const EPT_TRACKED: &[Recipe] = &[
    recipe!("tracked", Leaf => Leaf, |step| tracked(step.raw)),
    recipe!("tracked but writable", Leaf => Malformed, |step| tracked(step.raw) | 2),
];

const fn tracked(raw: u64) -> u64 {
    raw & !0x107 | (raw & 5) << 54
}

#[rustfmt::skip]
const NPT: &[Recipe] = &[
    recipe!("U clear", Leaf => Malformed, |step| step.raw & !4),
    recipe!("misaligned superpage", Leaf2M => Malformed, |step, rng| step.raw | 1 << (13 + rng.below(8))),
    recipe!("reserved bit", Leaf => Malformed, |step| step.raw | 1 << 51),
    recipe!("memory type UC", Leaf => Leaf, |step| step.raw | 0x18),
    recipe!("no execute", Leaf => Leaf, |step| step.raw | 1 << 63),
    recipe!("W clear", Leaf => Leaf, |step| step.raw & !2),
    recipe!("A and D clear", Leaf => Leaf, |step| step.raw & !0x60),
    recipe!("P clear", Leaf => Absent, |step| step.raw & !0x801),
    recipe!("frozen", Leaf => Absent, with frozen),
    recipe!("MMIO", Leaf => Mmio, with mmio),
    recipe!("pointer with reserved bit", Table => Malformed, |step| step.raw | 1 << 51),
    recipe!("leaf in the root", RootHole => Malformed, |_step| 0x8e7),
];

fn kind(entry: Entry) -> Option<Kind> {
    match entry {
        Entry::Leaf(_) => Some(Kind::Leaf),
        Entry::NonPresent | Entry::Frozen => Some(Kind::Absent),
        Entry::Malformed => Some(Kind::Malformed),
        Entry::Mmio { .. } => Some(Kind::Mmio),
        Entry::Table { .. } => None,
    }
}

fn candidates(image: &Image, guest: &Guest, target: Target) -> Vec<Step> {
    // One that was not used has its permissions elsewhere in some formats.
    let leaf = |step: &Step| step.leaf().is_some_and(|leaf| leaf.accessed);
    let fits = |step: &Step| match target {
        Target::Leaf => leaf(step) && step.level <= Level::SIZE_2M,
        Target::Leaf4K => leaf(step) && step.level == Level::SIZE_4K,
        Target::Leaf2M => leaf(step) && step.level == Level::SIZE_2M,
        Target::Table => step.is_table() && step.level == Level::SIZE_2M,
        Target::RootHole => false,
    };
    let mut found = image.present();
    found.retain(|step| fits(step) && !guest.is_own(step.gfn));
    found
}

fn root_hole(image: &Image, plan: Plan, rng: &mut Rng) -> Option<Step> {
    let absent = |step: &Step| matches!(step.entry, Entry::NonPresent);
    (0..256)
        .filter_map(|_| {
            image
                .walk(Gfn(rng.below(plan.max_gfn().0)))
                .first()
                .copied()
        })
        .find(absent)
}

/// Overwrites entries of `image` by every recipe of its family. A recipe that finds no entry to
/// change is left out only where the format has no place for it (a root without an empty entry).
///
/// # Errors
/// When `decode` judges an entry otherwise than the manual, or tables hold nothing to change.
pub fn apply(
    image: &mut Image,
    guest: &Guest,
    plan: Plan,
    rng: &mut Rng,
) -> anyhow::Result<Vec<Patch>> {
    let mut patches = Vec::new();
    for recipe in recipes(image.ops())? {
        if !recipe.apply(image, guest, plan, rng, &mut patches)? {
            ensure!(
                recipe.target == Target::RootHole,
                "{}: no entry to change",
                recipe.name
            );
        }
    }
    Ok(patches)
}

/// Overwrites the root's entry for the highest address by its recipe, whatever it held: for an
/// image whose root has no empty entry that can be asked about. `None` if the program's own guest
/// lies below that entry.
///
/// # Errors
/// As for [`apply`].
pub fn apply_to_root(
    image: &mut Image,
    guest: &Guest,
    plan: Plan,
    rng: &mut Rng,
) -> anyhow::Result<Option<Patch>> {
    let top = Gfn(plan.max_gfn().0 - 1);
    let step = image.walk(top).first().copied();
    let Some(step) = step.filter(|step| !guest.is_own(step.gfn)) else {
        return Ok(None);
    };
    let recipe = recipes(image.ops())?
        .into_iter()
        .find(|recipe| recipe.target == Target::RootHole)
        .context("no recipe for a root's entry")?;
    recipe.overwrite(image, plan, &step, rng).map(Some)
}

fn recipes(ops: &Ops) -> anyhow::Result<Vec<Recipe>> {
    Ok(match (Family::of(ops)?, ops.info.ad_policy) {
        (Family::Ept, AdPolicy::AccessTracking) => [EPT, EPT_TRACKED].concat(),
        (Family::Ept, _) => [EPT, EPT_AD].concat(),
        (Family::Npt, _) => NPT.to_vec(),
        (Family::RiscV, _) => RISC_V.to_vec(),
    })
}

impl Recipe {
    /// Overwrites one entry.
    fn overwrite(
        &self,
        image: &mut Image,
        plan: Plan,
        step: &Step,
        rng: &mut Rng,
    ) -> anyhow::Result<Patch> {
        let raw = (self.make)(image.ops(), plan, step, rng)
            .with_context(|| format!("{}: the format has no such entry", self.name))?;
        let entry = (image.ops().decode)(raw, step.level);
        ensure!(
            kind(entry) == Some(self.kind),
            "{}: decode({raw:#x}, {}) is {entry:?}, which is not {:?}",
            self.name,
            step.level,
            self.kind
        );
        ensure!(image.patch(step.at, raw), "an entry outside the image");
        Ok(Patch {
            name: self.name,
            at: step.at,
            gfn: step.gfn,
            level: step.level,
        })
    }

    /// Overwrites [`TIMES`] entries, or fewer where there are not so many. Whether there was one.
    fn apply(
        &self,
        image: &mut Image,
        guest: &Guest,
        plan: Plan,
        rng: &mut Rng,
        patches: &mut Vec<Patch>,
    ) -> anyhow::Result<bool> {
        // What an earlier recipe changed, or hides, is no candidate.
        let there = candidates(image, guest, self.target);
        let before = patches.len();
        for _ in 0..TIMES * 8 {
            let step = match self.target {
                Target::RootHole => root_hole(image, plan, rng),
                _ => rng.pick(&there).copied(),
            };
            let fresh = |step: &Step| patches.iter().all(|patch| patch.at != step.at);
            if let Some(step) = step.filter(fresh) {
                patches.push(self.overwrite(image, plan, &step, rng)?);
            }
            if patches.len() - before == TIMES {
                break;
            }
        }
        Ok(patches.len() > before)
    }
}
