//! How resources read: short words for enums, rows for tables, a page for one VM and for one migration.

use std::time::{Duration, SystemTime};

use slat_proto::{
    model::{Format as TableFormat, std_duration},
    v1,
};

use crate::{
    failure,
    term::{
        table::{Cell, Table, Tone},
        units::{Rate, Size, Span},
    },
};

/// What a cell shows when there is nothing to show.
const NONE: &str = "-";

/// The bare id of a resource name.
pub(crate) fn id(name: &str) -> &str {
    let id = name.rsplit_once('/').map_or(name, |(_, id)| id);
    if id.is_empty() { NONE } else { id }
}

fn short<'a>(name: &'a str, prefix: &str) -> &'a str {
    name.strip_prefix(prefix).unwrap_or(name)
}

/// `RUNNING`, `PAUSED`...
pub(crate) fn vm_state(state: v1::vm::State) -> &'static str {
    short(state.as_str_name(), "STATE_")
}

/// `PRECOPY_ACTIVE`, `COMPLETED`...
pub(crate) fn phase(phase: v1::MigrationPhase) -> &'static str {
    short(phase.as_str_name(), "MIGRATION_PHASE_")
}

/// `MATCH`, `NONE`...
pub(crate) fn verification(verification: v1::Verification) -> &'static str {
    short(verification.as_str_name(), "VERIFICATION_")
}

/// `kvm`, or `software (sv48x4)`.
pub(crate) fn backend(spec: &v1::VmSpec) -> String {
    match spec.backend() {
        v1::Backend::Unspecified => NONE.to_owned(),
        v1::Backend::Kvm => "kvm".to_owned(),
        v1::Backend::Software => match format(spec) {
            Some(format) => format!("software ({format})"),
            None => "software".to_owned(),
        },
    }
}

/// `ept4`...; `None` where the kernel chose.
pub(crate) fn format(spec: &v1::VmSpec) -> Option<String> {
    Some(TableFormat::from_field(spec.format).ok()??.to_string())
}

/// Whether a migration has ended for good. IN_DOUBT has not.
pub(crate) fn ended(phase: v1::MigrationPhase) -> bool {
    use v1::MigrationPhase::{Cancelled, Completed, Failed};
    matches!(phase, Completed | Cancelled | Failed)
}

fn vm_tone(state: v1::vm::State) -> Tone {
    use v1::vm::State;
    match state {
        State::Running => Tone::Good,
        State::Paused | State::Created | State::Incoming | State::Stopped => Tone::Warn,
        State::Failed | State::Lost => Tone::Bad,
        State::Relinquished | State::Unspecified => Tone::Plain,
    }
}

fn phase_tone(phase: v1::MigrationPhase) -> Tone {
    use v1::MigrationPhase as Phase;
    match phase {
        Phase::Completed => Tone::Good,
        Phase::Failed | Phase::InDoubt => Tone::Bad,
        Phase::Cancelled | Phase::Cancelling => Tone::Warn,
        _ => Tone::Plain,
    }
}

fn age(time: Option<&prost_types::Timestamp>) -> String {
    let since = time
        .and_then(|time| SystemTime::try_from(*time).ok())
        .and_then(|time| SystemTime::now().duration_since(time).ok());
    match since {
        None => NONE.to_owned(),
        Some(age) if age < Duration::from_secs(60) => format!("{}s", age.as_secs()),
        Some(age) if age < Duration::from_secs(2 * 86_400) => Span(age).to_string(),
        Some(age) => format!("{}d", age.as_secs() / 86_400),
    }
}

fn clock(time: Option<&prost_types::Timestamp>) -> String {
    time.and_then(|time| jiff::Timestamp::new(time.seconds, time.nanos).ok())
        .map_or_else(|| NONE.to_owned(), |time| format!("{time:.3}"))
}

/// A duration that may be unset.
pub(crate) fn span(duration: Option<&prost_types::Duration>) -> String {
    duration.map_or_else(
        || NONE.to_owned(),
        |duration| Span(std_duration(Some(duration))).to_string(),
    )
}

/// Headings of [`host_row`].
pub(crate) const HOST_HEADS: [&str; 8] = [
    "NAME", "STATE", "ARCH", "BACKENDS", "VMS", "MEMORY", "ADDRESS", "SEEN",
];

