//! What a VM is made of, checked, with every default filled in.

use std::{fmt, str::FromStr};

use super::{
    backing::MemoryBacking, labels::Labels, memstress::MemstressSpec, paging::Paging,
    slot::PAGE_SIZE,
};
use crate::{ApiError, v1};

/// Least guest memory: the guest's own tables and code, and something to write.
const MIN_MEMORY: u64 = 8 << 20;
/// Guest memory comes in these steps.
const MEMORY_STEP: u64 = 2 << 20;
/// Most guest memory: two slots of 2^31 - 1 pages would hold more; no host tested here does.
const MAX_MEMORY: u64 = 4 << 40;
const MAX_VCPUS: u32 = 64;
/// The kernel numbers nodes below 1024 at most.
const MAX_NODE: u32 = 1023;
const MAX_IMAGE: usize = 1 << 20;

/// How a VM's second stage is walked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BackendKind {
    /// The kernel walks.
    Kvm,
    /// The Common MMU is the page table.
    Software,
}

impl BackendKind {
    /// As a message.
    #[must_use]
    pub fn to_message(self) -> v1::Backend {
        match self {
            Self::Kvm => v1::Backend::Kvm,
            Self::Software => v1::Backend::Software,
        }
    }

    /// From a message's field; `None` for UNSPECIFIED.
    ///
    /// # Errors
    /// BAD_PARAMETER for a number that is no backend.
    pub fn from_field(value: i32) -> Result<Option<Self>, ApiError> {
        match v1::Backend::try_from(value) {
            Ok(v1::Backend::Unspecified) => Ok(None),
            Ok(v1::Backend::Kvm) => Ok(Some(Self::Kvm)),
            Ok(v1::Backend::Software) => Ok(Some(Self::Software)),
            Err(_) => Err(ApiError::bad_parameter(
                "spec.backend",
                format_args!("{value} is no backend"),
            )),
        }
    }
}

impl fmt::Display for BackendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Software => "software",
        })
    }
}

/// How KVM tells which pages a VM wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DirtyEngine {
    /// One bit a page.
    Bitmap,
    /// One ring of written pages a vCPU.
    Ring,
}

impl DirtyEngine {
    /// As a message.
    #[must_use]
    pub fn to_message(self) -> v1::DirtyEngine {
        match self {
            Self::Bitmap => v1::DirtyEngine::Bitmap,
            Self::Ring => v1::DirtyEngine::Ring,
        }
    }

    /// From a message's field; `None` for UNSPECIFIED.
    ///
    /// # Errors
    /// BAD_PARAMETER for a number that is no engine.
    pub fn from_field(value: i32) -> Result<Option<Self>, ApiError> {
        match v1::DirtyEngine::try_from(value) {
            Ok(v1::DirtyEngine::Unspecified) => Ok(None),
            Ok(v1::DirtyEngine::Bitmap) => Ok(Some(Self::Bitmap)),
            Ok(v1::DirtyEngine::Ring) => Ok(Some(Self::Ring)),
            Err(_) => Err(ApiError::bad_parameter(
                "spec.dirty_engine",
                format_args!("{value} is no engine"),
            )),
        }
    }
}

impl fmt::Display for DirtyEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bitmap => "bitmap",
            Self::Ring => "ring",
        })
    }
}

/// Layout of second-stage entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// Intel EPT, 4 levels.
    Ept4,
    /// RISC-V Sv39x4.
    Sv39x4,
    /// RISC-V Sv48x4.
    Sv48x4,
    /// RISC-V Sv57x4.
    Sv57x4,
    /// Intel EPT, 5 levels.
    Ept5,
    /// AMD NPT, 4 levels.
    Npt4,
    /// AMD NPT, 5 levels.
    Npt5,
    /// Intel EPT, 4 levels, Accessed and Dirty kept by faults.
    Ept4NoAd,
    /// Intel EPT, 5 levels, Accessed and Dirty kept by faults.
    Ept5NoAd,
    /// arm64 stage 2, 40-bit addresses.
    Arm64Ipa40,
    /// arm64 stage 2, 48-bit addresses.
    Arm64Ipa48,
}

impl Format {
    /// Every format.
    pub const ALL: [Format; 11] = [
        Self::Ept4,
        Self::Sv39x4,
        Self::Sv48x4,
        Self::Sv57x4,
        Self::Ept5,
        Self::Npt4,
        Self::Npt5,
        Self::Ept4NoAd,
        Self::Ept5NoAd,
        Self::Arm64Ipa40,
        Self::Arm64Ipa48,
    ];

