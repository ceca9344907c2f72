//! The functions of a [`Format`] as values, chosen by the format's name.

use anyhow::bail;
use slat_arch::{Ept4, Ept4NoAd, Ept5, Ept5NoAd, GuestStage, Npt4, Npt5, Sv39x4, Sv48x4, Sv57x4};
use slat_mmu::{Entry, Format, FormatInfo, Gfn, Leaf, Level, Pfn};

/// One format's functions and constants.
#[derive(Clone, Copy, Debug)]
pub struct Ops {
    /// Which one it is.
    pub stage: GuestStage,
    /// Its constants.
    pub info: FormatInfo,
    /// [`Format::FROZEN`].
    pub frozen: u64,
    /// [`Format::decode`].
    pub decode: fn(u64, Level) -> Entry,
    /// [`Format::make_leaf`].
    pub make_leaf: fn(&Leaf, Level) -> u64,
    /// [`Format::make_mmio`].
    pub make_mmio: fn(Gfn, u32) -> Option<u64>,
}

fn ops<F: Format>(stage: GuestStage) -> Ops {
    Ops {
        stage,
        info: F::info(),
        frozen: F::FROZEN,
        decode: F::decode,
        make_leaf: F::make_leaf,
        make_mmio: F::make_mmio,
    }
}

/// A VMID that has bits at both ends, so that a wrong field shows.
const VMID: u16 = 0x2005;

impl Ops {
    /// The format called `name`.
    ///
    /// # Errors
    /// When there is none, or no oracle knows it.
    pub fn named(name: &str) -> anyhow::Result<Self> {
        let stage: GuestStage = name.parse()?;
        Ok(match stage {
            GuestStage::Ept4 => ops::<Ept4>(stage),
            GuestStage::Ept4NoAd => ops::<Ept4NoAd>(stage),
            GuestStage::Ept5 => ops::<Ept5>(stage),
            GuestStage::Ept5NoAd => ops::<Ept5NoAd>(stage),
            GuestStage::Npt4 => ops::<Npt4>(stage),
            GuestStage::Npt5 => ops::<Npt5>(stage),
            GuestStage::Sv39x4 => ops::<Sv39x4>(stage),
            GuestStage::Sv48x4 => ops::<Sv48x4>(stage),
            GuestStage::Sv57x4 => ops::<Sv57x4>(stage),
            other => bail!("no oracle knows the format {other}"),
        })
    }

    /// The register that makes hardware walk `root`.
    pub fn register(&self, root: Pfn) -> u64 {
        self.stage.root_register(root, VMID)
    }

    /// Entries of a table at `level`.
    pub fn entries(&self, level: Level) -> u64 {
        if level == self.info.root_level {
            self.info.root_size as u64 / 8
        } else {
            512
        }
    }

    /// Pages that an entry at `level` spans.
    pub fn span(level: Level) -> u64 {
        1 << (9 * level.index())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::list;

    /// A new format needs no oracle; those that a machine of the list walks must be known.
    #[test]
    fn what_the_list_asks_about_is_known() {
        let asked = GuestStage::ALL.map(|stage| stage.info());
        let asked = asked.iter().filter(|info| list::asks_about(info.name));
        let known = asked.clone().filter(|info| {
            let ops = Ops::named(info.name);
            ops.is_ok_and(|ops| ops.info == **info)
        });
        assert!(known.eq(asked));
        assert!(list::asks_about("ept4") && !list::asks_about("ept"));
    }
}
