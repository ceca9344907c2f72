//! Names and memory of VMs that are being created. Plain data.

use std::collections::HashMap;

struct Reservation {
    host: String,
    memory_bytes: u64,
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

    pub(super) fn add(&mut self, vm: String, host: String, memory_bytes: u64) {
        self.0.insert(vm, Reservation { host, memory_bytes });
    }

    pub(super) fn remove(&mut self, vm: &str) {
        self.0.remove(vm);
    }
}
