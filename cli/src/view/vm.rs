//! One VM: its columns, its page. Conflicts of names and stale records are marked in both.

use slat_proto::{model::MemoryBacking, v1};

use super::{
    paging,
    words::{age, backend, clock, count, fields, id, pages, short, size_cell, vm_state},
};
use crate::{
    output::{Column, Resource, cells, heads},
    term::{
        table::{Cell, Table, Tone},
        units::Size,
    },
};

fn vm_tone(state: v1::vm::State) -> Tone {
    use v1::vm::State;
    match state {
        State::Running => Tone::Good,
        State::Paused | State::Created | State::Incoming | State::Stopped => Tone::Warn,
        State::Failed | State::Lost | State::Unresponsive => Tone::Bad,
        State::Relinquished | State::Unspecified => Tone::Plain,
    }
}

fn errors(vm: &v1::Vm) -> Cell {
    vm.guest_counters
        .as_ref()
        .map_or_else(Cell::none, |counters| {
            count(counters.errors).tone(if counters.errors == 0 {
                Tone::Plain
            } else {
                Tone::Bad
            })
        })
}

fn spec<T>(vm: &v1::Vm, field: impl Fn(&v1::VmSpec) -> T) -> T
where
    T: Default,
{
    vm.spec.as_ref().map(field).unwrap_or_default()
}

/// All that it has: what it was made with, and slots that were added since. A process that died, or
/// an older one, does not say.
fn memory_bytes(vm: &v1::Vm) -> u64 {
    vm.memory_bytes.max(spec(vm, |spec| spec.memory_bytes))
}

/// Whether what is shown is old, and how old.
fn staleness(vm: &v1::Vm) -> Option<String> {
    // The time and not the age: a watch shows the row again only when something has happened.
    vm.stale.then(|| match &vm.last_seen_time {
        Some(time) => format!("STALE: last seen {}", clock(Some(time))),
        None => "STALE: when it was last seen is not known".to_owned(),
    })
}

/// Other VMs of the same name, one after the other.
fn conflicts(vm: &v1::Vm) -> Option<String> {
    let others: Vec<String> = vm
        .conflicts
        .iter()
        .map(|other| format!("{} on {}", other.uid, id(&other.host)))
        .collect();
    (!others.is_empty())
        .then(|| format!("CONFLICT: its name is also that of {}", others.join(", ")))
}

fn note(vm: &v1::Vm) -> Cell {
    let words = [staleness(vm), conflicts(vm), paging::note(vm)];
    let notes = super::words::notes(words.into_iter().flatten().collect());
    if vm.conflicts.is_empty() {
        notes
    } else {
        notes.tone(Tone::Bad)
    }
}

impl Resource for v1::Vm {
    const COLLECTION: &'static str = "vms";
    const COLUMNS: &'static [Column<Self>] = &[
        Column::new("NAME", |vm| id(&vm.name).into()),
        Column::new("STATE", |vm| {
            Cell::toned(vm_state(vm.state()), vm_tone(vm.state()))
        }),
        Column::new("HOST", |vm| id(&vm.host).into()),
        Column::new("BACKEND", |vm| spec(vm, backend).into()),
        Column::new("VCPUS", |vm| count(spec(vm, |spec| spec.vcpus))),
        Column::new("MEMORY", |vm| size_cell(memory_bytes(vm))),
        Column::new("PAGE-WRITES", |vm| {
            vm.guest_counters
                .as_ref()
                .map_or_else(Cell::none, |counters| count(counters.pages_written))
        }),
        Column::new("ERRORS", errors),
        Column::new("MIGRATION", |vm| id(&vm.migration).into()),
        Column::wide("BACKING", |vm| backing_kind(vm).into()),
        Column::wide("NODE", |vm| {
            let node = spec(vm, |spec| spec.numa_node);
            node.map_or_else(Cell::none, count)
        }),
        Column::wide("LABELS", |vm| labels(vm).into()),
        Column::wide("PAGES", |vm| backing_pages(vm).into()),
        Column::wide("MAPPED", |vm| mapped(vm).into()),
        Column::wide("UID", |vm| vm.uid.as_str().into()),
        Column::wide("EPOCH", |vm| count(vm.epoch)),
        Column::wide("PID", |vm| count(vm.pid)),
        Column::wide("ROUNDS", |vm| {
            vm.guest_counters
                .as_ref()
                .map_or_else(Cell::none, |counters| count(counters.passes))
        }),
        Column::wide_drifting("SEEN", |vm| age(vm.last_seen_time.as_ref())),
        Column::drifting("AGE", |vm| age(vm.create_time.as_ref())),
        Column::new("NOTE", note),
    ];

    fn name(&self) -> String {
        self.name.clone()
    }

    /// Names may collide, and an old record of a VM may stand beside the new one.
    fn key(&self) -> String {
        if self.uid.is_empty() {
            self.name.clone()
        } else {
            self.uid.clone()
        }
    }

    fn page(&self, colours: bool) -> String {
        vm_page(self, colours)
    }
}

