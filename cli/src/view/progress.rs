//! A migration's progress for people: on a terminal one line drawn over and over, elsewhere one
//! line for each phase and each finished iteration, so that a log of it reads well.

use slat_proto::{model::std_duration, v1};

use super::{
    pace,
    words::{self, pages},
};
use crate::{
    escape,
    term::{
        out,
        units::{Rate, Size, Span},
    },
};

/// Shows a migration as its states come in.
#[derive(Debug)]
pub(crate) struct Progress {
    label: String,
    live: bool,
    drawn: bool,
    phase: v1::MigrationPhase,
    /// Number of the first iteration that was not told yet.
    next: u32,
    waiting_for: String,
}

impl Progress {
    /// Under `label`, on standard error.
    pub(crate) fn new(label: impl Into<String>) -> Self {
        Self {
            label: label.into(),
            live: out::stderr_is_live(),
            drawn: false,
            phase: v1::MigrationPhase::Unspecified,
            next: 0,
            waiting_for: String::new(),
        }
    }

    /// Shows the state a migration is in now.
    pub(crate) fn update(&mut self, migration: &v1::Migration) {
        if self.live {
            let line = cut(
                &escape::one_line(&format!("{}  {}", self.label, live_line(migration))),
                out::stderr_width().saturating_sub(1),
            );
            out::say_raw(&format!("\r\x1b[2K{line}"));
            self.drawn = true;
        } else {
            for line in self.new_lines(migration) {
                out::say(format!("{}  {line}", self.label));
            }
        }
    }

    /// What became known since the last state, a line each.
    fn new_lines(&mut self, migration: &v1::Migration) -> Vec<String> {
        let mut lines = Vec::new();
        let progress = migration.progress.as_ref();
        let iterations = progress.map_or(&[][..], |progress| &progress.iterations);
        // By number and not by place: a long history is kept in part.
        for iteration in iterations {
            if iteration.iteration >= self.next && !unsettled(iteration) {
                lines.push(iteration_line(iteration));
                self.next = iteration.iteration.saturating_add(1);
            }
        }
        if migration.phase() != self.phase {
            self.phase = migration.phase();
            lines.push(words::phase(self.phase).to_owned());
        }
        if migration.waiting_for != self.waiting_for {
            self.waiting_for.clone_from(&migration.waiting_for);
            lines.extend(pace::waiting(migration).map(|words| format!("waits for {words}")));
        }
        lines
    }

