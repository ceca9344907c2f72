//! The exit qualification of an EPT violation (VM exit 48).
//!
//! Source: Intel SDM vol. 3C, "Basic VM-Exit Information", table "Exit Qualification for EPT
//! Violations". Bits that depend on features this crate does not use (mode-based execute control,
//! NMI unblocking) are left out.

use slat_mmu::Access;

/// What the guest did and what the entries allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EptViolation {
    /// The access was a data read (bit 0). With Accessed and Dirty enabled, a processor's own
    /// access to a guest page table counts as a write as well.
    pub read: bool,
    /// The access was a data write (bit 1).
    pub write: bool,
    /// The access was an instruction fetch (bit 2).
    pub fetch: bool,
    /// Every entry on the path allows reads (bit 3).
    pub readable: bool,
    /// Every entry on the path allows writes (bit 4).
    pub writable: bool,
    /// Every entry on the path allows fetches (bit 5).
    pub executable: bool,
    /// The access was to the translation of the guest linear address, and not to a guest page table
    /// on the way to it. `None` if the guest linear address is not valid (bits 7 and 8).
    pub final_access: Option<bool>,
}

impl EptViolation {
    /// Reads the qualification.
    pub const fn decode(qualification: u64) -> Self {
        const fn set(value: u64, bit: u32) -> bool {
            value >> bit & 1 == 1
        }
        Self {
            read: set(qualification, 0),
            write: set(qualification, 1),
            fetch: set(qualification, 2),
            readable: set(qualification, 3),
            writable: set(qualification, 4),
            executable: set(qualification, 5),
            final_access: if set(qualification, 7) {
                Some(set(qualification, 8))
            } else {
                None
            },
        }
    }

    /// The access to resolve: the strongest that the processor named.
    pub const fn access(self) -> Access {
        if self.write {
            Access::Write
        } else if self.fetch {
            Access::Execute
        } else {
            Access::Read
        }
    }

    /// Whether any entry allowed anything. If not, the page was absent, or access-tracked in
    /// `ept4-noad` and `ept5-noad`.
    pub const fn was_present(self) -> bool {
        self.readable || self.writable || self.executable
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qualifications() {
        // A store to a page that may be read and executed, at its final address.
        let store = EptViolation::decode(0x1aa);
        assert_eq!(store.access(), Access::Write);
        assert!(store.readable && !store.writable && store.executable);
        assert_eq!(store.final_access, Some(true));
        // A fetch from nothing, and a walk's access (read and write) to a guest page table.
        let fetch = EptViolation::decode(0x184);
        assert_eq!(fetch.access(), Access::Execute);
        assert!(!fetch.was_present());
        let walk = EptViolation::decode(0x8b);
        assert_eq!(walk.access(), Access::Write);
        assert!(walk.read && walk.was_present());
        assert_eq!(walk.final_access, Some(false));
        assert_eq!(EptViolation::decode(1).final_access, None);
    }
}
