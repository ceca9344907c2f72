//! Where a new VM may go: the table's part of CreateVm. Plain data, as the table.

use std::time::Instant;

use slat_proto::{
    ApiError, Reason,
    model::{HostName, VmName, VmSpec},
};

use super::{
    errors::{host_cordoned, no_such_host, unreachable_because, vm_exists, vm_in_the_making},
    placement::{Candidate, choose, has_backend},
    rank::may_run,
    table::{HostEntry, Table},
};

impl Table {
    /// Keeps a name and memory for a new VM, on the host that is named or on the best one.
    ///
    /// # Errors
    /// VM_EXISTS when any host has a VM or a side of that name, or had when it was last heard;
    /// NO_SUCH_HOST, HOST_UNREACHABLE, HOST_CORDONED, CAPABILITY_MISSING, NO_HOST.
    pub(super) fn reserve(
        &mut self,
        vm: &VmName,
        spec: &VmSpec,
        wanted: Option<&HostName>,
        at: Instant,
    ) -> Result<String, ApiError> {
        let name = vm.to_string();
        self.refuse_taken(&name, at)?;
        let host = match wanted {
            Some(wanted) => self.checked(&wanted.to_string(), spec, at)?,
            None => {
                let (cordoned, free): (Vec<_>, Vec<_>) = self
                    .hosts
                    .values()
                    .filter(|entry| self.is_ready(entry, at))
                    .partition(|entry| entry.host.cordoned);
                let candidates: Vec<Candidate<'_>> = free
                    .into_iter()
                    .map(|entry| Candidate {
                        host: &entry.host,
                        free: self.free(entry),
                    })
                    .collect();
                let chosen = choose(&candidates, spec);
                let with_cordoned = |error: ApiError| match cordoned.len() {
                    0 => error,
                    number => error.with("cordoned_hosts", number),
                };
                chosen.map_err(with_cordoned)?.name.clone()
            }
        };
        self.reservations.add(name, host.clone(), spec.memory_bytes);
        Ok(host)
    }

    fn refuse_taken(&self, name: &str, at: Instant) -> Result<(), ApiError> {
        if let Some(host) = self.reservations.host_of(name) {
            return Err(vm_in_the_making(name, host));
        }
        let list = self.counting(at).list();
        let named = list.iter().filter(|(seen, _)| seen.vm.name == name);
        // A VM says more than what one has left behind.
        match named.max_by_key(|(seen, _)| (may_run(seen.vm), seen.ready)) {
            Some((seen, _)) => Err(vm_exists(seen.vm, seen.ready)),
            None => Ok(()),
        }
    }

    fn checked(&self, wanted: &str, spec: &VmSpec, at: Instant) -> Result<String, ApiError> {
        let entry = self.hosts.get(wanted).ok_or_else(|| no_such_host(wanted))?;
        if !self.is_ready(entry, at) {
            let shown = self.host(wanted, at).unwrap_or_default();
            return Err(unreachable_because(&shown));
        }
        if entry.host.cordoned {
            return Err(host_cordoned(wanted));
        }
        if !has_backend(&entry.host, spec.backend) {
            let backend = spec
                .backend
                .map_or_else(|| "any".to_owned(), |kind| kind.to_string());
            return Err(ApiError::new(
                Reason::CapabilityMissing,
                format!(
                    "{wanted} has no backend {backend}: {}",
                    entry.host.backend_message
                ),
            )
            .with("host", wanted)
            .with("capability", backend));
        }
        Ok(wanted.to_owned())
    }

    /// Bytes free on a host, less what is reserved and what is not in its figure yet.
    fn free(&self, entry: &HostEntry) -> u64 {
        let uncounted: u64 = entry
            .records
            .iter()
            .filter(|record| !record.counted)
            .filter_map(|record| record.vm.spec.as_ref())
            .map(|spec| spec.memory_bytes)
            .sum();
        entry
            .host
            .memory_bytes
            .saturating_sub(entry.host.memory_used_bytes)
            .saturating_sub(self.reservations.memory_on(&entry.host.name))
            .saturating_sub(uncounted)
    }
}