    /// As a message.
    #[must_use]
    pub fn to_message(self) -> v1::Format {
        match self {
            Self::Ept4 => v1::Format::Ept4,
            Self::Sv39x4 => v1::Format::Sv39x4,
            Self::Sv48x4 => v1::Format::Sv48x4,
            Self::Sv57x4 => v1::Format::Sv57x4,
            Self::Ept5 => v1::Format::Ept5,
            Self::Npt4 => v1::Format::Npt4,
            Self::Npt5 => v1::Format::Npt5,
            Self::Ept4NoAd => v1::Format::Ept4Noad,
            Self::Ept5NoAd => v1::Format::Ept5Noad,
            Self::Arm64Ipa40 => v1::Format::Arm64Ipa40,
            Self::Arm64Ipa48 => v1::Format::Arm64Ipa48,
        }
    }

    /// From a message's field; `None` for UNSPECIFIED.
    ///
    /// # Errors
    /// BAD_PARAMETER for a number that is no format.
    pub fn from_field(value: i32) -> Result<Option<Self>, ApiError> {
        match v1::Format::try_from(value) {
            Ok(v1::Format::Unspecified) => Ok(None),
            Ok(v1::Format::Ept4) => Ok(Some(Self::Ept4)),
            Ok(v1::Format::Sv39x4) => Ok(Some(Self::Sv39x4)),
            Ok(v1::Format::Sv48x4) => Ok(Some(Self::Sv48x4)),
            Ok(v1::Format::Sv57x4) => Ok(Some(Self::Sv57x4)),
            Ok(v1::Format::Ept5) => Ok(Some(Self::Ept5)),
            Ok(v1::Format::Npt4) => Ok(Some(Self::Npt4)),
            Ok(v1::Format::Npt5) => Ok(Some(Self::Npt5)),
            Ok(v1::Format::Ept4Noad) => Ok(Some(Self::Ept4NoAd)),
            Ok(v1::Format::Ept5Noad) => Ok(Some(Self::Ept5NoAd)),
            Ok(v1::Format::Arm64Ipa40) => Ok(Some(Self::Arm64Ipa40)),
            Ok(v1::Format::Arm64Ipa48) => Ok(Some(Self::Arm64Ipa48)),
            Err(_) => Err(ApiError::bad_parameter(
                "spec.format",
                format_args!("{value} is no format"),
            )),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ept4 => "ept4",
            Self::Sv39x4 => "sv39x4",
            Self::Sv48x4 => "sv48x4",
            Self::Sv57x4 => "sv57x4",
            Self::Ept5 => "ept5",
            Self::Npt4 => "npt4",
            Self::Npt5 => "npt5",
            Self::Ept4NoAd => "ept4-noad",
            Self::Ept5NoAd => "ept5-noad",
            Self::Arm64Ipa40 => "arm64-ipa40",
            Self::Arm64Ipa48 => "arm64-ipa48",
        })
    }
}

impl FromStr for Format {
    type Err = ApiError;
    fn from_str(text: &str) -> Result<Self, ApiError> {
        Self::ALL
            .into_iter()
            .find(|format| format.to_string() == text)
            .ok_or_else(|| {
                let names: Vec<String> = Self::ALL.iter().map(Format::to_string).collect();
                ApiError::bad_parameter("format", format_args!("is one of {}", names.join(", ")))
            })
    }
}

/// Flat code. A VM that exists carries the size alone: its memory has the code.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RawImageSpec {
    /// The code; empty once the VM exists.
    pub bytes: Vec<u8>,
    /// How long the code is, bytes.
    pub size: u64,
}

impl From<Vec<u8>> for RawImageSpec {
    fn from(bytes: Vec<u8>) -> Self {
        let size = bytes.len() as u64;
        Self { bytes, size }
    }
}

/// What runs inside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestSpec {
    /// The self-checking memory writer.
    Memstress(MemstressSpec),
    /// Flat code; its contract is in `vm.proto`.
    RawImage(RawImageSpec),
}

/// What `paging: AGENT` cannot be together with.
fn check_paged(backend: Option<BackendKind>, backing: MemoryBacking) -> Result<(), ApiError> {
    if backend == Some(BackendKind::Software) {
        return Err(ApiError::bad_parameter(
            "spec.paging",
            "the software backend pages its guests itself; leave it out, or take KVM",
        ));
    }
    if backing.reserved_page().is_some() {
        return Err(ApiError::bad_parameter(
            "spec.paging",
            format_args!("pages that the host set aside ({backing}) are paged by the kernel alone"),
        )
        .with("backing", backing));
    }
    Ok(())
}

