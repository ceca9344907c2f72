//! The agent's own metric families, as Prometheus text, rendered from the snapshot caches: a scrape
//! measures nothing, takes no lock of a VM and calls no process.
//!
//! # Names
//! One family for both backends, with the labels `backend` and `source`, who counted:
//! `slat_page_faults_total{vm,backend,type}`, `slat_vcpu_tlb_flushes_total`,
//! `slat_remote_tlb_flush_requests_total`, `slat_remote_tlb_flushes_total`, `slat_vm_exits_total`,
//! `slat_mappings{level}`, `slat_table_pages`, `slat_backing_bytes{size}`,
//! `slat_backing_2m_bytes`,
//! `slat_read_only_writes_total`, `slat_dirty_pages_harvested_total`,
//! `slat_huge_pages_split_total`, `slat_huge_pages_recovered_total`,
//! `slat_mmu_flushes_total{cause,scope}`.
//! Beside them, for VMs on KVM only, the kernel's counters under the names its users know (`kvm_*`)
//! and `kvm_stat_supported`.
//!
//! `slat_counter_gap{gap}` says what a VM's source leaves out.
//!
//! A statistic that a VM does not offer is absent, never 0; a family without samples is left out.
//! Label values are names of this host's VMs and bounded words. Rates are the reader's.

mod families;
mod paging;

use std::collections::BTreeMap;

use slat_proto::{
    model::{PAGE_SIZE, std_duration},
    v1,
};

use self::families::{Families, Kind};
use super::{side::is_terminal, usage::Used};

/// What is rendered.
#[derive(Debug)]
pub(super) struct Seen<'a> {
    pub(super) version: &'a str,
    pub(super) memory_total: u64,
    pub(super) memory_used: u64,
    pub(super) vms: &'a [v1::Vm],
    pub(super) transfers: &'a [v1::Transfer],
    /// Of VM processes, by the VM's name.
    pub(super) used: &'a BTreeMap<String, Used>,
    /// The state directory can be written.
    pub(super) disk_up: bool,
    /// The server refuses this start of the agent: its host was fenced.
    pub(super) fenced: bool,
    /// Pages that the host set aside.
    pub(super) huge_pages: Option<&'a v1::HugePages>,
}

/// All families.
pub(super) fn render(seen: &Seen<'_>) -> String {
    let mut families = Families::default();
    families.gauge(
        "slat_build_info",
        "Version of this agent.",
        &[("version", seen.version)],
        Some(1),
    );
    families.gauge(
        "slat_agent_disk_up",
        "1 while the state directory can be written.",
        &[],
        Some(u64::from(seen.disk_up)),
    );
    families.gauge(
        "slat_host_fenced",
        "1 while the server refuses this agent because its host was fenced: what runs here may run elsewhere too.",
        &[],
        Some(u64::from(seen.fenced)),
    );
    let free = seen.memory_total.saturating_sub(seen.memory_used);
    for (kind, bytes) in [
        ("total", seen.memory_total),
        ("used", seen.memory_used),
        ("free", free),
    ] {
        let help = "Memory that VMs may use, of it reserved by VMs, and the rest.";
        families.gauge(
            "slat_host_memory_bytes",
            help,
            &[("kind", kind)],
            Some(bytes),
        );
    }
    for pool in seen.huge_pages.iter().flat_map(|all| &all.pools) {
        pool_families(&mut families, pool);
    }
    for vm in seen.vms {
        vm_families(&mut families, vm);
    }
    for (vm, used) in seen.used {
        let labels = [("vm", id(vm))];
        families.add(
            "slat_vm_process_cpu_seconds_total",
            Kind::Counter,
            "CPU time of a VM's process.",
            &labels,
            used.cpu_seconds,
        );
        families.gauge(
            "slat_vm_process_resident_memory_bytes",
            "Memory that a VM's process takes from its host, each page once: what it has resident of its own, and \
             populated guest memory, huge pages and what is swapped out included.",
            &labels,
            used.resident_bytes,
        );
    }
    for transfer in seen.transfers {
        if !is_terminal(transfer.phase()) {
            transfer_families(&mut families, transfer);
        }
    }
    families.render()
}

