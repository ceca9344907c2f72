//! Names and memory of VMs that are being created. Plain data.

use std::collections::HashMap;

use super::pools::NeededPages;

struct Reservation {
    host: String,
    memory_bytes: u64,
    pages: Option<NeededPages>,
}

/// By the VM's name.
#[derive(Default)]
pub(super) struct Reservations(HashMap<String, Reservation>);

impl Reservations {
    /// Where a VM of that name is being created.
    pub(super) fn host_of(&self, vm: &str) -> Option<&str> {
        self.0.get(vm).map(|kept| kept.host.as_str())
    }

    /// Bytes kept on a host.
    pub(super) fn memory_on(&self, host: &str) -> u64 {
        self.0
            .values()
            .filter(|kept| kept.host == host)
            .map(|kept| kept.memory_bytes)
            .sum()
    }

    /// Pages of that size kept on a host, whichever of its nodes they are to be of.
    pub(super) fn pages_on(&self, host: &str, page_bytes: u64) -> u64 {
        let kept = self.0.values().filter(|kept| kept.host == host);
        kept.filter_map(|kept| kept.pages)
            .filter(|pages| pages.page_bytes == page_bytes)
            .map(|pages| pages.pages)
            .sum()
    }

    pub(super) fn add(
        &mut self,
        vm: String,
        host: String,
        memory_bytes: u64,
        pages: Option<NeededPages>,
    ) {
        let kept = Reservation {
            host,
            memory_bytes,
            pages,
        };
        self.0.insert(vm, kept);
    }

    pub(super) fn remove(&mut self, vm: &str) {
        self.0.remove(vm);
    }
}
