//! What a VM's memory is made of on its host, checked.

use std::{fmt, str::FromStr};

use crate::{ApiError, v1};

/// Pages that a host's memory for a VM is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum MemoryBacking {
    /// 2 MiB pages where they are to be had cheaply, made afterwards elsewhere.
    #[default]
    Auto,
    /// What transparent huge pages give at a touch.
    Thp,
    /// Reserved pages of 2 MiB.
    Hugetlb2M,
    /// Reserved pages of 1 GiB.
    Hugetlb1G,
    /// 4 KiB pages alone.
    Small,
}

impl MemoryBacking {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Auto,
        Self::Thp,
        Self::Hugetlb2M,
        Self::Hugetlb1G,
        Self::Small,
    ];

    /// As a message.
    #[must_use]
    pub fn to_message(self) -> v1::MemoryBacking {
        match self {
            Self::Auto => v1::MemoryBacking::Auto,
            Self::Thp => v1::MemoryBacking::Thp,
            Self::Hugetlb2M => v1::MemoryBacking::Hugetlb2m,
            Self::Hugetlb1G => v1::MemoryBacking::Hugetlb1g,
            Self::Small => v1::MemoryBacking::Small,
        }
    }

    /// From a message's field. Who says nothing, as records from before there was a choice, means
    /// `Auto`.
    ///
    /// # Errors
    /// BAD_PARAMETER for a number that is no backing.
    pub fn from_field(value: i32) -> Result<Self, ApiError> {
        match v1::MemoryBacking::try_from(value) {
            Ok(v1::MemoryBacking::Unspecified | v1::MemoryBacking::Auto) => Ok(Self::Auto),
            Ok(v1::MemoryBacking::Thp) => Ok(Self::Thp),
            Ok(v1::MemoryBacking::Hugetlb2m) => Ok(Self::Hugetlb2M),
            Ok(v1::MemoryBacking::Hugetlb1g) => Ok(Self::Hugetlb1G),
            Ok(v1::MemoryBacking::Small) => Ok(Self::Small),
            Err(_) => Err(ApiError::bad_parameter(
                "spec.backing",
                format_args!("{value} is no backing"),
            )),
        }
    }

    /// Bytes of a page that hosts set aside; `None` where memory comes from what everybody uses.
    #[must_use]
    pub fn reserved_page(self) -> Option<u64> {
        match self {
            Self::Hugetlb2M => Some(2 << 20),
            Self::Hugetlb1G => Some(1 << 30),
            Self::Auto | Self::Thp | Self::Small => None,
        }
    }

    /// Of so many bytes of a VM, those that come out of the memory that its host gives to VMs.
    #[must_use]
    pub fn ordinary_bytes(self, bytes: u64) -> u64 {
        match self.reserved_page() {
            Some(_) => 0,
            None => bytes,
        }
    }
}

/// Of so many bytes of a VM that shows `spec`, those that come out of the memory that its host
/// gives to VMs. What its backing cannot be told of counts whole.
#[must_use]
pub fn ordinary_bytes(spec: Option<&v1::VmSpec>, bytes: u64) -> u64 {
    let backing = spec.and_then(|spec| MemoryBacking::from_field(spec.backing).ok());
    backing.unwrap_or_default().ordinary_bytes(bytes)
}

impl fmt::Display for MemoryBacking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Auto => "auto",
            Self::Thp => "thp",
            Self::Hugetlb2M => "hugetlb-2m",
            Self::Hugetlb1G => "hugetlb-1g",
            Self::Small => "small",
        })
    }
}

impl FromStr for MemoryBacking {
    type Err = ApiError;
    fn from_str(text: &str) -> Result<Self, ApiError> {
        let found = Self::ALL.into_iter().find(|one| one.to_string() == text);
        found.ok_or_else(|| {
            ApiError::bad_parameter(
                "backing",
                "is one of auto, thp, hugetlb-2m, hugetlb-1g, small",
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_survives_the_wire_and_its_name() {
        for backing in MemoryBacking::ALL {
            let field = backing.to_message().into();
            assert_eq!(MemoryBacking::from_field(field).unwrap(), backing);
            assert_eq!(backing.to_string().parse::<MemoryBacking>(), Ok(backing));
        }
        assert!("huge".parse::<MemoryBacking>().is_err());
    }

    #[test]
    fn who_says_nothing_means_auto() {
        assert_eq!(MemoryBacking::from_field(0).unwrap(), MemoryBacking::Auto);
        let error = MemoryBacking::from_field(6).unwrap_err();
        assert_eq!(error.metadata["field"], "spec.backing");
    }

    #[test]
    fn reserved_pages_are_not_of_the_memory_for_vms() {
        assert_eq!(MemoryBacking::Auto.ordinary_bytes(5), 5);
        assert_eq!(MemoryBacking::Hugetlb2M.ordinary_bytes(5), 0);
        let mut spec = v1::VmSpec {
            backing: v1::MemoryBacking::Hugetlb1g.into(),
            ..Default::default()
        };
        assert_eq!(ordinary_bytes(Some(&spec), 5), 0);
        spec.backing = 99;
        assert_eq!(ordinary_bytes(Some(&spec), 5), 5);
        assert_eq!(ordinary_bytes(None, 5), 5);
    }
}