    /// Takes the live line away, so that what follows starts on a clean line.
    pub(crate) fn finish(&mut self) {
        if self.drawn {
            out::say_raw("\r\x1b[2K");
            self.drawn = false;
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

fn live_line(migration: &v1::Migration) -> String {
    let phase = words::phase(migration.phase());
    if let Some(waiting) = pace::waiting(migration) {
        return format!("{phase}  waits for {waiting}");
    }
    let Some(progress) = &migration.progress else {
        return phase.to_owned();
    };
    let Some(percent) = pace::percent(migration) else {
        return phase.to_owned();
    };
    let mut line = format!(
        "{phase} #{}  {percent} %  {} left  {}",
        progress.iteration,
        Size(progress.remaining_bytes),
        Rate(progress.throughput_bytes_per_second),
    );
    if let Some(left) = pace::time_left(migration) {
        line.push_str(&format!(", {}", Span(left)));
    }
    if progress.dirty_rate_bytes_per_second > 0 {
        line.push_str(&format!(
            "  dirty {}",
            Rate(progress.dirty_rate_bytes_per_second)
        ));
    }
    if let Some(downtime) = &progress.downtime {
        line.push_str(&format!(
            "  downtime {}",
            Span(std_duration(Some(downtime)))
        ));
    } else if let Some(expected) = &progress.expected_downtime {
        line.push_str(&format!(
            "  downtime ~{}",
            Span(std_duration(Some(expected)))
        ));
    }
    line
}

/// Its pages are sent, what the guest dirtied meanwhile is not yet counted.
fn unsettled(iteration: &v1::MigrationIteration) -> bool {
    !iteration.r#final && iteration.expected_downtime.is_none()
}

fn iteration_line(iteration: &v1::MigrationIteration) -> String {
    let duration = std_duration(iteration.duration.as_ref());
    let kind = match iteration.iteration {
        _ if iteration.r#final => " (paused)",
        0 => " (bulk)",
        _ => "",
    };
    let mut line = format!(
        "iteration {}{kind}: {} in {}",
        iteration.iteration,
        Size(iteration.bytes_transferred),
        Span(duration),
    );
    if !iteration.r#final {
        line.push_str(&format!(
            ", {} dirty after it, expected downtime {}",
            pages(iteration.dirty_pages),
            words::span(iteration.expected_downtime.as_ref()),
        ));
    }
    line
}

/// The first `width` characters.
fn cut(line: &str, width: usize) -> String {
    line.chars().take(width).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use slat_proto::model::proto_duration;

    use super::*;

    fn migration(phase: v1::MigrationPhase, finished: u32) -> v1::Migration {
        let iterations = (0..finished)
            .map(|iteration| v1::MigrationIteration {
                iteration,
                bytes_transferred: 64 << 20,
                duration: Some(proto_duration(Duration::from_millis(100))),
                dirty_pages: 256,
                expected_downtime: Some(proto_duration(Duration::from_millis(7))),
                ..Default::default()
            })
            .collect();
        v1::Migration {
            phase: phase.into(),
            progress: Some(v1::MigrationProgress {
                iteration: finished,
                total_bytes: 64 << 20,
                remaining_bytes: 32 << 20,
                throughput_bytes_per_second: 640 << 20,
                dirty_rate_bytes_per_second: 64 << 20,
                expected_downtime: Some(proto_duration(Duration::from_millis(7))),
                iterations,
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn a_log_has_each_phase_and_iteration_once() {
        use v1::MigrationPhase::{PrecopyActive, Preparing, Switchover};
        let mut progress = Progress::new("m");
        let mut lines = Vec::new();
        for (phase, finished) in [
            (Preparing, 0),
            (PrecopyActive, 0),
            (PrecopyActive, 0),
            (PrecopyActive, 1),
            (PrecopyActive, 1),
            (Switchover, 2),
        ] {
            lines.extend(progress.new_lines(&migration(phase, finished)));
        }
        assert_eq!(
            lines,
            [
                "PREPARING",
                "PRECOPY_ACTIVE",
                "iteration 0 (bulk): 64 MiB in 100 ms, 1 MiB dirty after it, expected downtime 7.00 ms",
                "iteration 1: 64 MiB in 100 ms, 1 MiB dirty after it, expected downtime 7.00 ms",
                "SWITCHOVER",
            ]
        );
    }

    #[test]
    fn what_it_waits_for_is_told_once() {
        let mut progress = Progress::new("m");
        let mut waiting = migration(v1::MigrationPhase::Preparing, 0);
        waiting.waiting_for = "hosts/b (destination) to populate its memory".into();
        waiting.populated_bytes = 16 << 20;
        let text =
            "waits for hosts/b (destination) to populate its memory, 25 % of 64 MiB is there";
        assert_eq!(progress.new_lines(&waiting), ["PREPARING", text]);
        waiting.populated_bytes = 32 << 20;
        assert_eq!(
            progress.new_lines(&waiting).len(),
            0,
            "a log is no progress bar"
        );
        assert!(
            live_line(&waiting).contains("50 % of 64 MiB"),
            "{}",
            live_line(&waiting)
        );
    }

    #[test]
    fn an_iteration_is_told_when_its_figures_are_in() {
        let mut progress = Progress::new("m");
        let mut sent = migration(v1::MigrationPhase::PrecopyActive, 1);
        let iterations = &mut sent.progress.as_mut().unwrap().iterations;
        let counted = iterations[0].expected_downtime.take();
        assert_eq!(progress.new_lines(&sent), ["PRECOPY_ACTIVE"]);
        sent.progress.as_mut().unwrap().iterations[0].expected_downtime = counted;
        assert_eq!(progress.new_lines(&sent).len(), 1);
        assert_eq!(progress.new_lines(&sent).len(), 0);
    }

    #[test]
    fn the_live_line_has_what_is_asked_for_and_fits() {
        let line = live_line(&migration(v1::MigrationPhase::PrecopyActive, 1));
        assert_eq!(
            line,
            "PRECOPY_ACTIVE #1  50 %  32 MiB left  640 MiB/s, 50.0 ms  dirty 64 MiB/s  downtime ~7.00 ms"
        );
        assert_eq!(cut("äöü", 2), "äö");
    }
}
