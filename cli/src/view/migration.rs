//! One migration: its row in a table; its page, with what each iteration cost and why the migration
//! went as it did.

use slat_proto::{model::std_duration, v1};

use super::words::{NONE, age, fields, id, pages, per_second, phase, short, span, verification};
use crate::{
    escape::one_line,
    failure,
    term::{
        table::{Cell, Table, Tone},
        units::{Rate, Size, Span},
    },
};

fn phase_tone(phase: v1::MigrationPhase) -> Tone {
    use v1::MigrationPhase as Phase;
    match phase {
        Phase::Completed => Tone::Good,
        Phase::Failed | Phase::InDoubt => Tone::Bad,
        Phase::Cancelled | Phase::Cancelling => Tone::Warn,
        _ => Tone::Plain,
    }
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

/// One migration's page: what it cost, iteration by iteration, and why it went as it did.
pub(crate) fn migration_page(migration: &v1::Migration, colours: bool) -> String {
    let progress = migration.progress.clone().unwrap_or_default();
    let verified = match progress.verification() {
        v1::Verification::Unspecified | v1::Verification::None => String::new(),
        other => format!(", memory digests {}", verification(other)),
    };
    let mut text = format!(
        "{}: {} from {} to {}: {}{verified}\n",
        one_line(&migration.name),
        one_line(&migration.vm),
        one_line(id(&migration.source)),
        one_line(id(&migration.destination)),
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
                decision.iteration,
                one_line(&decision.cause)
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
    use std::time::Duration;

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
}
