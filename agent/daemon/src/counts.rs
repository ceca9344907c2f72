//! What saves, restores, forks and pagers are counted by, through the `metrics` façade. Figures of
//! one VM's paging are rendered from its snapshot ([`super::metrics`]).

use std::time::Duration;

use metrics::{Unit, counter, describe_counter, describe_histogram, histogram};

/// Pagers that were started in place of one that died.
pub(super) const PAGER_RESTARTS: &str = "slat_pager_restarts_total";
const SAVES: &str = "slat_saves_total";
const SAVED: &str = "slat_save_bytes_total";
const PAUSE: &str = "slat_snapshot_pause_seconds";
const COPIES: &str = "slat_copies_total";

/// How a save ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Written,
    Failed,
    Cancelled,
}

impl Outcome {
    const ALL: [Self; 3] = [Self::Written, Self::Failed, Self::Cancelled];

    fn word(self) -> &'static str {
        match self {
            Self::Written => "written",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// Describes the families and begins their series at 0.
pub(super) fn begin() {
    let help = "Pagers of VMs that were started in place of one that died.";
    describe_counter!(PAGER_RESTARTS, Unit::Count, help);
    counter!(PAGER_RESTARTS).increment(0);
    let help = "Saves that were asked for, by how they ended or were refused.";
    describe_counter!(SAVES, Unit::Count, help);
    for outcome in Outcome::ALL {
        counter!(SAVES, "outcome" => outcome.word()).increment(0);
    }
    let help = "Bytes of files of saves that were written.";
    describe_counter!(SAVED, Unit::Bytes, help);
    counter!(SAVED).increment(0);
    let help = "How long the vCPUs of a VM did not run for a snapshot, by what it was for.";
    describe_histogram!(PAUSE, Unit::Seconds, help);
    let help = "VMs that were made of a save or of another VM, by what they were made of and whether it went well.";
    describe_counter!(COPIES, Unit::Count, help);
    for of in ["save", "vm"] {
        for result in ["made", "failed"] {
            counter!(COPIES, "of" => of, "result" => result).increment(0);
        }
    }
}

/// A save has ended; bytes of its file when it was written.
pub(super) fn saved(outcome: Outcome, bytes: u64) {
    counter!(SAVES, "outcome" => outcome.word()).increment(1);
    counter!(SAVED).increment(bytes);
}

/// A snapshot was taken.
pub(super) fn paused(purpose: &'static str, nanos: u64) {
    histogram!(PAUSE, "for" => purpose).record(Duration::from_nanos(nanos));
}

/// A VM was made of something else, or was not.
pub(super) fn copied(of: &'static str, made: bool) {
    let result = if made { "made" } else { "failed" };
    counter!(COPIES, "of" => of, "result" => result).increment(1);
}
