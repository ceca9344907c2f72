//! One VM: its row in a table, its page.

use slat_proto::v1;

use super::words::{NONE, age, backend, clock, fields, id, pages, short, vm_state};
use crate::term::{
    table::{Cell, Table, Tone},
    units::Size,
};

fn vm_tone(state: v1::vm::State) -> Tone {
    use v1::vm::State;
    match state {
        State::Running => Tone::Good,
        State::Paused | State::Created | State::Incoming | State::Stopped => Tone::Warn,
        State::Failed | State::Lost => Tone::Bad,
        State::Relinquished | State::Unspecified => Tone::Plain,
    }
}

/// Headings of [`vm_row`].
pub(crate) const VM_HEADS: [&str; 10] = [
    "NAME",
    "STATE",
    "HOST",
    "BACKEND",
    "VCPUS",
    "MEMORY",
    "WRITTEN",
    "ERRORS",
    "MIGRATION",
    "AGE",
];

/// One VM in a table.
pub(crate) fn vm_row(vm: &v1::Vm) -> Vec<Cell> {
    let spec = vm.spec.clone().unwrap_or_default();
    let counters = vm.guest_counters.as_ref();
    let errors = counters.map_or_else(
        || Cell::from(NONE),
        |counters| {
            let tone = if counters.errors == 0 {
                Tone::Plain
            } else {
                Tone::Bad
            };
            Cell::toned(counters.errors.to_string(), tone)
        },
    );
    vec![
        id(&vm.name).into(),
        Cell::toned(vm_state(vm.state()), vm_tone(vm.state())),
        id(&vm.host).into(),
        backend(&spec).into(),
        spec.vcpus.to_string().into(),
        Size(spec.memory_bytes).to_string().into(),
        counters
            .map_or_else(|| NONE.to_owned(), |counters| pages(counters.pages_written))
            .into(),
        errors,
        id(&vm.migration).into(),
        age(vm.create_time.as_ref()).into(),
    ]
}

/// One VM's page.
pub(crate) fn vm_page(vm: &v1::Vm, colours: bool) -> String {
    let table = Table::new(&VM_HEADS, colours).render(&[vm_row(vm)]);
    let capabilities: Vec<String> = vm
        .capabilities()
        .map(|one| short(one.as_str_name(), "CAPABILITY_").to_lowercase())
        .collect();
    let guest = vm
        .guest_counters
        .as_ref()
        .map_or_else(String::new, |guest| {
            format!(
                "{} passes over {}, {} written, {} errors",
                guest.passes,
                pages(guest.pages),
                pages(guest.pages_written),
                guest.errors
            )
        });
    let more = fields(&[
        ("why", vm.state_message.clone()),
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
        ("guest", guest),
        ("mmu", mmu(vm.mmu_stats.as_ref())),
    ]);
    format!("{table}\n{more}")
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
}
