//! One VM: its columns, its page. Conflicts of names and stale records are marked in both.

use slat_proto::v1;

use super::words::{age, backend, clock, count, fields, id, pages, short, size_cell, vm_state};
use crate::{
    output::{Column, Resource, cells, heads},
    term::table::{Cell, Table, Tone},
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
    let notes = super::words::notes(staleness(vm).into_iter().chain(conflicts(vm)).collect());
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
        Column::new("MEMORY", |vm| size_cell(spec(vm, |spec| spec.memory_bytes))),
        Column::new("PAGE-WRITES", |vm| {
            vm.guest_counters
                .as_ref()
                .map_or_else(Cell::none, |counters| count(counters.pages_written))
        }),
        Column::new("ERRORS", errors),
        Column::new("MIGRATION", |vm| id(&vm.migration).into()),
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
    let more = fields(&[
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
        ("can", capabilities.join(", ")),
        (
            "guest",
            vm.guest_counters
                .as_ref()
                .map_or_else(String::new, guest_words),
        ),
        ("mmu", mmu(vm.mmu_stats.as_ref())),
    ]);
    format!("{table}\n{more}")
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

fn mmu(stats: Option<&v1::MmuStats>) -> String {
    let Some(stats) = stats else {
        return String::new();
    };
    [
        ("faults taken", stats.faults_taken),
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
        ("table pages", stats.table_pages),
    ]
    .iter()
    .filter_map(|(label, value)| value.map(|value| format!("{label} {value}")))
    .collect::<Vec<_>>()
    .join(", ")
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
        vm.mmu_stats = None;
        assert!(!vm_page(&vm, false).contains("mmu"));
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
