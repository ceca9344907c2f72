//! The phases of a migration with their times: when each began, how long it took. Durations are
//! differences of the server's times; the running phase has lasted until the server's now, which is
//! `create_time + total_time`.

use std::time::{Duration, SystemTime};

use slat_proto::{model::std_duration, v1};

use super::words::{ended, phase};
use crate::term::{
    table::{Cell, NONE, Table},
    units::Span,
};

/// The table; empty when no times are known.
pub(super) fn table(migration: &v1::Migration, colours: bool) -> String {
    if migration.phase_times.is_empty() {
        return String::new();
    }
    let now = time(migration.create_time.as_ref())
        .map(|created| created + std_duration(migration.total_time.as_ref()));
    let ends = migration
        .phase_times
        .iter()
        .skip(1)
        .map(|next| time(next.time.as_ref()))
        .chain([if ended(migration.phase()) { None } else { now }]);
    let rows: Vec<Vec<Cell>> = migration
        .phase_times
        .iter()
        .zip(ends)
        .map(|(one, end)| {
            let began = time(one.time.as_ref());
            vec![
                format!("  {}", phase(one.phase())).into(),
                began.map_or_else(|| NONE.to_owned(), of_day).into(),
                took(began, end).into(),
            ]
        })
        .collect();
    Table::new(&["  PHASE", "BEGAN (UTC)", "TOOK"], colours).render(&rows)
}

fn time(time: Option<&prost_types::Timestamp>) -> Option<SystemTime> {
    time.and_then(|time| SystemTime::try_from(*time).ok())
}

fn took(began: Option<SystemTime>, end: Option<SystemTime>) -> String {
    let took: Option<Duration> = began
        .zip(end)
        .and_then(|(began, end)| end.duration_since(began).ok());
    took.map_or_else(|| NONE.to_owned(), |took| Span(took).to_string())
}

fn of_day(time: SystemTime) -> String {
    jiff::Timestamp::try_from(time).map_or_else(
        |_| NONE.to_owned(),
        |time| time.strftime("%Y-%m-%d %H:%M:%S%.3f").to_string(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_phase_has_its_beginning_and_its_length() {
        use v1::MigrationPhase::{Completed, Pending, PrecopyActive};
        let at = |phase: v1::MigrationPhase, millis: i64| v1::PhaseTime {
            phase: phase.into(),
            time: Some(prost_types::Timestamp {
                seconds: millis / 1000,
                nanos: i32::try_from(millis % 1000).unwrap() * 1_000_000,
            }),
        };
        let mut migration = v1::Migration {
            phase: PrecopyActive.into(),
            create_time: at(Pending, 1000).time,
            total_time: Some(prost_types::Duration {
                seconds: 2,
                nanos: 0,
            }),
            phase_times: vec![at(Pending, 1000), at(PrecopyActive, 1250)],
            ..Default::default()
        };
        assert_eq!(
            table(&migration, false),
            "  PHASE           BEGAN (UTC)              TOOK\n  \
             PENDING         1970-01-01 00:00:01.000  250 ms\n  \
             PRECOPY_ACTIVE  1970-01-01 00:00:01.250  1.75 s"
        );
        migration.phase = Completed.into();
        migration.phase_times.push(at(Completed, 3000));
        let text = table(&migration, false);
        assert!(
            text.ends_with("COMPLETED       1970-01-01 00:00:03.000  -"),
            "{text}"
        );
    }
}
