//! Memory that is populated before anybody uses it.
//!
//! Where a VM asks for it, threads begin when the VM is made, and the VM cannot start before they
//! are done ([`Machine::refuse_unpopulated`]). Meanwhile it is there, CREATED, and says how far
//! they are; deleting it stops them. What they could not have is told when the VM is to start,
//! which tries again. A migration brings a VM to memory that is all there, so at its target nothing
//! is left to do.
//!
//! Reserved pages are populated whether or not that was asked for, before guest, backend or any of
//! our threads touches them: a reservation is neither a NUMA node's nor bound by limits of a
//! cgroup, and a touch that finds no page ends the process.
//!
//! *Locking*: `prefault` is a leaf mutex. What runs is dropped outside of it, which waits for one
//! chunk of each thread; threads that are done are joined under it.

use std::{
    io,
    sync::{Arc, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use slat_proto::{ApiError, Reason, model::PAGE_SIZE, v1};

use super::{
    Machine,
    prefault::Prefault,
    view::{State, View},
};
use crate::memory::{Mode, Populate, SlotMemory, no_huge_pages};

/// Whoever starts a VM waits so long for its memory; small ones are done by then.
const START_WAITS: Duration = Duration::from_secs(1);
/// New slots and reserved pages are waited for so long, below what callers wait for an answer.
const PATIENCE: Duration = Duration::from_secs(240);

impl Machine {
    fn prefault(&self) -> MutexGuard<'_, Prefault> {
        let mut prefault = self.prefault.lock().unwrap_or_else(PoisonError::into_inner);
        prefault.settle();
        prefault
    }

    /// Puts another in its place. What ran is ended when the lock is free again: that waits for
    /// threads.
    fn replace_prefault(&self, new: Prefault) {
        let old = std::mem::replace(&mut *self.prefault(), new);
        drop(old);
    }

    /// How far it is, when it was asked for.
    pub(super) fn prefault_shown(&self) -> Option<v1::Prefault> {
        self.prefault().shown()
    }

    /// Starts on all memory of the VM.
    pub(super) fn begin_prefault(&self) {
        let table = self.memory.table();
        let total = table.pages() * PAGE_SIZE;
        self.replace_prefault(match Populate::start(&table) {
            Ok(populate) => Prefault::Running { populate, total },
            Err(error) => Prefault::Failed {
                error: format!("no thread could be made: {error}"),
                populated: 0,
                total,
            },
        });
    }

    /// It is all there, or will be before the VM is here.
    pub(super) fn prefault_done(&self) {
        let total = self.memory.table().pages() * PAGE_SIZE;
        self.replace_prefault(Prefault::Done { total });
    }

    /// Gives it up, with the VM.
    pub(super) fn end_prefault(&self) {
        self.replace_prefault(Prefault::Unasked);
    }

    /// Waits a moment for memory that is being populated; goes on with what failed before. The
    /// control lock is not held.
    pub(super) fn await_prefault(&self) {
        if self.shared.view().state != State::Created {
            return;
        }
        let failed = matches!(*self.prefault(), Prefault::Failed { .. });
        if failed {
            self.begin_prefault();
        }
        let begun = Instant::now();
        while matches!(*self.prefault(), Prefault::Running { .. }) && begun.elapsed() < START_WAITS
        {
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Refuses to start a VM whose memory is not there.
    ///
    /// # Errors
    /// VM_STATE while threads are at it; NO_MEMORY.
    pub(super) fn refuse_unpopulated(&self, view: &View) -> Result<(), ApiError> {
        let Some(shown) = self.prefault_shown().filter(|shown| !shown.done) else {
            return Ok(());
        };
        let (there, all) = (shown.populated_bytes, shown.total_bytes);
        let error = if shown.error.is_empty() {
            self.shared
                .bad_state(
                    view,
                    &format!("start yet: {there} of {all} bytes are populated"),
                )
                .with("advice", "start it when Vm.prefault is done")
        } else {
            let vm = &self.shared.vm;
            let words = format!(
                "{vm}: {there} of {all} bytes could be populated, then: {}",
                shown.error
            );
            let advice = "free memory on the host, then start it again, or delete it";
            ApiError::new(Reason::NoMemory, words)
                .with("vm", vm)
                .with("advice", advice)
        };
        Err(error
            .with("populated_bytes", there)
            .with("total_bytes", all))
    }

    /// Populates slots before anybody sees them, and waits for it.
    ///
    /// # Errors
    /// NO_HUGE_PAGES for reserved pages, NO_MEMORY; COMPLETION_TIMEOUT when it takes longer than
    /// callers wait; INTERNAL when threads cannot be made.
    pub(super) fn populate_now(
        &self,
        slots: &[Arc<SlotMemory>],
        mode: Mode,
    ) -> Result<(), ApiError> {
        if slots.is_empty() {
            return Ok(());
        }
        let populate = Populate::of(slots.to_vec()).map_err(no_threads)?;
        let bytes = slots.iter().map(|slot| slot.spec().bytes()).sum();
        populate.wait(PATIENCE).map_err(|error| {
            if error.kind() == io::ErrorKind::TimedOut {
                return ApiError::new(
                    Reason::CompletionTimeout,
                    format!(
                        "{} of {bytes} bytes were populated in {} s",
                        populate.bytes(),
                        PATIENCE.as_secs()
                    ),
                )
                .with("needed_bytes", bytes)
                .with(
                    "advice",
                    "take less memory at a time, or wait until the host is less busy",
                );
            }
            let words = format!("{bytes} bytes could not be populated: {error}");
            match no_huge_pages(mode.backing, bytes) {
                Some(short) => ApiError {
                    message: format!("{words}; {}", short.message),
                    ..short
                },
                None => ApiError::new(Reason::NoMemory, words).with("needed_bytes", bytes),
            }
        })
    }
}

fn no_threads(error: io::Error) -> ApiError {
    ApiError::new(
        Reason::Internal,
        format!("memory cannot be populated: {error}"),
    )
    .because_of(&error)
}
