//! Choices that last as long as an MMU.

use crate::{addr::Level, slot::DEFAULT_MAX_SLOTS};

/// What a slot's dirty bitmap looks like when logging begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DirtyLogStart {
    /// All clear; everything mapped is split to 4 KiB and protected at once.
    #[default]
    Protected,
    /// All set; pages are split and protected as they are cleared (`KVM_DIRTY_LOG_INITIALLY_SET`).
    InitiallySet,
}

/// Tables that splitting ahead leaves for faults unless configured otherwise: what four vCPUs fetch
/// at once. Models have few tables, and no splits ahead that could take them all.
const DEFAULT_FAULT_RESERVE: u32 = if cfg!(any(feature = "loom", feature = "shuttle")) {
    0
} else {
    32
};

/// Choices that last as long as an MMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MmuConfig {
    /// The coarsest mapping ever made, on top of what format and slot allow. 1 GiB unless changed,
    /// as in KVM.
    pub max_level: Level,
    /// Slots that may exist in each address space; numbers are below it.
    pub max_slots: u16,
    /// How dirty logging begins.
    pub dirty_log_start: DirtyLogStart,
    /// Split huge mappings ahead of the writes that would, when logging begins or pages are
    /// cleared. Without it each is protected as a whole and split by the first write.
    pub eager_split: bool,
    /// Tables that splitting ahead leaves for faults: it stops before it would touch them. 32
    /// unless changed (128 KiB). A fault takes up to one for each level below the root in a new
    /// place, and one for each 2 MiB after that; but a vCPU that has too few fetches 8 at once, so
    /// vCPUs that are to get on beside each other need 8 each.
    pub fault_reserve: u32,
    /// Address spaces, each with slots of its own; at least 1.
    pub address_spaces: u8,
    /// Remember frames without a slot in the table, where the format can, so that device accesses
    /// skip the lookup.
    pub mmio_caching: bool,
    /// Never map huge pages executable (the iTLB-multihit mitigation); only where the format asks
    /// for it.
    pub nx_huge_pages: bool,
    /// Every processor that the guest may run on has the extension by which its entries carry a
    /// memory type ([`Format::OPTIONAL_MEMORY_TYPES`](crate::Format::OPTIONAL_MEMORY_TYPES)).
    /// False unless said. Without it a slot whose memory is not
    /// [`Normal`](crate::MemoryType::Normal) is refused with
    /// [`SlotError::MemoryType`](crate::SlotError::MemoryType). Nothing is mapped as normal
    /// instead: where the platform itself knows what is device memory, as RISC-V's physical memory
    /// attributes do, the owner says `Normal`, which means just that. Formats that always have
    /// memory types ignore this.
    pub memory_types: bool,
}

impl Default for MmuConfig {
    fn default() -> Self {
        Self {
            max_level: Level::SIZE_1G,
            max_slots: DEFAULT_MAX_SLOTS,
            dirty_log_start: DirtyLogStart::default(),
            eager_split: true,
            fault_reserve: DEFAULT_FAULT_RESERVE,
            address_spaces: 1,
            mmio_caching: false,
            nx_huge_pages: false,
            memory_types: false,
        }
    }
}

impl MmuConfig {
    /// The same with another limit on the mapping level.
    #[must_use]
    pub const fn with_max_level(mut self, level: Level) -> Self {
        self.max_level = level;
        self
    }

    /// The same with another limit on slots.
    #[must_use]
    pub const fn with_max_slots(mut self, slots: u16) -> Self {
        self.max_slots = slots;
        self
    }

    /// The same with another start of dirty logging.
    #[must_use]
    pub const fn with_dirty_log_start(mut self, start: DirtyLogStart) -> Self {
        self.dirty_log_start = start;
        self
    }

    /// The same with or without eager splitting.
    #[must_use]
    pub const fn with_eager_split(mut self, on: bool) -> Self {
        self.eager_split = on;
        self
    }

    /// The same with another number of tables that splitting ahead leaves for faults.
    #[must_use]
    pub const fn with_fault_reserve(mut self, tables: u32) -> Self {
        self.fault_reserve = tables;
        self
    }

    /// The same with another number of address spaces.
    #[must_use]
    pub const fn with_address_spaces(mut self, count: u8) -> Self {
        self.address_spaces = count;
        self
    }

    /// The same with or without MMIO caching.
    #[must_use]
    pub const fn with_mmio_caching(mut self, on: bool) -> Self {
        self.mmio_caching = on;
        self
    }

    /// The same with or without the NX-huge-page mitigation.
    #[must_use]
    pub const fn with_nx_huge_pages(mut self, on: bool) -> Self {
        self.nx_huge_pages = on;
        self
    }

    /// The same with or without an extension for memory types.
    #[must_use]
    pub const fn with_memory_types(mut self, on: bool) -> Self {
        self.memory_types = on;
        self
    }
}
