//! The format as a value, for configuration and for code that learns it at run time.

use alloc::{boxed::Box, string::String};
use core::{fmt, str::FromStr};

use slat_mmu::{Format, FormatInfo, Host, MmuConfig, Pfn, SecondStage, TableMemory, TdpMmu};
use thiserror::Error;

use crate::{
    Arm64Ipa40, Arm64Ipa48, Ept4, Ept4NoAd, Ept5, Ept5NoAd, Npt4, Npt5, Sv39x4, Sv48x4, Sv57x4,
    arm64::{VmidBits, vttbr},
};

/// Writes `GuestStage` and everything that has one arm a format, from one list: variant (the type
/// of the same name) and the register that holds the root.
macro_rules! stages {
    ($($variant:ident => |$root:ident, $vmid:ident| $register:expr,)*) => {
        /// Which second-stage format a guest uses.
        ///
        /// Parsed from and shown as [`Format::NAME`], for example `ept4`, `npt5`, `sv39x4`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum GuestStage {
            $(
                #[doc = concat!("[`", stringify!($variant), "`].")]
                $variant,
            )*
        }

        impl GuestStage {
            /// Every format.
            pub const ALL: [Self; [$(Self::$variant),*].len()] = [$(Self::$variant),*];

            /// The format's constants.
            pub fn info(self) -> FormatInfo {
                match self {
                    $(Self::$variant => $variant::info(),)*
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
                    $(Self::$variant => Box::new(TdpMmu::<$variant, H>::new(memory, host, config)),)*
                }
            }

            /// The register that makes hardware walk `root`: EPTP on Intel and `N_CR3` on AMD,
            /// which have no field for `vmid`, `hgatp` on RISC-V, `VTTBR_EL2` with a 16-bit VMID on
            /// arm64.
            pub fn root_register(self, root: Pfn, vmid: u16) -> u64 {
                match self {
                    $(Self::$variant => {
                        let ($root, $vmid) = (root, vmid);
                        $register
                    })*
                }
            }
        }
    };
}

stages! {
    Ept4 => |root, _vmid| Ept4::eptp(root),
    Ept5 => |root, _vmid| Ept5::eptp(root),
    Ept4NoAd => |root, _vmid| Ept4NoAd::eptp(root),
    Ept5NoAd => |root, _vmid| Ept5NoAd::eptp(root),
    Npt4 => |root, _vmid| Npt4::n_cr3(root),
    Npt5 => |root, _vmid| Npt5::n_cr3(root),
    Sv39x4 => |root, vmid| Sv39x4::hgatp(root, vmid),
    Sv48x4 => |root, vmid| Sv48x4::hgatp(root, vmid),
    Sv57x4 => |root, vmid| Sv57x4::hgatp(root, vmid),
    Arm64Ipa40 => |root, vmid| vttbr(root, vmid, VmidBits::Sixteen),
    Arm64Ipa48 => |root, vmid| vttbr(root, vmid, VmidBits::Sixteen),
}

/// A name that is no format's.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("unknown second-stage format {name:?}; known are {}", Names)]
pub struct UnknownStage {
    /// The name given.
    pub name: String,
}

/// The names of all formats, separated by commas.
struct Names;

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, stage) in GuestStage::ALL.iter().enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            write!(f, "{comma}{stage}")?;
        }
        Ok(())
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
        assert!("EPT4".parse::<GuestStage>().is_err());
    }

    #[test]
    fn names_are_unique() {
        for (i, a) in GuestStage::ALL.iter().enumerate() {
            for b in &GuestStage::ALL[..i] {
                assert_ne!(a.info().name, b.info().name);
            }
        }
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_known_ones() {
        let error = "sv32x4".parse::<GuestStage>().unwrap_err().to_string();
        assert!(
            error.starts_with("unknown second-stage format \"sv32x4\"; known are ept4, ept5, ")
        );
        for stage in GuestStage::ALL {
            assert!(error.contains(stage.info().name), "{error}");
        }
    }

    #[test]
    fn every_stage_has_its_register() {
        let register = |stage: GuestStage| stage.root_register(Pfn(0x1000), 3);
        assert_eq!(register(GuestStage::Ept4), 0x100_005e);
        assert_eq!(register(GuestStage::Ept5), 0x100_0066);
        assert_eq!(register(GuestStage::Ept5NoAd), 0x100_0026);
        assert_eq!(register(GuestStage::Arm64Ipa40), 0x0003_0000_0100_0000);
        assert_eq!(register(GuestStage::Npt4), 0x100_0000);
        assert_eq!(register(GuestStage::Sv39x4), 0x8000_3000_0000_1000);
    }
}
