//! One migration: its columns; its page, with its phases, what each iteration cost and why the
//! migration went as it did.

use slat_proto::{model::std_duration, v1};

use super::{
    pace,
    path::page_path,
    phases,
    words::{
        age, count, fields, id, pages, phase, short, size_cell, span, span_cell, verification,
    },
};
use crate::{
    escape, failure,
    output::{Column, Resource},
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

fn figure<T>(migration: &v1::Migration, of: impl Fn(&v1::MigrationProgress) -> T) -> Option<T> {
    migration.progress.as_ref().map(of)
}

fn rate_cell(rate: Option<u64>) -> Cell {
    match rate {
        None | Some(0) => Cell::none(),
        Some(rate) => Cell::number(rate, Rate(rate).to_string()),
    }
}

impl Resource for v1::Migration {
    const COLLECTION: &'static str = "migrations";
    const COLUMNS: &'static [Column<Self>] = &[
        Column::new("NAME", |one| id(&one.name).into()),
        Column::new("VM", |one| id(&one.vm).into()),
        Column::new("FROM", |one| id(&one.source).into()),
        Column::new("TO", |one| id(&one.destination).into()),
        Column::new("PHASE", |one| {
            Cell::toned(phase(one.phase()), phase_tone(one.phase()))
        }),
        Column::new("PERCENT", |one| {
            pace::percent(one).map_or_else(Cell::none, count)
        }),
        Column::new("ITERATIONS", |one| {
            figure(one, pace::iterations)
                .flatten()
                .map_or_else(Cell::none, count)
        }),
        Column::new("SENT", |one| {
            size_cell(figure(one, |progress| progress.bytes_transferred).unwrap_or(0))
        }),
        Column::wide("REMAINING", |one| {
            pace::percent(one)
                .and(figure(one, |progress| progress.remaining_bytes))
                .map_or_else(Cell::none, size_cell)
        }),
        Column::wide("RATE", |one| {
            let rate = figure(one, |progress| progress.throughput_bytes_per_second);
            rate_cell(pace::time_left(one).and(rate))
        }),
        Column::wide("LEFT", |one| {
            pace::time_left(one).map_or_else(Cell::none, |left| {
                Cell::number(left.as_nanos(), Span(left).to_string())
            })
        }),
        Column::wide("DIRTY-RATE", |one| {
            rate_cell(figure(one, |progress| progress.dirty_rate_bytes_per_second))
        }),
        Column::new("DOWNTIME", |one| {
            span_cell(
                one.progress
                    .as_ref()
                    .and_then(|progress| progress.downtime.as_ref()),
            )
        }),
        Column::drifting("TOTAL", |one| span_cell(one.total_time.as_ref())),
        Column::wide("REASON", |one| match &one.error {
            Some(error) => error.reason.as_str().into(),
            None => Cell::none(),
        }),
        Column::wide("VM-UID", |one| one.vm_uid.as_str().into()),
        Column::drifting("AGE", |one| age(one.create_time.as_ref())),
    ];

    fn name(&self) -> String {
        self.name.clone()
    }

    fn key(&self) -> String {
        self.name.clone()
    }

    fn page(&self, colours: bool) -> String {
        page(self, colours)
    }
}

