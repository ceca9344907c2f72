//! Bytes that this host's migrations moved, over all sides, counted on when a side is over and
//! forgotten: `slat_host_migration_bytes_total{direction,kind}` through the `metrics` façade.
//!
//! Each side is followed by one task, which owns its [`Counted`]: what of the side's figures is in
//! the totals already. The totals only grow. A side that was there before this agent started is
//! counted from what the agent first hears of it: an earlier agent counted the rest.

use std::{
    sync::LazyLock,
    time::{SystemTime, UNIX_EPOCH},
};

use metrics::{Unit, counter, describe_counter};
use slat_proto::{model::PAGE_SIZE, v1};

const FAMILY: &str = "slat_host_migration_bytes_total";
const KINDS: [&str; 3] = ["wire", "normal", "zero"];

static STARTED: LazyLock<SystemTime> = LazyLock::new(SystemTime::now);

/// Describes the family and begins its series at 0.
pub(super) fn begin() {
    LazyLock::force(&STARTED);
    describe_counter!(
        FAMILY,
        Unit::Bytes,
        "Bytes that migrations moved: on the wire, and guest memory with contents and as zeroes."
    );
    for direction in ["out", "in"] {
        for kind in KINDS {
            counter!(FAMILY, "direction" => direction, "kind" => kind).increment(0);
        }
    }
}

/// What of one side is in the totals.
#[derive(Debug, Default)]
pub(super) struct Counted(Option<[u64; 3]>);

impl Counted {
    /// Takes what a side said.
    pub(super) fn see(&mut self, side: &v1::Transfer) {
        for (kind, grown) in self.grown(side).into_iter().enumerate() {
            if grown > 0
                && let Some(direction) = direction(side.role())
            {
                counter!(FAMILY, "direction" => direction, "kind" => KINDS[kind]).increment(grown);
            }
        }
    }

    /// What is new since it was last asked, by kind.
    fn grown(&mut self, side: &v1::Transfer) -> [u64; 3] {
        let Some(progress) = &side.progress else {
            return [0; 3];
        };
        let now = [
            progress.bytes_transferred,
            progress.pages_normal.saturating_mul(PAGE_SIZE),
            progress.pages_zero.saturating_mul(PAGE_SIZE),
        ];
        let before = self.0.unwrap_or(if is_older(side) { now } else { [0; 3] });
        // Figures do not shrink; a later message with less is an older one.
        let kept = std::array::from_fn(|kind| now[kind].max(before[kind]));
        self.0 = Some(kept);
        std::array::from_fn(|kind| kept[kind] - before[kind])
    }
}

fn direction(role: v1::TransferRole) -> Option<&'static str> {
    match role {
        v1::TransferRole::Source => Some("out"),
        v1::TransferRole::Destination => Some("in"),
        v1::TransferRole::Unspecified => None,
    }
}

/// Whether a side began before this agent, by the clock of the host that both are on.
fn is_older(side: &v1::Transfer) -> bool {
    let first = side.phase_times.first().and_then(|entry| entry.time);
    let started = STARTED.duration_since(UNIX_EPOCH).unwrap_or_default();
    first.is_some_and(|first| {
        u64::try_from(first.seconds).is_ok_and(|seconds| seconds < started.as_secs())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn side(bytes: u64, began: i64) -> v1::Transfer {
        v1::Transfer {
            role: v1::TransferRole::Source.into(),
            progress: Some(v1::MigrationProgress {
                bytes_transferred: bytes,
                pages_normal: bytes / PAGE_SIZE,
                pages_zero: 2,
                ..Default::default()
            }),
            phase_times: vec![v1::TransferPhaseTime {
                time: Some(prost_types::Timestamp {
                    seconds: began,
                    nanos: 0,
                }),
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    #[test]
    fn each_byte_is_counted_once_and_never_taken_back() {
        LazyLock::force(&STARTED);
        let later = i64::MAX / 2;
        let mut counted = Counted::default();
        assert_eq!(counted.grown(&side(8192, later)), [8192, 8192, 8192]);
        assert_eq!(counted.grown(&side(8192, later)), [0, 0, 0]);
        assert_eq!(counted.grown(&side(4096, later)), [0, 0, 0]);
        assert_eq!(counted.grown(&side(12288, later)), [4096, 4096, 0]);
        // A side without figures, as one that was only announced.
        assert_eq!(counted.grown(&v1::Transfer::default()), [0, 0, 0]);
    }

    #[test]
    fn a_side_from_before_this_agent_counts_from_what_is_first_heard() {
        LazyLock::force(&STARTED);
        let mut counted = Counted::default();
        assert_eq!(counted.grown(&side(8192, 1000)), [0, 0, 0]);
        assert_eq!(counted.grown(&side(12288, 1000)), [4096, 4096, 0]);
    }
}