fn pool_families(families: &mut Families, pool: &v1::HugePagePool) {
    let size = pool.page_bytes.to_string();
    let node = pool
        .node
        .map_or_else(|| "all".to_owned(), |node| node.to_string());
    for (kind, pages) in [("total", pool.total_pages), ("free", pool.free_pages)] {
        families.gauge(
            "slat_host_huge_pages",
            "Pages of a size that this host set aside, of all of it and of each NUMA node, and those that can be had.",
            &[("kind", kind), ("node", &node), ("page_bytes", &size)],
            Some(pages),
        );
    }
}

fn id(name: &str) -> &str {
    name.rsplit_once('/').map_or(name, |(_, id)| id)
}

fn state_word(state: v1::vm::State) -> &'static str {
    match state {
        v1::vm::State::Unspecified => "unknown",
        v1::vm::State::Created => "created",
        v1::vm::State::Running => "running",
        v1::vm::State::Paused => "paused",
        v1::vm::State::Incoming => "incoming",
        v1::vm::State::Relinquished => "relinquished",
        v1::vm::State::Failed => "failed",
        v1::vm::State::Stopped => "stopped",
        v1::vm::State::Lost => "lost",
        v1::vm::State::Unresponsive => "unresponsive",
    }
}

fn vm_families(families: &mut Families, vm: &v1::Vm) {
    let name = id(&vm.name);
    let kind = vm
        .spec
        .as_ref()
        .map_or(v1::Backend::Unspecified, |spec| spec.backend());
    let backend = match kind {
        v1::Backend::Unspecified => "unknown",
        v1::Backend::Kvm => "kvm",
        v1::Backend::Software => "software",
    };
    let info = [
        ("vm", name),
        ("state", state_word(vm.state())),
        ("backend", backend),
    ];
    families.gauge("slat_vm_info", "A VM of this host.", &info, Some(1));
    let answers = !matches!(
        vm.state(),
        v1::vm::State::Lost | v1::vm::State::Unresponsive
    );
    let memory = Some(vm.memory_bytes).filter(|bytes| answers && *bytes > 0);
    families.gauge(
        "slat_vm_memory_bytes",
        "Guest memory of a VM, slots that were added to it included.",
        &[("vm", name)],
        memory,
    );
    let logging = answers.then_some(u64::from(vm.dirty_logging));
    families.gauge(
        "slat_vm_dirty_logging",
        "Whether any slot has dirty logging on.",
        &[("vm", name)],
        logging,
    );
    families.gauge(
        "slat_vm_dirty_cursors",
        "Readers of the VM's dirty pages.",
        &[("vm", name)],
        answers.then_some(u64::from(vm.dirty_cursors)),
    );
    families.counter(
        "slat_vm_dirty_cursors_dropped_total",
        "Readers of dirty pages that were removed because nobody used them.",
        &[("vm", name)],
        answers.then_some(vm.dirty_cursors_dropped),
    );
    paging::families(families, name, vm.paging.as_ref());
    if let Some(counters) = &vm.guest_counters {
        for (family, help, value) in [
            (
                "slat_guest_memstress_errors_total",
                "Stamps the guest read back that were not what it wrote: lost or stale memory.",
                counters.errors,
            ),
            (
                "slat_guest_memstress_pages_written_total",
                "Pages the guest wrote and stamped.",
                counters.pages_written,
            ),
            (
                "slat_guest_memstress_passes_total",
                "Rounds of the guest over its working pages.",
                counters.passes,
            ),
        ] {
            families.counter(family, help, &[("vm", name)], Some(value));
        }
    }
    if let Some(stats) = &vm.mmu_stats {
        common_families(families, name, backend, stats);
        if kind == v1::Backend::Kvm {
            kvm_families(families, name, stats);
        }
    }
}

/// Fault counters: Slat's label, KVM's statistic, the label under which that is shown, value.
fn faults(stats: &v1::MmuStats) -> [(&'static str, &'static str, &'static str, Option<u64>); 6] {
    [
        ("taken", "pf_taken", "taken", stats.faults_taken),
        ("fixed", "pf_fixed", "fixed", stats.faults_fixed),
        ("fast", "pf_fast", "fast", stats.faults_fast),
        ("spurious", "pf_spurious", "spurious", stats.faults_spurious),
        ("emulated", "pf_emulate", "emulate", stats.faults_emulated),
        ("guest", "pf_guest", "guest", stats.faults_guest),
    ]
}

fn levels(stats: &v1::MmuStats) -> [(&'static str, &'static str, Option<u64>); 3] {
    [
        ("4k", "pages_4k", stats.pages_4k),
        ("2m", "pages_2m", stats.pages_2m),
        ("1g", "pages_1g", stats.pages_1g),
    ]
}

/// Who counted, in a word.
fn source(source: v1::CounterSource) -> &'static str {
    match source {
        v1::CounterSource::Unspecified => "unknown",
        v1::CounterSource::KvmStatistics => "kvm_statistics",
        v1::CounterSource::SoftwareMmu => "software_mmu",
        v1::CounterSource::Tracepoint => "tracepoint",
    }
}

