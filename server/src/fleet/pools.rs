//! Whether a host set enough pages aside for a VM that takes such. Pure.
//!
//! What a host says of its pools is as old as its last report, and of a node it does not know what
//! is reserved there. So a yes is no promise, and the host's own admission decides; a no spares a
//! VM the way to a host that would refuse it. An agent that does not say is not refused here.

use slat_proto::{
    ApiError, Reason,
    model::{MemoryBacking, VmSpec},
    v1,
};

/// Pages that a VM takes out of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NeededPages {
    backing: MemoryBacking,
    /// Size of one.
    pub(super) page_bytes: u64,
    node: Option<u32>,
    /// How many.
    pub(super) pages: u64,
}

impl NeededPages {
    /// For `bytes` of a VM of `spec`; `None` when it takes none.
    pub(crate) fn of(spec: &VmSpec, bytes: u64) -> Option<Self> {
        let page_bytes = spec.backing.reserved_page()?;
        Some(Self {
            backing: spec.backing,
            page_bytes,
            node: spec.numa_node,
            pages: bytes.div_ceil(page_bytes),
        })
    }

    /// How many.
    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    /// Of those, what a host has free; `None` when its agent does not say. Both the host and the
    /// node must have them, for a reservation is the host's.
    pub(crate) fn free_on(&self, host: &v1::Host) -> Option<u64> {
        let pools = &host.huge_pages.as_ref()?.pools;
        let free = |node: Option<u32>| {
            let mut of_size = pools
                .iter()
                .filter(|pool| pool.page_bytes == self.page_bytes);
            of_size
                .find(|pool| pool.node == node)
                .map_or(0, |pool| pool.free_pages)
        };
        let whole = free(None);
        Some(match self.node {
            Some(node) => whole.min(free(Some(node))),
            None => whole,
        })
    }

    /// NO_HUGE_PAGES, with the most that is `free` anywhere it was looked.
    pub(crate) fn refuse(&self, whose: &str, free: u64) -> ApiError {
        let node = self
            .node
            .map_or_else(String::new, |node| format!(" on NUMA node {node}"));
        let error = ApiError::new(
            Reason::NoHugePages,
            format!(
                "{} pages of {} bytes{node} are needed for {} memory; {whose} {free} free",
                self.pages, self.page_bytes, self.backing
            ),
        )
        .with("backing", self.backing)
        .with("page_bytes", self.page_bytes)
        .with("needed_pages", self.pages)
        .with("free_pages", free);
        match self.node {
            Some(node) => error.with("node", node),
            None => error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_free_is_what_host_and_node_have() {
        let pool = |page_bytes, node, free_pages| v1::HugePagePool {
            page_bytes,
            node,
            total_pages: 100,
            free_pages,
        };
        let host = v1::Host {
            huge_pages: Some(v1::HugePages {
                pools: vec![
                    pool(2 << 20, None, 9),
                    pool(1 << 30, None, 3),
                    pool(2 << 20, Some(0), 4),
                    pool(2 << 20, Some(1), 50),
                ],
            }),
            ..Default::default()
        };
        let needed = |backing: v1::MemoryBacking, numa_node| {
            let spec = VmSpec::from_message(&v1::VmSpec {
                memory_bytes: 1 << 30,
                vcpus: 1,
                backing: backing.into(),
                numa_node,
                ..Default::default()
            })
            .unwrap();
            NeededPages::of(&spec, spec.memory_bytes)
        };
        let two = |node| needed(v1::MemoryBacking::Hugetlb2m, node).unwrap();
        assert_eq!(needed(v1::MemoryBacking::Auto, None), None);
        assert_eq!(two(None).pages, 512);
        assert_eq!(two(None).free_on(&host), Some(9));
        assert_eq!(two(Some(0)).free_on(&host), Some(4));
        assert_eq!(two(Some(1)).free_on(&host), Some(9));
        assert_eq!(two(Some(2)).free_on(&host), Some(0));
        let one = needed(v1::MemoryBacking::Hugetlb1g, None).unwrap();
        assert_eq!((one.pages, one.free_on(&host)), (1, Some(3)));
        assert_eq!(one.free_on(&v1::Host::default()), None);
        let none = v1::Host {
            huge_pages: Some(v1::HugePages::default()),
            ..Default::default()
        };
        assert_eq!(one.free_on(&none), Some(0));
        let refused = two(Some(1)).refuse("hosts/a has", 9);
        assert_eq!(refused.reason, Reason::NoHugePages);
        assert_eq!(refused.metadata["needed_pages"], "512");
        assert_eq!(refused.metadata["node"], "1");
    }
}