/// One VM's page.
fn vm_page(vm: &v1::Vm, colours: bool) -> String {
    let table = Table::new(&heads::<v1::Vm>(false), colours).render(&[cells(vm, false)]);
    let capabilities: Vec<String> = vm
        .capabilities()
        .map(|one| short(one.as_str_name(), "CAPABILITY_").to_lowercase())
        .collect();
    let mut lines = vec![
        ("why", vm.state_message.clone()),
        ("conflict", conflicts(vm).unwrap_or_default()),
        ("stale", staleness(vm).unwrap_or_default()),
        ("uid", vm.uid.clone()),
        ("epoch", vm.epoch.to_string()),
        (
            "process",
            if vm.pid == 0 {
                "gone".to_owned()
            } else {
                vm.pid.to_string()
            },
        ),
        ("created", clock(vm.create_time.as_ref())),
        (
            "dirty log",
            if vm.dirty_logging { "on" } else { "off" }.to_owned(),
        ),
        ("dirty engine", dirty_engine(vm)),
        ("can", capabilities.join(", ")),
        (
            "guest",
            vm.guest_counters
                .as_ref()
                .map_or_else(String::new, guest_words),
        ),
        ("memory", backing(vm).unwrap_or_default()),
        (
            "prefault",
            // Memory that went with its process is neither populated nor about to be.
            vm.prefault
                .as_ref()
                .filter(|_| vm.state() != v1::vm::State::Lost)
                .map_or_else(String::new, prefault),
        ),
        ("mmu", mmu(vm.mmu_stats.as_ref())),
        ("not counted", gaps(vm.mmu_stats.as_ref())),
    ];
    lines.extend(paging::lines(vm));
    format!("{table}\n{}", fields(&lines))
}

/// How written pages are told, and why so; nothing where the VM does not say.
fn dirty_engine(vm: &v1::Vm) -> String {
    let name = match vm.dirty_engine() {
        v1::DirtyEngine::Unspecified => return String::new(),
        engine => short(engine.as_str_name(), "DIRTY_ENGINE_").to_lowercase(),
    };
    match vm.dirty_engine_reason.as_str() {
        "" => name,
        reason => format!("{name} ({reason})"),
    }
}

/// What the memory was asked to be made of.
fn backing_kind(vm: &v1::Vm) -> String {
    let field = vm.spec.as_ref().map_or(0, |spec| spec.backing);
    MemoryBacking::from_field(field).map_or_else(|_| field.to_string(), |kind| kind.to_string())
}

/// How far memory is populated ahead.
pub(crate) fn prefault(prefault: &v1::Prefault) -> String {
    let all = Size(prefault.total_bytes);
    match (prefault.done, prefault.error.as_str()) {
        (true, _) => format!("all {all} populated"),
        (false, "") => format!("{} of {all} populated", Size(prefault.populated_bytes)),
        (false, why) => format!(
            "{} of {all} populated, then: {why}",
            Size(prefault.populated_bytes)
        ),
    }
}

