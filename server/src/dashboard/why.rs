//! Why a running migration takes its time, in one sentence made of its own figures.

use slat_proto::{
    model::std_duration,
    v1::{self, MigrationPhase as Phase},
};

/// Without a byte for this long, that is the reason, seconds.
const STILL: f64 = 5.0;
/// A rate within this share of the cap is held by the cap.
const NEAR: f64 = 0.85;

/// Bytes with a binary prefix, as the page and the command line write them.
pub(super) fn bytes(value: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut unit = 0;
    let mut scaled = float(value);
    while scaled >= 1024.0 && unit + 1 < units.len() {
        scaled /= 1024.0;
        unit += 1;
    }
    let digits = usize::from(unit > 0 && scaled < 100.0);
    format!("{scaled:.digits$} {}", units[unit])
}

#[expect(clippy::cast_precision_loss, reason = "for a sentence")]
fn float(value: u64) -> f64 {
    value as f64
}

fn span(seconds: f64) -> String {
    if seconds < 1.0 {
        format!("{:.0} ms", seconds * 1000.0)
    } else if seconds < 120.0 {
        format!("{seconds:.1} s")
    } else {
        format!("{:.0} min", seconds / 60.0)
    }
}

fn share(part: u64, whole: u64) -> f64 {
    float(part) / float(whole.max(1))
}

/// `None` for one that has ended. `still`: for how long it has sent nothing, seconds.
pub(super) fn why(migration: &v1::Migration, still: Option<f64>) -> Option<String> {
    let reason = || migration.error.as_ref().map(|error| error.message.clone());
    // The migration's own word for it, where it has one, is more exact than its phase.
    let words = &migration.waiting_for;
    let waits = || (!words.is_empty()).then(|| format!("waits for {words}"));
    let or = |text: &str| waits().unwrap_or_else(|| text.to_owned());
    let progress = migration.progress.clone().unwrap_or_default();
    Some(match migration.phase() {
        Phase::Completed | Phase::Cancelled | Phase::Failed => return None,
        Phase::Pending | Phase::Unspecified => reason().unwrap_or_else(|| or("waits for its turn")),
        Phase::Preparing => {
            let host = migration.destination.trim_start_matches("hosts/");
            or(&format!("{host} makes its memory ready"))
        }
        Phase::Switchover => or("the VM is paused: last pages, then its state"),
        Phase::Committed => or("given away; the destination is about to run it"),
        Phase::Cancelling => or("a cancel is being carried out"),
        Phase::InDoubt => {
            reason().unwrap_or_else(|| "it is not known whether the commit happened".to_owned())
        }
        Phase::PrecopyActive => waits().unwrap_or_else(|| precopy(migration, &progress, still)),
    })
}

fn precopy(
    migration: &v1::Migration,
    progress: &v1::MigrationProgress,
    still: Option<f64>,
) -> String {
    let params = migration.params.unwrap_or_default();
    let (rate, dirty) = (
        progress.throughput_bytes_per_second,
        progress.dirty_rate_bytes_per_second,
    );
    if let Some(still) = still.filter(|still| *still >= STILL) {
        return format!("nothing was sent for {}", span(still));
    }
    let cap = params.max_bandwidth_bytes_per_second;
    let capped = cap > 0 && share(rate, cap) >= NEAR;
    let speed = if capped {
        format!("{}/s, its bandwidth cap", bytes(rate))
    } else {
        format!("{}/s", bytes(rate))
    };
    if progress.iteration == 0 {
        let done = progress
            .total_bytes
            .saturating_sub(progress.remaining_bytes);
        return format!(
            "first copy: {:.0} % of {}, at {speed}",
            share(done, progress.total_bytes) * 100.0,
            bytes(progress.total_bytes)
        );
    }
    let expected = progress
        .expected_downtime
        .as_ref()
        .map(|duration| std_duration(Some(duration)).as_secs_f64());
    let allowed = std_duration(params.max_downtime.as_ref()).as_secs_f64();
    let over = expected.filter(|expected| allowed > 0.0 && *expected > allowed);
    let over = over.map_or_else(String::new, |expected| {
        format!(
            "; a stop now would last {}, {} are allowed",
            span(expected),
            span(allowed)
        )
    });
    if rate > 0 && share(dirty, rate) >= NEAR {
        return format!(
            "the guest dirties {}/s and {speed} is sent{over}",
            bytes(dirty)
        );
    }
    format!(
        "iteration {}: {} left at {speed}{over}",
        progress.iteration,
        bytes(progress.remaining_bytes)
    )
}

/// Seconds until what is left is sent, against what the guest dirties meanwhile. `None` when the
/// guest is nearly as fast, when nothing moves, or before there is a rate.
pub(super) fn time_left(migration: &v1::Migration, still: Option<f64>) -> Option<f64> {
    let progress = migration.progress.as_ref()?;
    let stuck = still.is_some_and(|still| still >= STILL);
    if migration.phase() != Phase::PrecopyActive || stuck {
        return None;
    }
    let rate = float(progress.throughput_bytes_per_second);
    let net = rate - float(progress.dirty_rate_bytes_per_second);
    (rate > 0.0 && net > rate * (1.0 - NEAR)).then(|| float(progress.remaining_bytes) / net)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use slat_proto::model::proto_duration;

    use super::*;

    fn migration(change: impl FnOnce(&mut v1::MigrationProgress)) -> v1::Migration {
        let mut progress = v1::MigrationProgress {
            iteration: 3,
            remaining_bytes: 512 << 20,
            total_bytes: 4 << 30,
            throughput_bytes_per_second: 1 << 30,
            ..Default::default()
        };
        change(&mut progress);
        v1::Migration {
            phase: Phase::PrecopyActive.into(),
            destination: "hosts/b".into(),
            progress: Some(progress),
            params: Some(v1::MigrationParams {
                max_downtime: Some(proto_duration(Duration::from_millis(300))),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn the_sentence_names_what_holds_it() {
        let slow = migration(|progress| {
            progress.dirty_rate_bytes_per_second = 1 << 30;
            progress.expected_downtime = Some(proto_duration(Duration::from_millis(1200)));
        });
        assert_eq!(
            why(&slow, Some(0.1)).unwrap(),
            "the guest dirties 1.0 GiB/s and 1.0 GiB/s is sent; a stop now would last 1.2 s, \
             300 ms are allowed"
        );
        assert_eq!(
            why(&slow, Some(12.0)).unwrap(),
            "nothing was sent for 12.0 s"
        );
        assert_eq!(time_left(&slow, None), None);
        let mut capped = migration(|progress| progress.iteration = 0);
        capped
            .params
            .as_mut()
            .unwrap()
            .max_bandwidth_bytes_per_second = 1 << 30;
        assert_eq!(
            why(&capped, None).unwrap(),
            "first copy: 88 % of 4.0 GiB, at 1.0 GiB/s, its bandwidth cap"
        );
        assert_eq!(time_left(&capped, Some(1.0)), Some(0.5));
        assert_eq!(time_left(&capped, Some(STILL)), None);
        let mut waits = capped.clone();
        "hosts/a (source) to answer".clone_into(&mut waits.waiting_for);
        for phase in [Phase::PrecopyActive, Phase::Preparing, Phase::Committed] {
            waits.set_phase(phase);
            let words = why(&waits, None).unwrap();
            assert_eq!(words, "waits for hosts/a (source) to answer");
        }
        let mut ended = capped;
        ended.set_phase(Phase::Completed);
        assert_eq!(why(&ended, None), None);
    }
}
