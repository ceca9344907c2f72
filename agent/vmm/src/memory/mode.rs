//! How a slot's memory is to be made: a VM's mode, for all of its slots.
//!
//! | mode | pages | populating | background |
//! |---|---|---|---|
//! | `auto` | 2 MiB where cheap | touch, then MADV_COLLAPSE (see `huge`) | collapses |
//! | `thp` | MADV_HUGEPAGE: what settings give at a touch | faults | looks, see `collapse` |
//! | `hugetlb-2m`, `-1g` | set aside, reserved by the first mapping | faults | nothing |
//! | `small` | 4 KiB, MADV_NOHUGEPAGE | faults | nothing |
//!
//! # Reserved pages
//! What is reserved belongs to the file, so the second view costs nothing more, and no touch can
//! find the host without pages. Three things follow from it.
//! * Punching a hole would give the reservation up with the page, and a guest that came back would
//!   die of SIGBUS. So discarding overwrites with zeroes, exactly the pages named, and frees
//!   nothing; nobody else could have used the pages anyway.
//! * Translations are dropped by whole pages: a range is widened to them, which costs faults and
//!   nothing else.
//! * Slots are multiples of such a page. Their guest frames need not be: where those are not
//!   aligned alike, the second stage maps smaller pieces.
//!
//! The dirty log counts 4 KiB in every mode. KVM maps what is logged by 4 KiB, whatever the memory
//! is made of, and goes back to large mappings after it where the kernel does so.
//!
//! # NUMA
//! The policy is the file's: set through one view, it holds for both, and for pages that are
//! written by a call.
//!
//! Nothing here watches faults by userfaultfd. Whoever does must know that a fault in reserved
//! pages is one of the whole page: minor faults of a hugetlb file are resolved by 2 MiB or 1 GiB.

use slat_proto::model::{MemoryBacking, VmSpec};

/// See the module.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mode {
    /// Which pages.
    pub(crate) backing: MemoryBacking,
    /// Of which NUMA node alone.
    pub(crate) node: Option<u32>,
}

impl From<&VmSpec> for Mode {
    fn from(spec: &VmSpec) -> Self {
        Self {
            backing: spec.backing,
            node: spec.numa_node,
        }
    }
}