/// Who counted page faults.
fn faults_source(stats: &v1::MmuStats) -> v1::CounterSource {
    match stats.faults_source() {
        // An older process: whoever counted the rest.
        v1::CounterSource::Unspecified => stats.source(),
        known => known,
    }
}

fn common_families(families: &mut Families, vm: &str, backend: &str, stats: &v1::MmuStats) {
    let by = source(faults_source(stats));
    let source = source(stats.source());
    let own = [("vm", vm), ("backend", backend)];
    let labels = [("vm", vm), ("backend", backend), ("source", source)];
    for (word, _, _, value) in faults(stats) {
        let [vm, backend, _] = labels;
        let labels = [vm, backend, ("source", by), ("type", word)];
        families.counter(
            "slat_page_faults_total",
            "Second-stage page faults by outcome.",
            &labels,
            value,
        );
    }
    for (word, _, value) in levels(stats) {
        let [vm, backend, source] = labels;
        let labels = [vm, backend, source, ("level", word)];
        families.gauge(
            "slat_mappings",
            "Second-stage leaf mappings by size.",
            &labels,
            value,
        );
    }
    families.gauge(
        "slat_backing_2m_bytes",
        "Bytes of guest memory in the host's 2 MiB pages.",
        &own,
        stats.backing_2m_bytes,
    );
    for (size, bytes) in [
        ("4k", stats.backing_4k_bytes),
        ("2m", stats.backing_2m_bytes),
        ("1g", stats.backing_1g_bytes),
    ] {
        let [vm, backend] = own;
        families.gauge(
            "slat_backing_bytes",
            "Bytes of guest memory by the size of the host's pages that it is made of.",
            &[vm, backend, ("size", size)],
            bytes,
        );
    }
    for (family, help, value) in [
        (
            "slat_vcpu_tlb_flushes_total",
            "Flushes that vCPUs did of their own TLB.",
            stats.vcpu_tlb_flushes,
        ),
        (
            "slat_remote_tlb_flush_requests_total",
            "Requests for a TLB flush of all vCPUs.",
            stats.remote_tlb_flush_requests,
        ),
        (
            "slat_remote_tlb_flushes_total",
            "Requests for a TLB flush that reached at least one vCPU.",
            stats.remote_tlb_flushes,
        ),
        (
            "slat_vm_exits_total",
            "Exits from guest mode over all vCPUs.",
            stats.exits,
        ),
        (
            "slat_huge_pages_split_total",
            "Huge second-stage mappings split into smaller ones.",
            stats.huge_pages_split,
        ),
        (
            "slat_huge_pages_recovered_total",
            "Huge second-stage mappings put back in place of smaller ones.",
            stats.huge_pages_recovered,
        ),
    ] {
        families.counter(family, help, &labels, value);
    }
    families.counter(
        "slat_dirty_pages_harvested_total",
        "Dirty pages taken from the log.",
        &own,
        stats.dirty_pages_harvested,
    );
    families.counter(
        "slat_read_only_writes_total",
        "Writes of the guest to read-only slots, which changed nothing.",
        &own,
        stats.read_only_writes,
    );
    for gap in stats.gaps() {
        let gap = gap.as_str_name().trim_start_matches("COUNTER_GAP_");
        let gap = gap.to_ascii_lowercase();
        let [vm, backend, source] = labels;
        families.gauge(
            "slat_counter_gap",
            "What the source of a VM's counters does not count, or not all of.",
            &[vm, backend, source, ("gap", &gap)],
            Some(1),
        );
    }
    for flush in &stats.flushes {
        for (scope, count) in [("range", flush.ranges), ("all", flush.alls)] {
            let [vm, backend, source] = labels;
            let labels = [
                vm,
                backend,
                source,
                ("cause", &flush.cause),
                ("scope", scope),
            ];
            families.counter(
                "slat_mmu_flushes_total",
                "TLB flushes that the second stage asked for, by cause and scope.",
                &labels,
                Some(count),
            );
        }
    }
    families.gauge(
        "slat_table_pages",
        "Second-stage page-table pages in use.",
        &labels,
        stats.table_pages,
    );
}

