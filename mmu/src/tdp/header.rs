//! Page headers: what is known about each table.
//!
//! The counterpart of `struct kvm_mmu_page`, kept beside the tables because their frames hold nothing but entries. A
//! header is found by any frame of its table, so also by the second to fourth frame of a 16 KiB root.
//!
//! *Locking*: part of the MMU's locked state. *Invariants*: a linked table has exactly one header; a child's level is
//! its parent's minus one, and its first frame is aligned to what the linking entry spans.

use alloc::collections::BTreeMap;

use crate::addr::{Gfn, Level, PAGE_SIZE, Pfn};

/// What makes two tables interchangeable (`kvm_mmu_page_role`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PageRole {
    /// Address space.
    pub as_id: u8,
    /// Level of the table's entries.
    pub level: Level,
    /// The table belongs to a root that no vCPU may load any more.
    pub invalid: bool,
}

/// A table's description.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PageHeader {
    /// What the table is.
    pub role: PageRole,
    /// First guest frame that it covers.
    pub gfn: Gfn,
    /// First host frame of the table.
    pub pfn: Pfn,
    /// Its size in bytes.
    pub size: usize,
    /// First host frame of the table that links it, and the position there; `None` for a root.
    pub parent: Option<(Pfn, usize)>,
}

#[derive(Debug, Default)]
pub(crate) struct Headers(BTreeMap<Pfn, PageHeader>);

impl Headers {
    pub(crate) fn insert(
        &mut self,
        pfn: Pfn,
        size: usize,
        level: Level,
        gfn: Gfn,
        parent: Option<(Pfn, usize)>,
    ) {
        let role = PageRole {
            as_id: 0,
            level,
            invalid: false,
        };
        self.0.insert(
            pfn,
            PageHeader {
                role,
                gfn,
                pfn,
                size,
                parent,
            },
        );
    }

    pub(crate) fn remove(&mut self, pfn: Pfn) {
        self.0.remove(&pfn);
    }

    pub(crate) fn invalidate(&mut self, root: Pfn) {
        if let Some(header) = self.0.get_mut(&root) {
            header.role.invalid = true;
        }
    }

    /// The header of the table that `frame` is part of.
    pub(crate) fn of_frame(&self, frame: Pfn) -> Option<PageHeader> {
        let (first, header) = self.0.range(..=frame).next_back()?;
        (frame.0 - first.0 < header.size as u64 / PAGE_SIZE).then_some(*header)
    }

    #[cfg(test)]
    pub(crate) fn iter(&self) -> impl Iterator<Item = &PageHeader> {
        self.0.values()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_frame_of_a_wide_root_finds_it() {
        let mut headers = Headers::default();
        headers.insert(Pfn(8), 16384, Level::SIZE_1G, Gfn(0), None);
        headers.insert(Pfn(12), 4096, Level::SIZE_2M, Gfn(0), Some((Pfn(8), 0)));
        assert_eq!(headers.of_frame(Pfn(11)).unwrap().pfn, Pfn(8));
        assert_eq!(headers.of_frame(Pfn(12)).unwrap().parent, Some((Pfn(8), 0)));
        assert_eq!(headers.of_frame(Pfn(13)), None);
        assert_eq!(headers.of_frame(Pfn(7)), None);
        headers.invalidate(Pfn(8));
        assert!(headers.of_frame(Pfn(9)).unwrap().role.invalid);
    }
}