/// How much of it is in pages of which size, as far as the host says.
fn backing_pages(vm: &v1::Vm) -> String {
    let Some(stats) = &vm.mmu_stats else {
        return String::new();
    };
    let sizes = [
        ("1G", stats.backing_1g_bytes),
        ("2M", stats.backing_2m_bytes),
        ("4K", stats.backing_4k_bytes),
    ];
    let known = sizes
        .into_iter()
        .filter_map(|(size, bytes)| bytes.filter(|bytes| *bytes > 0).map(|bytes| (size, bytes)))
        .map(|(size, bytes)| format!("{size}:{}", Size(bytes)));
    known.collect::<Vec<_>>().join(" ")
}

/// How many mappings of which size the second stage has, as far as its source counts them.
fn mapped(vm: &v1::Vm) -> String {
    let Some(stats) = &vm.mmu_stats else {
        return String::new();
    };
    let sizes = [
        ("1G", stats.pages_1g),
        ("2M", stats.pages_2m),
        ("4K", stats.pages_4k),
    ];
    let known = sizes
        .into_iter()
        .filter_map(|(size, count)| count.filter(|count| *count > 0).map(|count| (size, count)))
        .map(|(size, count)| format!("{size}:{count}"));
    known.collect::<Vec<_>>().join(" ")
}

/// What the memory is made of; `None` where nobody knows.
fn backing(vm: &v1::Vm) -> Option<String> {
    let made_with = vm.spec.as_ref()?.memory_bytes;
    vm.mmu_stats.as_ref()?;
    let all = memory_bytes(vm);
    let added = match all - made_with {
        0 => String::new(),
        added => format!(", {} of it added", Size(added)),
    };
    let pages = match backing_pages(vm).as_str() {
        "" => String::new(),
        pages => format!(", in pages of {pages}"),
    };
    let short = match vm.backing_shortfall.as_str() {
        "" => String::new(),
        why => format!(" ({why})"),
    };
    let node = spec(vm, |spec| spec.numa_node);
    let node = node.map_or_else(String::new, |node| format!(", of NUMA node {node}"));
    Some(format!(
        "{} of {}{added}{node}{pages}{short}",
        backing_kind(vm),
        Size(all),
    ))
}

/// What its owner calls it by.
fn labels(vm: &v1::Vm) -> String {
    let labels = vm.spec.as_ref().map(|spec| spec.labels.clone());
    let labels = labels.unwrap_or_default().into_iter();
    labels.collect::<slat_proto::model::Labels>().to_string()
}

/// What memstress counted. A page counts at each write, so the writes may be more than the pages.
fn guest_words(guest: &v1::GuestCounters) -> String {
    format!(
        "{} whole rounds over its {}, {} page writes (a page counts each time), {} errors",
        guest.passes,
        pages(guest.pages),
        guest.pages_written,
        guest.errors
    )
}

/// What the source of the counters leaves out.
fn gaps(stats: Option<&v1::MmuStats>) -> String {
    use v1::CounterGap as Gap;
    let why = stats.map_or("", |stats| stats.faults_uncounted.as_str());
    let words = stats
        .into_iter()
        .flat_map(v1::MmuStats::gaps)
        .map(|gap| match gap {
            Gap::Faults if !why.is_empty() => format!("page faults ({why})"),
            other => name(other).to_owned(),
        });
    words.collect::<Vec<_>>().join("; ")
}

/// What is left out.
fn name(gap: v1::CounterGap) -> &'static str {
    use v1::CounterGap as Gap;
    match gap {
        Gap::Faults => "page faults",
        Gap::FlushRequests => "requests for a flush of all vCPUs",
        Gap::RangeFlushes => "flushes of a range, where this kernel carries them out itself",
        Gap::FlushesThatReached => "which requests for a flush reached a vCPU",
        Gap::VcpuFlushes => "flushes by vCPUs",
        Gap::Mappings => "mappings",
        Gap::FaultOutcomes => "what became of page faults",
        Gap::Unspecified => "something that this slat does not know",
    }
}