/// Why a migration failed or is in doubt, and what to do next, as fields of its page.
fn trouble(migration: &v1::Migration) -> [(&'static str, String); 2] {
    let error = migration.error.as_ref().map_or_else(String::new, |error| {
        let message = failure::in_options(&error.message);
        format!("{} at {}: {message}", error.reason, error.side)
    });
    [
        ("error", error),
        ("next", failure::migration_advice(migration)),
    ]
}

fn page(migration: &v1::Migration, colours: bool) -> String {
    let progress = migration.progress.clone().unwrap_or_default();
    let verified = match progress.verification() {
        v1::Verification::Unspecified | v1::Verification::None => String::new(),
        v1::Verification::Impossible => format!(
            ", memory digests not compared: {}",
            escape::one_line(&progress.verification_message)
        ),
        other => format!(", memory digests {}", verification(other)),
    };
    let mut text = format!(
        "{}: {} from {} to {}: {}{verified}\n",
        escape::one_line(&migration.name),
        escape::one_line(&migration.vm),
        escape::one_line(id(&migration.source)),
        escape::one_line(id(&migration.destination)),
        phase(migration.phase()),
    );
    let transferred = format!(
        "{} ({} pages, {} zero)",
        Size(progress.bytes_transferred),
        progress.pages_normal,
        progress.pages_zero
    );
    let location = short(migration.vm_location().as_str_name(), "VM_LOCATION_");
    let mut lines = trouble(migration).to_vec();
    let place = match (migration.phase(), migration.vm_location()) {
        (v1::MigrationPhase::Failed, v1::VmLocation::Unknown) => {
            "nowhere that it ran when this ended: a frozen copy was left at the source"
        }
        (v1::MigrationPhase::InDoubt, v1::VmLocation::Unknown) => {
            "not known: the source cannot be asked, and the destination does not say"
        }
        _ => failure::location_words(location),
    };
    lines.push(("the VM is", place.to_owned()));
    lines.extend(pace::lines(migration));
    lines.extend([
        ("downtime", downtime(&progress)),
        ("total time", span(migration.total_time.as_ref())),
        ("transferred", transferred),
        (
            "iterations",
            pace::iterations(&progress).map_or_else(String::new, |count| count.to_string()),
        ),
        ("pages", page_path(&progress)),
        ("VM uid", migration.vm_uid.clone()),
    ]);
    text.push_str(&fields(&lines));
    for table in [
        phases::table(migration, colours),
        iterations(&progress, colours),
    ] {
        if !table.is_empty() {
            text.push_str("\n\n");
            text.push_str(&table);
        }
    }
    if !progress.decisions.is_empty() {
        text.push_str("\n\n  decisions");
        let mut between = progress.decisions_between.as_ref();
        for decision in &progress.decisions {
            if let Some(gap) = between.take_if(|gap| decision.iteration >= gap.last_iteration) {
                text.push_str(&format!("\n  ... {} more", gap.count));
            }
            let action = short(decision.action().as_str_name(), "ACTION_");
            let cause = failure::in_options(&decision.cause);
            text.push_str(&format!(
                "\n  after iteration {}: {action}: {}",
                decision.iteration,
                escape::one_line(&cause)
            ));
        }
    }
    text
}

/// What each iteration cost; those that a long history left out are counted in a row of their own.
fn iterations(progress: &v1::MigrationProgress, colours: bool) -> String {
    if progress.iterations.is_empty() {
        return String::new();
    }
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
    let mut rows: Vec<Vec<Cell>> = Vec::new();
    let mut next = 0;
    for iteration in &progress.iterations {
        if iteration.iteration > next {
            rows.push(match &progress.iterations_between {
                Some(between) => between_row(between),
                None => vec![format!("  ... {} more", iteration.iteration - next).into()],
            });
        }
        next = iteration.iteration.saturating_add(1);
        rows.push(iteration_row(iteration));
    }
    Table::new(&heads, colours).render(&rows)
}

/// Those that a long history added up: sums, and the least and the most.
fn between_row(between: &v1::IterationSummary) -> Vec<Cell> {
    let duration = std_duration(between.duration.as_ref());
    let range = |least: String, most: String| format!("{least} to {most}");
    vec![
        format!("  ... {} more", between.count).into(),
        Size(between.bytes_transferred).to_string().into(),
        between.pages_normal.to_string().into(),
        between.pages_zero.to_string().into(),
        Span(duration).to_string().into(),
        pace::rate(between.bytes_transferred, duration).into(),
        range(
            pages(between.least_dirty_pages),
            pages(between.most_dirty_pages),
        )
        .into(),
        range(
            span(between.least_expected_downtime.as_ref()),
            span(between.most_expected_downtime.as_ref()),
        )
        .into(),
    ]
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
        pace::rate(iteration.bytes_transferred, duration).into(),
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
        _ if progress.downtime_estimated => format!(
            "{whole} (estimated: the source has not told it; from its pause until the destination had the VM)"
        ),
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
    use crate::output::{Changes, Format, ListStyle};

    #[test]
    fn a_watch_shows_no_row_for_time_that_passed() {
        let at = |seconds, bytes_transferred, dirty_rate_bytes_per_second| v1::Migration {
            name: "migrations/m1".into(),
            total_time: Some(proto_duration(Duration::from_secs(seconds))),
            progress: Some(v1::MigrationProgress {
                bytes_transferred,
                dirty_rate_bytes_per_second,
                ..Default::default()
            }),
            ..Default::default()
        };
        let rows = |format: Format| -> Vec<bool> {
            let mut changes = Changes::new(ListStyle {
                format,
                ..Default::default()
            });
            [
                at(1, 4096, 1),
                at(2, 4096, 1),
                at(3, 4096, 2),
                at(4, 8192, 2),
            ]
            .iter()
            .map(|migration| changes.is_news(migration))
            .collect()
        };
        assert_eq!(rows(Format::Table), [true, false, false, true]);
        assert_eq!(rows(Format::Wide), [true, false, true, true]);
        assert_eq!(rows(Format::Json), [true, false, true, true]);
    }

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
                    cause: "max_downtime 300 ms; the peer is gone".into(),
                    ..Default::default()
                }],
                ..Default::default()
            }),
            ..Default::default()
        };
        let page = migration.page(false);
        for words in [
            "migrations/m1: vms/web from a to b: FAILED",
            "CONNECTION_LOST at source: stream 1 broke",
            "try again",
            "on the source",
            "12.0 ms",
            "1 MiB (256 pages, 0 zero)",
            "0 (bulk)",
            "2 MiB/s",
            "after iteration 0: GIVE_UP: --max-downtime 300 ms; the peer is gone",
            "iterations   1",
        ] {
            assert!(page.contains(words), "{words} is not in\n{page}");
        }
    }

    #[test]
    fn iterations_that_were_left_out_are_counted() {
        let one = |iteration| v1::MigrationIteration {
            iteration,
            ..Default::default()
        };
        let progress = v1::MigrationProgress {
            iterations: vec![one(0), one(1), one(999)],
            ..Default::default()
        };
        let text = iterations(&progress, false);
        assert!(text.contains("  ... 997 more\n  999"), "{text}");
        let mut summed = progress;
        summed.iterations_between = Some(v1::IterationSummary {
            count: 997,
            bytes_transferred: 1 << 20,
            most_dirty_pages: 256,
            ..Default::default()
        });
        let text = iterations(&summed, false);
        assert!(text.contains("... 997 more  1 MiB"), "{text}");
        assert!(text.contains("0 B to 1 MiB"), "{text}");
    }

    #[test]
    fn a_running_migration_says_how_far_it_is() {
        let migration = v1::Migration {
            phase: v1::MigrationPhase::PrecopyActive.into(),
            progress: Some(v1::MigrationProgress {
                total_bytes: 512 << 20,
                remaining_bytes: 128 << 20,
                throughput_bytes_per_second: 64 << 20,
                ..Default::default()
            }),
            ..Default::default()
        };
        let page = migration.page(false);
        for words in [
            "75 % of 512 MiB",
            "128 MiB left",
            "64 MiB/s",
            "2.00 s in this iteration",
            "not known yet",
        ] {
            assert!(page.contains(words), "{words} is not in\n{page}");
        }
    }
}