/// A VM's immutable description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmSpec {
    /// Guest memory, bytes, a multiple of 2 MiB.
    pub memory_bytes: u64,
    /// 1 to 64.
    pub vcpus: u32,
    /// `None`: the agent chooses KVM where it can, software elsewhere.
    pub backend: Option<BackendKind>,
    /// Software backend: entry format. `None`: EPT4 on software, the kernel's on KVM.
    pub format: Option<Format>,
    /// How written pages are told. `None`: the host chooses.
    pub dirty_engine: Option<DirtyEngine>,
    /// What guest memory is made of.
    pub backing: MemoryBacking,
    /// Of this NUMA node alone.
    pub numa_node: Option<u32>,
    /// All of it is populated before the VM starts.
    pub prefault: bool,
    /// Who decides which pages are mapped.
    pub paging: Paging,
    /// What its owner calls it by.
    pub labels: Labels,
    /// What runs inside.
    pub guest: GuestSpec,
}

impl VmSpec {
    /// Checks a message and fills defaults in.
    ///
    /// # Errors
    /// BAD_PARAMETER with the field at fault.
    pub fn from_message(message: &v1::VmSpec) -> Result<Self, ApiError> {
        let memory = message.memory_bytes;
        if !(MIN_MEMORY..=MAX_MEMORY).contains(&memory) || !memory.is_multiple_of(MEMORY_STEP) {
            return Err(ApiError::bad_parameter(
                "spec.memory_bytes",
                format_args!("{memory} bytes are not a multiple of 2 MiB between 8 MiB and 4 TiB"),
            )
            .with("value", memory));
        }
        if !(1..=MAX_VCPUS).contains(&message.vcpus) {
            return Err(ApiError::bad_parameter(
                "spec.vcpus",
                format_args!("{} is not between 1 and {MAX_VCPUS}", message.vcpus),
            )
            .with("value", message.vcpus));
        }
        let backing = MemoryBacking::from_field(message.backing)?;
        if let Some(page) = backing
            .reserved_page()
            .filter(|page| !memory.is_multiple_of(*page))
        {
            return Err(ApiError::bad_parameter(
                "spec.memory_bytes",
                format_args!(
                    "{memory} bytes are no multiple of the {page} bytes of a {backing} page"
                ),
            )
            .with("value", memory)
            .with("page_bytes", page));
        }
        if let Some(node) = message.numa_node.filter(|node| *node > MAX_NODE) {
            return Err(ApiError::bad_parameter(
                "spec.numa_node",
                format_args!("{node} is above {MAX_NODE}"),
            )
            .with("value", node));
        }
        let backend = BackendKind::from_field(message.backend)?;
        let format = Format::from_field(message.format)?;
        if backend == Some(BackendKind::Kvm) && format.is_some() {
            return Err(ApiError::bad_parameter(
                "spec.format",
                "on KVM the kernel chooses the format; leave it out or take the software backend",
            ));
        }
        let paging = Paging::from_field(message.paging)?;
        if paging == Paging::Agent {
            check_paged(backend, backing)?;
        }
        let guest = match &message.guest {
            None => GuestSpec::Memstress(MemstressSpec::default()),
            Some(v1::vm_spec::Guest::Memstress(memstress)) => {
                GuestSpec::Memstress(MemstressSpec::from_message(memstress)?)
            }
            Some(v1::vm_spec::Guest::RawImage(raw)) => {
                if raw.image.is_empty() || raw.image.len() > MAX_IMAGE {
                    return Err(ApiError::bad_parameter(
                        "spec.raw_image.image",
                        format_args!("{} bytes; 1 byte to 1 MiB", raw.image.len()),
                    ));
                }
                GuestSpec::RawImage(raw.image.clone().into())
            }
        };
        Ok(Self {
            memory_bytes: memory,
            vcpus: message.vcpus,
            backend,
            format,
            dirty_engine: DirtyEngine::from_field(message.dirty_engine)?,
            backing,
            numa_node: message.numa_node,
            prefault: message.prefault,
            paging,
            labels: Labels::from_field("spec.labels", &message.labels)?,
            guest,
        })
    }

    /// As a message.
    #[must_use]
    pub fn to_message(&self) -> v1::VmSpec {
        v1::VmSpec {
            memory_bytes: self.memory_bytes,
            vcpus: self.vcpus,
            backend: self
                .backend
                .map_or(v1::Backend::Unspecified, BackendKind::to_message)
                .into(),
            format: self
                .format
                .map_or(v1::Format::Unspecified, Format::to_message)
                .into(),
            dirty_engine: self
                .dirty_engine
                .map_or(v1::DirtyEngine::Unspecified, DirtyEngine::to_message)
                .into(),
            backing: self.backing.to_message().into(),
            numa_node: self.numa_node,
            prefault: self.prefault,
            paging: self.paging.to_message().into(),
            labels: self.labels.to_field(),
            guest: Some(match &self.guest {
                GuestSpec::Memstress(memstress) => {
                    v1::vm_spec::Guest::Memstress(memstress.to_message())
                }
                GuestSpec::RawImage(raw) => v1::vm_spec::Guest::RawImage(v1::RawImage {
                    image: raw.bytes.clone(),
                    size_bytes: raw.size,
                }),
            }),
        }
    }