/// One host in a table.
pub(crate) fn host_row(host: &v1::Host) -> Vec<Cell> {
    let state = short(host.state().as_str_name(), "STATE_");
    let tone = match host.state() {
        v1::host::State::Ready => Tone::Good,
        v1::host::State::Unreachable => Tone::Bad,
        v1::host::State::Unspecified => Tone::Plain,
    };
    let backends: Vec<String> = host
        .backends()
        .map(|backend| short(backend.as_str_name(), "BACKEND_").to_lowercase())
        .collect();
    let memory = format!(
        "{} of {}",
        Size(host.memory_used_bytes),
        Size(host.memory_bytes)
    );
    vec![
        id(&host.name).into(),
        Cell::toned(state, tone),
        host.arch.as_str().into(),
        backends.join(",").into(),
        host.vms.to_string().into(),
        memory.into(),
        host.address.as_str().into(),
        age(host.last_seen_time.as_ref()).into(),
    ]
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

fn pages(pages: u64) -> String {
    Size(pages.saturating_mul(4096)).to_string()
}

/// Headings of [`migration_row`].
pub(crate) const MIGRATION_HEADS: [&str; 10] = [
    "NAME",
    "VM",
    "FROM",
    "TO",
    "PHASE",
    "ITERATION",
    "SENT",
    "DOWNTIME",
    "TOTAL",
    "AGE",
];

/// One migration in a table.
pub(crate) fn migration_row(migration: &v1::Migration) -> Vec<Cell> {
    let progress = migration.progress.clone().unwrap_or_default();
    vec![
        id(&migration.name).into(),
        id(&migration.vm).into(),
        id(&migration.source).into(),
        id(&migration.destination).into(),
        Cell::toned(phase(migration.phase()), phase_tone(migration.phase())),
        progress.iteration.to_string().into(),
        Size(progress.bytes_transferred).to_string().into(),
        span(progress.downtime.as_ref()).into(),
        span(migration.total_time.as_ref()).into(),
        age(migration.create_time.as_ref()).into(),
    ]
}

/// Lines of `label value`, labels padded.
fn fields(fields: &[(&str, String)]) -> String {
    let width = fields
        .iter()
        .map(|(label, _)| label.len())
        .max()
        .unwrap_or(0);
    fields
        .iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(label, value)| format!("  {label:width$}  {value}"))
        .collect::<Vec<_>>()
        .join("\n")
}

