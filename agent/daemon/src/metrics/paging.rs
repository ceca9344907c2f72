//! Families of guests whose memory is watched. Figures of a pager's time begin again with each
//! pager, as a counter's do with a process.

use slat_proto::{model::PAGE_SIZE, v1};

use super::families::Families;

/// Those of one VM; nothing while the kernel pages it alone.
pub(super) fn families(families: &mut Families, vm: &str, paging: Option<&v1::PagingStatus>) {
    let Some(paging) = paging else { return };
    let labels = [("vm", vm)];
    let serving = paging.state() == v1::paging_status::State::Serving;
    families.gauge(
        "slat_vm_paging_up",
        "1 while the faults of a VM whose memory is watched are resolved.",
        &labels,
        Some(u64::from(serving)),
    );
    families.counter(
        "slat_vm_pager_restarts_total",
        "Pagers that a VM had before this one.",
        &labels,
        Some(paging.pager_restarts),
    );
    for (kind, faults) in [
        ("missing", paging.faults_missing),
        ("minor", paging.faults_minor),
        ("write_protect", paging.faults_write_protect),
    ] {
        families.counter(
            "slat_vm_pager_faults_total",
            "Faults that a VM's pager resolved, by kind.",
            &[("vm", vm), ("kind", kind)],
            Some(faults),
        );
    }
    families.gauge(
        "slat_vm_pager_faults_waiting",
        "Faults of a VM that wait for its pager.",
        &labels,
        Some(paging.faults_waiting),
    );
    let has_source = paging.source_bytes > 0;
    for (name, help, bytes) in [
        (
            "slat_vm_page_source_bytes",
            "Memory of a VM that comes from a save or from another VM.",
            paging.source_bytes,
        ),
        (
            "slat_vm_page_source_loaded_bytes",
            "Of that, what is there.",
            paging.loaded_bytes,
        ),
    ] {
        families.gauge(name, help, &labels, has_source.then_some(bytes));
    }
    families.gauge(
        "slat_vm_snapshots",
        "Snapshots that are kept of a VM.",
        &labels,
        Some(u64::from(paging.snapshots)),
    );
    families.counter(
        "slat_vm_snapshot_kept_bytes_total",
        "Memory that was copied for snapshots before the guest wrote to it.",
        &labels,
        Some(paging.kept_bytes),
    );
    families.gauge(
        "slat_vm_pager_mapped_bytes",
        "Memory of a VM that its pager has mapped for the guest.",
        &labels,
        Some(paging.mapped_pages.saturating_mul(PAGE_SIZE)),
    );
}