    /// Checks the spec of a VM that exists, as another host shows it: a raw image's bytes are in
    /// the VM's memory.
    ///
    /// # Errors
    /// BAD_PARAMETER with the field at fault.
    pub fn from_resource(message: &v1::VmSpec) -> Result<Self, ApiError> {
        match &message.guest {
            Some(v1::vm_spec::Guest::RawImage(raw)) => {
                if !(1..=MAX_IMAGE as u64).contains(&raw.size_bytes) {
                    return Err(ApiError::bad_parameter(
                        "spec.raw_image.size_bytes",
                        format_args!("{}; 1 byte to 1 MiB", raw.size_bytes),
                    ));
                }
                let mut spec = Self::from_message(&v1::VmSpec {
                    guest: None,
                    ..message.clone()
                })?;
                spec.guest = GuestSpec::RawImage(RawImageSpec {
                    bytes: Vec::new(),
                    size: raw.size_bytes,
                });
                Ok(spec)
            }
            _ => Self::from_message(message),
        }
    }

    /// As a VM that exists shows it: without a raw image's bytes.
    #[must_use]
    pub fn to_resource(&self) -> v1::VmSpec {
        let mut message = self.to_message();
        if let Some(v1::vm_spec::Guest::RawImage(raw)) = &mut message.guest {
            raw.image.clear();
        }
        message
    }

    /// Bytes of the memory that its host gives to VMs.
    #[must_use]
    pub fn ordinary_bytes(&self) -> u64 {
        self.backing.ordinary_bytes(self.memory_bytes)
    }

    /// Guest memory in pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.memory_bytes / PAGE_SIZE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message() -> v1::VmSpec {
        v1::VmSpec {
            memory_bytes: 64 << 20,
            vcpus: 2,
            ..Default::default()
        }
    }

    #[test]
    fn defaults_are_filled_and_survive_the_wire() {
        let spec = VmSpec::from_message(&message()).unwrap();
        assert_eq!(spec.guest, GuestSpec::Memstress(MemstressSpec::default()));
        assert_eq!(VmSpec::from_message(&spec.to_message()).unwrap(), spec);
    }

    #[test]
    fn a_vm_that_exists_shows_its_images_size_only() {
        let mut message = message();
        message.guest = Some(v1::vm_spec::Guest::RawImage(v1::RawImage {
            image: vec![0x90; 100],
            size_bytes: 0,
        }));
        let shown = VmSpec::from_message(&message).unwrap().to_resource();
        assert!(VmSpec::from_message(&shown).is_err(), "no image to run");
        let there = VmSpec::from_resource(&shown).unwrap();
        assert_eq!(there.to_resource(), shown);
        match there.guest {
            GuestSpec::RawImage(raw) => assert_eq!((raw.bytes.len(), raw.size), (0, 100)),
            GuestSpec::Memstress(_) => panic!("not a raw image"),
        }
    }

    #[test]
    fn each_bad_field_is_named() {
        let field = |change: &dyn Fn(&mut v1::VmSpec)| {
            let mut bad = message();
            change(&mut bad);
            VmSpec::from_message(&bad).unwrap_err().metadata["field"].clone()
        };
        assert_eq!(field(&|m| m.memory_bytes = 0), "spec.memory_bytes");
        assert_eq!(
            field(&|m| m.memory_bytes = (64 << 20) + 4096),
            "spec.memory_bytes"
        );
        assert_eq!(field(&|m| m.memory_bytes = u64::MAX), "spec.memory_bytes");
        assert_eq!(field(&|m| m.vcpus = 0), "spec.vcpus");
        assert_eq!(field(&|m| m.vcpus = 65), "spec.vcpus");
        assert_eq!(field(&|m| m.backend = 9), "spec.backend");
        assert_eq!(field(&|m| m.format = -1), "spec.format");
        assert_eq!(field(&|m| m.dirty_engine = 7), "spec.dirty_engine");
        assert_eq!(field(&|m| m.backing = 7), "spec.backing");
        assert_eq!(field(&|m| m.numa_node = Some(1024)), "spec.numa_node");
        // 64 MiB are no 1 GiB pages.
        let gigantic = |m: &mut v1::VmSpec| m.backing = v1::MemoryBacking::Hugetlb1g.into();
        assert_eq!(field(&gigantic), "spec.memory_bytes");
        let kvm_format = |m: &mut v1::VmSpec| {
            m.backend = v1::Backend::Kvm.into();
            m.format = v1::Format::Ept4.into();
        };
        assert_eq!(field(&kvm_format), "spec.format");
    }
}
