//! Measures what a switchover will be made of, while the VM runs: round trips and the
//! destination's journal by Echo, the source's journal by a probe, a digest by a sample.
//!
//! Measured as soon as the connections stand, so that a limit that cannot be met is refused before
//! any page is sent; and again between iterations, so that the estimate is of now.

use std::time::{Duration, Instant};

use slat_proto::{
    ApiError, Reason,
    model::{MigrationParams, Verify},
};

use super::{
    super::{
        convergence::Convergence,
        estimate::Prediction,
        wire::{ECHO_ACK, ECHO_SINCE, Kind, PAGE, WireError},
    },
    link::Link,
    parts::SourceDriver,
};
use crate::{machine::SyncProbe, memory::digest_page};

/// So often at the beginning.
const FIRST: u32 = 3;
/// And so often before a limit is refused: each time may have been a bad moment.
const BEFORE_REFUSAL: u32 = 12;
/// Between iterations, no more often than this: each costs a round trip and an append. But always
/// when what they cost is what keeps the VM from being switched over, in so many iterations.
const IN_THE_WAY: u32 = 100;
const EVERY: Duration = Duration::from_millis(250);
/// Pages whose digest is taken to see how fast that goes.
const SAMPLE: u64 = 1024;

/// What measuring needs from one time to the next.
#[derive(Debug, Default)]
pub(super) struct Meter {
    probe: Option<SyncProbe>,
    last: Option<Instant>,
}

impl SourceDriver {
    /// The first measurements, right after the connections were opened.
    pub(super) fn measure_first(
        &self,
        link: &mut Link,
        meter: &mut Meter,
        convergence: &mut Convergence,
    ) -> Result<(), ApiError> {
        match self.machine.sync_probe() {
            Ok(probe) => meter.probe = Some(probe),
            Err(error) => {
                tracing::warn!(%error, migration = %self.side.migration(),
                    "the journal's disk cannot be measured; the estimate goes without");
            }
        }
        convergence.estimator.runs(self.machine.runs());
        if self.params.verify == Verify::BeforeCommit {
            convergence.estimator.digest(self.sampled_digest());
        }
        for _ in 0..FIRST {
            self.measure(link, meter, convergence)?;
        }
        for _ in FIRST..BEFORE_REFUSAL {
            if convergence.out_of_reach().is_none() {
                break;
            }
            self.measure(link, meter, convergence)?;
        }
        Ok(())
    }

    /// Measures again, when the last time is long enough ago or the limit depends on it.
    pub(super) fn measure_again(
        &self,
        link: &mut Link,
        meter: &mut Meter,
        convergence: &mut Convergence,
        iteration: u32,
    ) -> Result<(), ApiError> {
        let fixed = convergence.estimator.predict(0).total();
        let in_the_way = iteration < IN_THE_WAY && fixed > self.params.max_downtime;
        if in_the_way || meter.last.is_none_or(|last| last.elapsed() >= EVERY) {
            self.measure(link, meter, convergence)?;
        }
        Ok(())
    }

    fn measure(
        &self,
        link: &mut Link,
        meter: &mut Meter,
        convergence: &mut Convergence,
    ) -> Result<(), ApiError> {
        let estimator = &mut convergence.estimator;
        if self.versions.protocol >= ECHO_SINCE {
            let begun = Instant::now();
            link.send(Kind::Echo, 0, &[])?;
            let (_, payload) = link.receive(Kind::EchoAck)?;
            let took = begun.elapsed();
            let nanos = <[u8; ECHO_ACK]>::try_from(payload.as_slice())
                .map_err(|_| WireError::corrupt("length", "of EchoAck"))?;
            let synced = Duration::from_nanos(u64::from_le_bytes(nanos));
            if !synced.is_zero() {
                estimator.destination_synced(synced.min(took));
            }
            estimator.round_trip(took.saturating_sub(synced));
        } else if let Some(introduced) = link.introduced.take() {
            estimator.round_trip(introduced);
        }
        if let Some(probe) = &mut meter.probe {
            match probe.measure() {
                Ok(took) => estimator.source_synced(took),
                Err(error) => {
                    tracing::warn!(%error, migration = %self.side.migration(),
                        "the journal's disk cannot be measured any more");
                    meter.probe = None;
                }
            }
        }
        meter.last = Some(Instant::now());
        Ok(())
    }

    /// How long the digest of all memory takes.
    fn sampled_digest(&self) -> Duration {
        let table = self.machine.memory().table();
        let mut page = [0_u8; PAGE];
        let begun = Instant::now();
        let mut sampled = 0;
        'all: for slot in table.slots() {
            for number in 0..slot.spec().pages {
                slot.read_page(number, &mut page);
                std::hint::black_box(digest_page(number, &page));
                sampled += 1;
                if sampled == SAMPLE {
                    break 'all;
                }
            }
        }
        let share = table.pages() as f64 / f64::from(u32::try_from(sampled).unwrap_or(1).max(1));
        begun.elapsed().mul_f64(share / threads() as f64)
    }
}

/// DOWNTIME_UNREACHABLE, with what a switchover costs and of what that is made.
pub(super) fn unreachable_limit(
    cause: &str,
    least: &Prediction,
    params: &MigrationParams,
) -> ApiError {
    let millis = |duration: Duration| format!("{:.3}", duration.as_secs_f64() * 1e3);
    // Half as much again: a limit at the least would be met by chance only.
    let enough = (least.total().as_secs_f64() * 1.5e3).ceil().max(1.0);
    ApiError::new(Reason::DowntimeUnreachable, cause)
        .with("predicted_ms", millis(least.total()))
        .with("max_downtime_ms", millis(params.max_downtime))
        .with("pause_ms", millis(least.pause))
        .with("final_copy_ms", millis(least.final_copy))
        .with("state_ms", millis(least.state))
        .with("commit_ms", millis(least.commit))
        .with("resume_ms", millis(least.resume))
        .with("vm_location", "SOURCE")
        .with(
            "advice",
            format_args!("use --max-downtime {enough}ms or more; a faster disk for the agents' state directories or a shorter way between the hosts lowers it"),
        )
}

/// So many threads digest memory.
pub(super) fn threads() -> usize {
    std::thread::available_parallelism()
        .map_or(1, usize::from)
        .min(8)
}
