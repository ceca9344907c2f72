//! The format as a value, for configuration and for code that learns it at run time.

use alloc::{boxed::Box, string::String};
use core::{fmt, str::FromStr};

use slat_mmu::{Format, FormatInfo, Host, MmuConfig, Pfn, SecondStage, TableMemory, TdpMmu};
use thiserror::Error;

use crate::{Ept4, Sv39x4, Sv48x4, Sv57x4};

/// Which second-stage format a guest uses.
///
/// Parsed from and shown as the names `ept4`, `sv39x4`, `sv48x4`, `sv57x4`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum GuestStage {
    /// [`Ept4`].
    Ept4,
    /// [`Sv39x4`].
    Sv39x4,
    /// [`Sv48x4`].
    Sv48x4,
    /// [`Sv57x4`].
    Sv57x4,
}

/// A name that is no format's.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("unknown second-stage format {name:?}; known are ept4, sv39x4, sv48x4, sv57x4")]
pub struct UnknownStage {
    /// The name given.
    pub name: String,
}

impl GuestStage {
    /// Every format.
    pub const ALL: [Self; 4] = [Self::Ept4, Self::Sv39x4, Self::Sv48x4, Self::Sv57x4];

    /// The format's constants.
    pub fn info(self) -> FormatInfo {
        match self {
            Self::Ept4 => Ept4::info(),
            Self::Sv39x4 => Sv39x4::info(),
            Self::Sv48x4 => Sv48x4::info(),
            Self::Sv57x4 => Sv57x4::info(),
        }
    }

    /// An MMU of this format with its tables in `memory`; `host` carries out its flushes.
    pub fn build<H>(
        self,
        memory: H,
        host: impl Host + 'static,
        config: MmuConfig,
    ) -> Box<dyn SecondStage>
    where
        H: TableMemory + 'static,
    {
        match self {
            Self::Ept4 => Box::new(TdpMmu::<Ept4, H>::new(memory, host, config)),
            Self::Sv39x4 => Box::new(TdpMmu::<Sv39x4, H>::new(memory, host, config)),
            Self::Sv48x4 => Box::new(TdpMmu::<Sv48x4, H>::new(memory, host, config)),
            Self::Sv57x4 => Box::new(TdpMmu::<Sv57x4, H>::new(memory, host, config)),
        }
    }

    /// The register that makes hardware walk `root`: EPTP on x86, which has no room for `vmid`, `hgatp` on RISC-V.
    pub fn root_register(self, root: Pfn, vmid: u16) -> u64 {
        match self {
            Self::Ept4 => Ept4::eptp(root),
            Self::Sv39x4 => Sv39x4::hgatp(root, vmid),
            Self::Sv48x4 => Sv48x4::hgatp(root, vmid),
            Self::Sv57x4 => Sv57x4::hgatp(root, vmid),
        }
    }
}

impl fmt::Display for GuestStage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.info().name)
    }
}

impl FromStr for GuestStage {
    type Err = UnknownStage;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|stage| stage.info().name == name)
            .ok_or_else(|| UnknownStage { name: name.into() })
    }
}

#[cfg(test)]
mod tests {
    use alloc::string::ToString;

    use super::*;

    #[test]
    fn names_round_trip() {
        for stage in GuestStage::ALL {
            assert_eq!(stage.to_string().parse(), Ok(stage));
        }
        assert!("sv32x4".parse::<GuestStage>().is_err());
        assert!("EPT4".parse::<GuestStage>().is_err());
    }
}
