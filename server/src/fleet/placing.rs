//! Where a new VM may go: the table's part of CreateVm. Plain data, as the table.

use std::time::Instant;

use slat_proto::{
    ApiError, Reason,
    model::{HostName, Labels, VmName, VmSpec, ordinary_bytes},
    v1,
};

use super::{
    errors::{host_cordoned, no_such_host, unreachable_because, vm_exists, vm_in_the_making},
    placement::{Candidate, cannot_watch, choose, has_backend, why_not_watched},
    pools::NeededPages,
    rank::may_run,
    table::{HostEntry, Table},
};

/// Bytes of all slots of a VM.
pub(crate) fn memory_of(vm: &v1::Vm) -> u64 {
    // What was added to it since it was made is in the first alone; an older agent has the second.
    let made_with = vm.spec.as_ref().map_or(0, |spec| spec.memory_bytes);
    vm.memory_bytes.max(made_with)
}

fn has_labels(host: &v1::Host, wanted: &Labels) -> bool {
    let labels = || host.labels.clone().into_iter().collect::<Labels>();
    wanted.is_empty() || labels().have(wanted)
}

impl Table {
    /// Keeps a name and memory for a new VM, on the host that is named or on the best one of those
    /// that have the labels `among`.
    ///
    /// # Errors
    /// VM_EXISTS when any host has a VM or a side of that name, or had when it was last heard;
    /// NO_SUCH_HOST, HOST_UNREACHABLE, HOST_CORDONED, CAPABILITY_MISSING, NO_HOST, NO_HUGE_PAGES.
    pub(super) fn reserve(
        &mut self,
        vm: &VmName,
        spec: &VmSpec,
        wanted: Option<&HostName>,
        among: &Labels,
        at: Instant,
    ) -> Result<String, ApiError> {
        let name = vm.to_string();
        self.refuse_taken(&name, at)?;
        let needed = NeededPages::of(spec, spec.memory_bytes);
        let host = match wanted {
            Some(wanted) => self.checked(&wanted.to_string(), spec, at)?,
            None => {
                let (cordoned, open): (Vec<_>, Vec<_>) = self
                    .hosts
                    .values()
                    .filter(|entry| self.is_ready(entry, at) && has_labels(&entry.host, among))
                    .partition(|entry| entry.host.cordoned);
                let (free, troubled): (Vec<_>, Vec<_>) = open
                    .into_iter()
                    .partition(|entry| entry.contact.trouble.is_empty());
                let candidates: Vec<Candidate<'_>> = free
                    .into_iter()
                    .map(|entry| Candidate {
                        host: &entry.host,
                        free: self.free(entry),
                        pages: self.free_pages(entry, needed),
                    })
                    .collect();
                let chosen = choose(&candidates, spec);
                let left_out = [
                    ("cordoned_hosts", cordoned.len()),
                    ("hosts_in_trouble", troubled.len()),
                ];
                let with_left_out = |error: ApiError| {
                    let some = left_out.iter().filter(|(_, number)| *number > 0);
                    some.fold(error, |error, (what, number)| error.with(what, number))
                };
                chosen.map_err(with_left_out)?.name.clone()
            }
        };
        self.reservations
            .add(name, host.clone(), spec.ordinary_bytes(), needed);
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
        if let Some(why) = why_not_watched(&entry.host, spec.paging) {
            let hosts = std::iter::once((wanted, why));
            return Err(cannot_watch("the VM", hosts).with("host", wanted));
        }
        Ok(wanted.to_owned())
    }

    /// Of the pages that a VM needs, those that are free on a host, less what is reserved; `None`
    /// when it needs none, or the host does not say.
    fn free_pages(&self, entry: &HostEntry, needed: Option<NeededPages>) -> Option<u64> {
        let needed = needed?;
        let kept = self
            .reservations
            .pages_on(&entry.host.name, needed.page_bytes);
        Some(needed.free_on(&entry.host)?.saturating_sub(kept))
    }

    /// Bytes free on a host, less what is reserved and what is not in its figure yet.
    fn free(&self, entry: &HostEntry) -> u64 {
        let uncounted: u64 = entry
            .records
            .iter()
            .filter(|record| !record.counted)
            .map(|record| ordinary_bytes(record.vm.spec.as_ref(), memory_of(&record.vm)))
            .sum();
        entry
            .host
            .memory_bytes
            .saturating_sub(entry.host.memory_used_bytes)
            .saturating_sub(self.reservations.memory_on(&entry.host.name))
            .saturating_sub(uncounted)
    }
}