fn kvm_families(families: &mut Families, vm: &str, stats: &v1::MmuStats) {
    let mut offered: Vec<(&str, bool)> = Vec::new();
    let in_statistics = faults_source(stats) != v1::CounterSource::Tracepoint;
    for (_, stat, word, value) in faults(stats) {
        // These names are KVM's: what it does not count itself is not there.
        let value = value.filter(|_| in_statistics);
        let labels = [("vm", vm), ("type", word)];
        families.counter(
            "kvm_page_faults_total",
            "KVM's pf_* counters.",
            &labels,
            value,
        );
        offered.push((stat, value.is_some()));
    }
    for (word, stat, value) in levels(stats) {
        let labels = [("vm", vm), ("level", word)];
        families.gauge(
            "kvm_mmu_pages",
            "KVM's pages_* levels: second-stage leaf mappings.",
            &labels,
            value,
        );
        offered.push((stat, value.is_some()));
    }
    let flushes = [("vm", vm), ("scope", "vcpu")];
    families.counter(
        "kvm_tlb_flushes_total",
        "KVM's tlb_flush over all vCPUs.",
        &flushes,
        stats.vcpu_tlb_flushes,
    );
    offered.push(("tlb_flush", stats.vcpu_tlb_flushes.is_some()));
    for (family, stat, help, value) in [
        (
            "kvm_remote_tlb_flush_requests_total",
            "remote_tlb_flush_requests",
            "KVM's remote_tlb_flush_requests.",
            stats.remote_tlb_flush_requests,
        ),
        (
            "kvm_remote_tlb_flushes_total",
            "remote_tlb_flush",
            "KVM's remote_tlb_flush.",
            stats.remote_tlb_flushes,
        ),
        (
            "kvm_exits_total",
            "exits",
            "KVM's exits over all vCPUs.",
            stats.exits,
        ),
    ] {
        families.counter(family, help, &[("vm", vm)], value);
        offered.push((stat, value.is_some()));
    }
    for (stat, offered) in offered {
        let help = "Whether this kernel and architecture offer a statistic.";
        families.gauge(
            "kvm_stat_supported",
            help,
            &[("vm", vm), ("stat", stat)],
            Some(u64::from(offered)),
        );
    }
}

fn transfer_families(families: &mut Families, transfer: &v1::Transfer) {
    let Some(progress) = &transfer.progress else {
        return;
    };
    let direction = match transfer.role() {
        v1::TransferRole::Source => "out",
        v1::TransferRole::Destination => "in",
        v1::TransferRole::Unspecified => return,
    };
    let labels = [("vm", id(&transfer.vm)), ("direction", direction)];
    for (kind, bytes) in [
        ("wire", progress.bytes_transferred),
        ("normal", progress.pages_normal.saturating_mul(PAGE_SIZE)),
        ("zero", progress.pages_zero.saturating_mul(PAGE_SIZE)),
    ] {
        let labels = [labels[0], labels[1], ("kind", kind)];
        let help = "Of a running migration side: bytes on the wire, and guest memory sent with contents and as zero ranges.";
        families.counter("slat_migration_bytes_total", help, &labels, Some(bytes));
    }
    let iteration = Some(u64::from(progress.iteration));
    families.gauge(
        "slat_migration_iteration",
        "Running iteration; 0 sends all memory.",
        &labels,
        iteration,
    );
    if transfer.role() == v1::TransferRole::Source {
        let help = "Bytes left to send in the running iteration.";
        families.gauge(
            "slat_migration_remaining_bytes",
            help,
            &labels,
            Some(progress.remaining_bytes),
        );
        if progress.expected_downtime.is_some() {
            let seconds = std_duration(progress.expected_downtime.as_ref()).as_secs_f64();
            let help = "Downtime if the VM were stopped now.";
            families.add(
                "slat_migration_expected_downtime_seconds",
                Kind::Gauge,
                help,
                &labels,
                seconds,
            );
        }
    }
}

#[cfg(test)]
mod tests;
