//! Offsets and values of the control page; the table is in the parent's doc.

use slat_proto::model::PAGE_SIZE;

use crate::guest::Layout;

/// `SLATMEM1`.
pub(super) const MAGIC: u64 = u64::from_le_bytes(*b"SLATMEM1");
pub(super) const VERSION: u64 = 1;
/// In the rate, the visit ceiling and the first error: there is none.
pub(super) const NONE: u64 = u64::MAX;
/// All of 2^32: a visit always writes, without asking the generator.
pub(super) const ALWAYS: u64 = 1 << 32;
/// Owned ranges begin at multiples of this, so that two vCPUs never share a word or a cache line of the table.
pub(super) const GRAIN: u64 = 16;

/// Values of [`offset::PATTERN`].
pub(super) mod pattern {
    pub(in super::super) const SEQUENTIAL: u64 = 0;
    pub(in super::super) const RANDOM: u64 = 1;
    pub(in super::super) const HOT_COLD: u64 = 2;
}

/// Offsets in a control page, bytes.
pub(crate) mod offset {
    /// Magic.
    pub(crate) const MAGIC: u64 = 0x000;
    /// Version.
    pub(crate) const VERSION: u64 = 0x008;
    /// This vCPU.
    pub(crate) const VCPU: u64 = 0x010;
    /// Number of vCPUs.
    pub(crate) const VCPUS: u64 = 0x018;
    /// Pattern.
    pub(crate) const PATTERN: u64 = 0x020;
    /// Visits that write, of 2^32.
    pub(crate) const WRITE_SHARE: u64 = 0x028;
    /// Visits to hot pages, of 2^32.
    pub(crate) const HOT_SHARE: u64 = 0x030;
    /// Hot pages.
    pub(crate) const HOT_PAGES: u64 = 0x038;
    /// First owned page.
    pub(crate) const FIRST_PAGE: u64 = 0x040;
    /// Owned pages.
    pub(crate) const PAGES: u64 = 0x048;
    /// Working pages of the VM.
    pub(crate) const WORKING_PAGES: u64 = 0x050;
    /// Ceiling of the VM, bytes a second.
    pub(crate) const RATE: u64 = 0x058;
    /// Linear address of the expected-pass table.
    pub(crate) const EXPECTED: u64 = 0x060;
    /// Linear address of the working pages.
    pub(crate) const WORK: u64 = 0x068;
    /// Where the hole is in linear addresses.
    pub(crate) const LOW_LIMIT: u64 = 0x070;
    /// What passes it.
    pub(crate) const HOLE: u64 = 0x078;
    /// Visits in a batch.
    pub(crate) const BATCH: u64 = 0x080;
    /// Idle from this many visits on.
    pub(crate) const VISIT_LIMIT: u64 = 0x088;
    /// Next owned page.
    pub(crate) const POSITION: u64 = 0x100;
    /// Random number generator.
    pub(crate) const RANDOM: u64 = 0x108;
    /// Visits so far.
    pub(crate) const VISITS: u64 = 0x140;
    /// Pages written so far.
    pub(crate) const PAGES_WRITTEN: u64 = 0x148;
    /// Mismatches so far.
    pub(crate) const ERRORS: u64 = 0x150;
    /// Page of the first mismatch.
    pub(crate) const FIRST_ERROR_PAGE: u64 = 0x158;
}

/// Guest-physical address of a vCPU's control page.
#[must_use]
pub(crate) fn control_page(vcpu: u32) -> u64 {
    Layout::CONTROL + u64::from(vcpu) * PAGE_SIZE
}