/// One host's page.
pub(crate) fn host_page(host: &v1::Host, colours: bool) -> String {
    let table = Table::new(&HOST_HEADS, colours).render(&[host_row(host)]);
    let more = fields(&[
        ("version", host.version.clone()),
        ("incarnation", host.incarnation.clone()),
        ("backends", host.backend_message.clone()),
    ]);
    format!("{table}\n{more}").trim_end().to_owned()
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

/// One migration's page: what it cost, iteration by iteration, and why it went as it did.
pub(crate) fn migration_page(migration: &v1::Migration, colours: bool) -> String {
    let progress = migration.progress.clone().unwrap_or_default();
    let verified = match progress.verification() {
        v1::Verification::Unspecified | v1::Verification::None => String::new(),
        other => format!(", memory digests {}", verification(other)),
    };
    let mut text = format!(
        "{}: {} from {} to {}: {}{verified}\n",
        migration.name,
        migration.vm,
        id(&migration.source),
        id(&migration.destination),
        phase(migration.phase()),
    );
    let transferred = format!(
        "{} ({} pages, {} zero)",
        Size(progress.bytes_transferred),
        progress.pages_normal,
        progress.pages_zero
    );
    let location = short(migration.vm_location().as_str_name(), "VM_LOCATION_");
    let (error, advice) = migration
        .error
        .as_ref()
        .map_or_else(Default::default, |error| {
            (
                format!("{} at {}: {}", error.reason, error.side, error.message),
                error.advice.clone(),
            )
        });
    text.push_str(&fields(&[
        ("error", error),
        ("next", advice),
        ("the VM is", failure::location_words(location).to_owned()),
        ("downtime", downtime(&progress)),
        ("total time", span(migration.total_time.as_ref())),
        ("transferred", transferred),
    ]));
    if !progress.iterations.is_empty() {
        let heads = [
            "  ITERATION",
            "SENT",
            "PAGES",
            "ZERO",
            "TIME",
            "RATE",
            "DIRTY AFTER",
            "EXPECTED DOWNTIME",
        ];
        let rows: Vec<Vec<Cell>> = progress.iterations.iter().map(iteration_row).collect();
        text.push_str("\n\n");
        text.push_str(&Table::new(&heads, colours).render(&rows));
    }
    if !progress.decisions.is_empty() {
        text.push_str("\n\n  decisions");
        for decision in &progress.decisions {
            let action = short(decision.action().as_str_name(), "ACTION_");
            text.push_str(&format!(
                "\n  after iteration {}: {action}: {}",
                decision.iteration, decision.cause
            ));
        }
    }
    text
}

fn iteration_row(iteration: &v1::MigrationIteration) -> Vec<Cell> {
    let duration = std_duration(iteration.duration.as_ref());
    let kind = match iteration.iteration {
        _ if iteration.r#final => " (paused)",
        0 => " (bulk)",
        _ => "",
    };
    vec![
        format!("  {}{kind}", iteration.iteration).into(),
        Size(iteration.bytes_transferred).to_string().into(),
        iteration.pages_normal.to_string().into(),
        iteration.pages_zero.to_string().into(),
        Span(duration).to_string().into(),
        per_second(iteration.bytes_transferred, duration)
            .map_or_else(|| NONE.to_owned(), |rate| Rate(rate).to_string())
            .into(),
        pages(iteration.dirty_pages).into(),
        span(iteration.expected_downtime.as_ref()).into(),
    ]
}

/// An amount over a time as a rate a second; `None` for no time.
pub(crate) fn per_second(amount: u64, duration: Duration) -> Option<u64> {
    let nanos = duration.as_nanos();
    (nanos > 0)
        .then(|| u64::try_from(u128::from(amount) * 1_000_000_000 / nanos).unwrap_or(u64::MAX))
}

fn downtime(progress: &v1::MigrationProgress) -> String {
    let Some(downtime) = &progress.downtime else {
        return String::new();
    };
    let whole = span(Some(downtime));
    match &progress.downtime_breakdown {
        None => whole,
        Some(parts) => format!(
            "{whole} (pause {}, final copy {}, state {}, commit {}, resume {})",
            span(parts.pause.as_ref()),
            span(parts.final_copy.as_ref()),
            span(parts.state.as_ref()),
            span(parts.commit.as_ref()),
            span(parts.resume.as_ref()),
        ),
    }
}

#[cfg(test)]
mod tests {
    use slat_proto::model::proto_duration;

    use super::*;

    #[test]
    fn a_migration_page_tells_costs_reasons_and_the_place() {
        let millis = |millis| Some(proto_duration(Duration::from_millis(millis)));
        let migration = v1::Migration {
            name: "migrations/m1".into(),
            vm: "vms/web".into(),
            source: "hosts/a".into(),
            destination: "hosts/b".into(),
            phase: v1::MigrationPhase::Failed.into(),
            vm_location: v1::VmLocation::Source.into(),
            error: Some(v1::MigrationError {
                reason: "CONNECTION_LOST".into(),
                message: "stream 1 broke".into(),
                side: "source".into(),
                advice: "try again".into(),
                ..Default::default()
            }),
            progress: Some(v1::MigrationProgress {
                bytes_transferred: 1 << 20,
                pages_normal: 256,
                downtime: millis(12),
                iterations: vec![v1::MigrationIteration {
                    bytes_transferred: 1 << 20,
                    duration: millis(500),
                    ..Default::default()
                }],
                decisions: vec![v1::MigrationDecision {
                    action: v1::migration_decision::Action::GiveUp.into(),
                    cause: "the peer is gone".into(),
                    ..Default::default()
                }],
                ..Default::default()
            }),
            ..Default::default()
        };
        let page = migration_page(&migration, false);
        for words in [
            "migrations/m1: vms/web from a to b: FAILED",
            "CONNECTION_LOST at source: stream 1 broke",
            "try again",
            "on the source",
            "12.0 ms",
            "1 MiB (256 pages, 0 zero)",
            "0 (bulk)",
            "2 MiB/s",
            "after iteration 0: GIVE_UP: the peer is gone",
        ] {
            assert!(page.contains(words), "{words} is not in\n{page}");
        }
    }

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