fn mmu(stats: Option<&v1::MmuStats>) -> String {
    let Some(stats) = stats else {
        return String::new();
    };
    let source = match stats.source() {
        v1::CounterSource::KvmStatistics => " (by KVM's statistics)",
        v1::CounterSource::SoftwareMmu => " (by the software MMU)",
        v1::CounterSource::Tracepoint => " (by a tracepoint)",
        v1::CounterSource::Unspecified => "",
    };
    let taken = match stats.faults_source() {
        v1::CounterSource::Tracepoint => "faults taken (by a tracepoint)",
        _ => "faults taken",
    };
    let counted = [
        (taken, stats.faults_taken),
        ("fixed", stats.faults_fixed),
        ("fast", stats.faults_fast),
        ("spurious", stats.faults_spurious),
        ("remote TLB flush requests", stats.remote_tlb_flush_requests),
        ("remote TLB flushes", stats.remote_tlb_flushes),
        ("vCPU TLB flushes", stats.vcpu_tlb_flushes),
        ("exits", stats.exits),
        ("4k mappings", stats.pages_4k),
        ("2m", stats.pages_2m),
        ("1g", stats.pages_1g),
        ("huge pages split", stats.huge_pages_split),
        ("recovered", stats.huge_pages_recovered),
        ("dirty pages harvested", stats.dirty_pages_harvested),
        ("read-only writes dropped", stats.read_only_writes),
        ("table pages", stats.table_pages),
    ]
    .iter()
    .filter_map(|(label, value)| value.map(|value| format!("{label} {value}")))
    .collect::<Vec<_>>()
    .join(", ");
    if counted.is_empty() {
        return counted;
    }
    counted + source
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_backend_cannot_know_is_not_shown_as_zero() {
        let mut vm = v1::Vm {
            mmu_stats: Some(v1::MmuStats {
                faults_taken: Some(0),
                ..Default::default()
            }),
            ..Default::default()
        };
        let page = vm_page(&vm, false);
        assert!(page.contains("faults taken 0"), "{page}");
        assert!(!page.contains("flush"), "{page}");
        vm.mmu_stats = Some(v1::MmuStats {
            remote_tlb_flush_requests: Some(3),
            source: v1::CounterSource::KvmStatistics.into(),
            gaps: vec![
                v1::CounterGap::Faults.into(),
                v1::CounterGap::RangeFlushes.into(),
            ],
            ..Default::default()
        });
        let page = vm_page(&vm, false);
        assert!(page.contains("requests 3 (by KVM's statistics)"), "{page}");
        assert!(
            page.contains("not counted  page faults; flushes of a range"),
            "{page}"
        );
        let stats = vm.mmu_stats.as_mut().unwrap();
        stats.faults_uncounted = "tracefs is not mounted".into();
        let page = vm_page(&vm, false);
        let words = "not counted  page faults (tracefs is not mounted); flushes of a range";
        assert!(page.contains(words), "{page}");
        let stats = vm.mmu_stats.as_mut().unwrap();
        stats.faults_taken = Some(7);
        stats.faults_source = v1::CounterSource::Tracepoint.into();
        stats.gaps = vec![v1::CounterGap::FaultOutcomes.into()];
        let page = vm_page(&vm, false);
        for words in [
            "faults taken (by a tracepoint) 7, remote",
            "not counted  what became of page faults",
        ] {
            assert!(page.contains(words), "{page}");
        }
        vm.mmu_stats = None;
        assert!(!vm_page(&vm, false).contains("mmu"));
    }

    #[test]
    fn the_page_says_what_the_memory_is_made_of() {
        let mut vm = v1::Vm {
            spec: Some(v1::VmSpec {
                memory_bytes: 1 << 30,
                ..Default::default()
            }),
            mmu_stats: Some(v1::MmuStats {
                backing_4k_bytes: Some(4 << 20),
                backing_2m_bytes: Some(768 << 20),
                backing_1g_bytes: Some(0),
                pages_2m: Some(380),
                pages_4k: Some(7),
                ..Default::default()
            }),
            backing_shortfall: "4 MiB in 4 KiB pages: because".into(),
            ..Default::default()
        };
        let page = vm_page(&vm, false);
        let words =
            "auto of 1 GiB, in pages of 2M:768 MiB 4K:4 MiB (4 MiB in 4 KiB pages: because)";
        assert!(page.contains(words), "{page}");
        let wide: Vec<String> = cells(&vm, true)
            .iter()
            .map(|cell| cell.text().to_owned())
            .collect();
        for cell in ["auto", "2M:768 MiB 4K:4 MiB", "2M:380 4K:7"] {
            assert!(wide.iter().any(|text| text == cell), "{cell}: {wide:?}");
        }
        let spec = vm.spec.as_mut().unwrap();
        spec.backing = v1::MemoryBacking::Hugetlb2m.into();
        spec.numa_node = Some(3);
        vm.prefault = Some(v1::Prefault {
            populated_bytes: 256 << 20,
            total_bytes: 1 << 30,
            ..Default::default()
        });
        let page = vm_page(&vm, false);
        assert!(
            page.contains("hugetlb-2m of 1 GiB, of NUMA node 3, in pages"),
            "{page}"
        );
        assert!(page.contains("256 MiB of 1 GiB populated"), "{page}");
        vm.state = v1::vm::State::Lost.into();
        assert!(!vm_page(&vm, false).contains("prefault"));
        vm.mmu_stats = None;
        assert!(!vm_page(&vm, false).contains("in pages of"));
    }

    #[test]
    fn memory_counts_slots_that_were_added() {
        let mut vm = v1::Vm {
            spec: Some(v1::VmSpec {
                memory_bytes: 256 << 20,
                ..Default::default()
            }),
            ..Default::default()
        };
        let at = heads::<v1::Vm>(false)
            .iter()
            .position(|head| *head == "MEMORY")
            .unwrap();
        let shown = |vm: &v1::Vm| cells(vm, false)[at].text().to_owned();
        assert_eq!(shown(&vm), "256 MiB", "what an older process does not say");
        vm.memory_bytes = 272 << 20;
        assert_eq!(shown(&vm), "272 MiB");
    }

    #[test]
    fn conflicts_and_stale_records_are_marked_in_the_table() {
        let mut vm = v1::Vm {
            name: "vms/web".into(),
            uid: "u-1".into(),
            stale: true,
            conflicts: vec![v1::NameConflict {
                uid: "u-2".into(),
                host: "hosts/b".into(),
            }],
            ..Default::default()
        };
        let note = |vm: &v1::Vm| cells(vm, false).last().unwrap().text().to_owned();
        assert_eq!(
            note(&vm),
            "STALE: when it was last seen is not known; CONFLICT: its name is also that of u-2 on b"
        );
        vm.last_seen_time = Some(prost_types::Timestamp {
            seconds: 60,
            nanos: 0,
        });
        vm.conflicts.clear();
        assert_eq!(note(&vm), "STALE: last seen 1970-01-01T00:01:00Z");
        vm.stale = false;
        assert_eq!(note(&vm), "-");
        let twin = v1::Vm {
            name: vm.name.clone(),
            uid: "u-2".into(),
            ..Default::default()
        };
        assert_ne!(vm.key(), twin.key(), "a watch keeps them apart");
    }

    #[test]
    fn page_writes_are_called_what_they_are() {
        let guest = v1::GuestCounters {
            passes: 2,
            pages_written: 600,
            pages: 256,
            ..Default::default()
        };
        assert_eq!(
            guest_words(&guest),
            "2 whole rounds over its 1 MiB, 600 page writes (a page counts each time), 0 errors"
        );
    }
}
