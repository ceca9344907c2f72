//! How fast a VM dirties its memory.
//!
//! By the dirty log: a reader of its own looks ten times in the time that was asked for, at least
//! every 100 ms, so that no other reader misses anything or waits for it. By a sample: pages are
//! hashed at the beginning, in the middle and at the end, and nothing is logged.
//!
//! # The working set
//! Estimated by capture and recapture: of the pages found written in the first half, the share that
//! is found again in the second tells what share of all those that the guest keeps writing one half
//! finds (Chapman's estimator). It supposes that the guest writes the pages of its working set
//! alike; where it prefers some, the estimate is too low. A guest that wrote nothing twice has
//! none.

use std::time::{Duration, Instant};

use slat_proto::{
    ApiError, Reason,
    model::{DirtyEngine, DirtyRateOrder, PAGE_SIZE, proto_duration},
    v1::{self, measure_dirty_rate_request::Mode},
};

use super::Machine;
use crate::memory::Sample;

/// Looks at the log in the whole time, unless they would be further apart than this.
const LOOKS: u32 = 10;
const APART: Duration = Duration::from_millis(100);

/// Waits for so long, or less when nobody wants the answer any more: then true.
type Pause<'a> = &'a dyn Fn(Duration) -> bool;

impl Machine {
    /// Measures for as long as ordered, or until `pause` says that nobody waits; then the answer
    /// means nothing.
    ///
    /// # Errors
    /// NO_SUCH_VM; VM_NOT_RUNNING, also when the VM is not running in the end; CAPABILITY_MISSING
    /// for an engine that the VM has not; LIMIT_REACHED; the dirty log's.
    pub(crate) fn measure_dirty_rate(
        &self,
        order: DirtyRateOrder,
        pause: Pause<'_>,
    ) -> Result<v1::MeasureDirtyRateResponse, ApiError> {
        self.check_dirty_readable()?;
        self.check_writes()?;
        let engine = self.built_backend()?.dirty_engine().engine;
        let own = match engine {
            DirtyEngine::Bitmap => Mode::Bitmap,
            DirtyEngine::Ring => Mode::Ring,
        };
        let mode = match order.mode {
            Mode::Unspecified => own,
            mode => mode,
        };
        let measured = match mode {
            Mode::Sampling => {
                // Pages that come meanwhile would look like written ones.
                self.refuse_unloaded("be sampled")?;
                self.by_sample(order, pause)
            }
            mode if mode == own => self.by_log(mode, order.duration, pause)?,
            Mode::Ring => return Err(self.lacks(v1::Capability::DirtyRing, engine)),
            _ => return Err(self.lacks(v1::Capability::DirtyBitmap, engine)),
        };
        self.check_dirty_readable()?;
        self.check_writes()?;
        Ok(measured)
    }

    /// VM_NOT_RUNNING unless vCPUs run.
    fn check_writes(&self) -> Result<(), ApiError> {
        if self.runs() {
            return Ok(());
        }
        let state = self.shared.view().state.as_str_name();
        Err(ApiError::new(
            Reason::VmNotRunning,
            format!("{} is {state}: it writes nothing", self.shared.vm),
        )
        .with("vm", &self.shared.vm)
        .with("state", state)
        .with("advice", "start or resume it, and measure while it runs"))
    }

    fn lacks(&self, capability: v1::Capability, engine: DirtyEngine) -> ApiError {
        ApiError::capability_missing(&self.shared.vm, capability)
            .with("dirty_engine", engine)
            .with(
                "advice",
                format_args!("measure with mode {engine} or sampling"),
            )
    }

    fn by_log(
        &self,
        mode: Mode,
        asked: Duration,
        pause: Pause<'_>,
    ) -> Result<v1::MeasureDirtyRateResponse, ApiError> {
        let mut measurement = self.dirty().measure()?;
        let begun = Instant::now();
        let apart = (asked / LOOKS).min(APART);
        let (mut found, mut looks) = (0_u64, 0);
        loop {
            let left = asked.saturating_sub(begun.elapsed());
            if left.is_zero() || pause(left.min(apart)) {
                break;
            }
            let second_half = begun.elapsed() > asked / 2 + apart / 2;
            found += measurement.look(second_half)?;
            looks += 1;
        }
        let took = begun.elapsed();
        let (first, second, either) = measurement.distinct();
        let both = (first + second).saturating_sub(either);
        let pages = self.memory.table().pages();
        let rate = found as f64 / took.as_secs_f64().max(1e-9);
        Ok(v1::MeasureDirtyRateResponse {
            mode: mode.into(),
            duration: Some(proto_duration(took)),
            distinct_pages: either,
            pages_per_second: rate,
            bytes_per_second: rate * PAGE_SIZE as f64,
            working_set_pages: working_set(first, second, both)
                .map(|set| (set as u64).clamp(either, pages.max(either))),
            looks,
            ..Default::default()
        })
    }

    fn by_sample(&self, order: DirtyRateOrder, pause: Pause<'_>) -> v1::MeasureDirtyRateResponse {
        let table = self.memory.table();
        let mut sample = Sample::choose(&table, order.sample_pages_per_gib);
        let begun = Instant::now();
        sample.look();
        let mut looks = 1;
        for part in 1..=2 {
            let until = order.duration * part / 2;
            if pause(until.saturating_sub(begun.elapsed())) {
                break;
            }
            sample.look();
            looks += 1;
        }
        let took = begun.elapsed();
        let changed = sample.changed();
        let distinct = changed.either as f64 * changed.scale;
        let rate = distinct / took.as_secs_f64().max(1e-9);
        v1::MeasureDirtyRateResponse {
            mode: Mode::Sampling.into(),
            duration: Some(proto_duration(took)),
            distinct_pages: distinct as u64,
            pages_per_second: rate,
            bytes_per_second: rate * PAGE_SIZE as f64,
            working_set_pages: working_set(changed.first, changed.second, changed.both)
                .map(|set| ((set * changed.scale) as u64).clamp(distinct as u64, table.pages())),
            looks,
            sampled_pages: sample.len(),
            ..Default::default()
        }
    }
}

/// How many pages there are to be found, when one look found `first` of them, another `second`, and
/// `both` were found twice. `None` when none was.
fn working_set(first: u64, second: u64, both: u64) -> Option<f64> {
    let plus_one = |count: u64| count as f64 + 1.0;
    (both > 0).then(|| plus_one(first) * plus_one(second) / plus_one(both) - 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_found_again_tells_how_much_there_is() {
        assert_eq!(working_set(100, 100, 0), None);
        // Everything again: that is all there is.
        assert_eq!(working_set(1000, 1000, 1000), Some(1000.0));
        // A tenth again: ten times as much.
        let much = working_set(1000, 1000, 100).unwrap();
        assert!((much - 10_000.0).abs() < 150.0, "{much}");
    }
}
