//! A snapshot: memory and state of one moment, while the guest goes on.
//!
//! Everything that takes long comes before the pause: files and marks, watching memory that was
//! not watched, and the arming, in which the pager takes leave to write away from what is mapped.
//! In the pause the few pages are protected that the guest could still write to, and vCPU state is
//! read. From then on the pager keeps what the guest overwrites, until nobody has the lease.
//!
//! # Locking
//! 1. Under `control`: whether a snapshot may be taken; its files; watching begins.
//! 2. Without `control`: the arming, which may take two minutes. Whoever pauses, resumes or deletes
//!    the VM, changes its slots or migrates it does not wait for it.
//! 3. Under `control` again: everything is judged anew. A VM that migrates, ended or was handed
//!    over takes no snapshot; one that was paused or started is taken as it is now. Slots that
//!    came, went or moved make it begin anew, a few times. Then the pause.
//!
//! `arming` is held over all three, before `control`: a pager arms for one snapshot at a time, and
//! a second one waits for its turn. Nothing else takes it.
//!
//! A failure leaves the VM as it was, and the pager is told that the snapshot ended, so that
//! nothing stays armed. A pager that does not answer in the pause is given up: what it knows may be
//! wrong, and the next one begins anew.

use std::{
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use slat_paging::wire::{Answer, Ask};
use slat_proto::{
    ApiError, Reason,
    model::{Paging, SlotSpec},
    v1,
};

use super::super::{
    Control, Fence, Machine, Switchover,
    view::{State, View},
};
use super::touched::TouchedRun;
use crate::{memory::SlotMemory, pager::PagerError};

/// Snapshots of a VM at a time.
const MOST: u32 = 8;
/// A pager that the agent started is there within this.
const COMES: Duration = Duration::from_secs(5);
/// It has swept and protected all memory within this, while the guest runs.
const ARMS: Duration = Duration::from_secs(120);
/// In the pause it answers within this.
const BEGINS: Duration = Duration::from_secs(2);

/// A snapshot whose slots changed during its arming begins anew, so often in all.
const ATTEMPTS: u32 = 3;

/// What a snapshot was prepared for.
struct Before {
    uid: String,
    epoch: u64,
    /// The slot table's generation.
    slots: u64,
}

/// What came of preparing, arming and beginning a snapshot.
enum Tried {
    Taken(Box<Taken>),
    /// Slots came, went or moved meanwhile: it has to begin anew.
    SlotsChanged,
}

/// What was taken.
#[derive(Debug)]
pub(crate) struct Taken {
    /// Its number, for the pager's socket.
    pub(crate) snapshot: u64,
    /// The VM.
    pub(crate) vm: v1::Vm,
    /// Whether it ran, or ever did.
    pub(crate) left: Switchover,
    /// State of its vCPUs.
    pub(crate) vcpus: Vec<u8>,
    /// Its slots.
    pub(crate) slots: Vec<SlotSpec>,
    /// Of the slot table.
    pub(crate) generation: u64,
    /// How long the vCPUs did not run; 0 when they did not before.
    pub(crate) pause: Duration,
    /// Why they stay stopped until the lease ends.
    pub(crate) paused: Option<String>,
    /// What its guest had touched, when it is to be saved and that is known.
    pub(crate) touched: Vec<TouchedRun>,
}

impl Machine {
    /// Begins a snapshot of memory and reads the state. `purpose` says what for.
    ///
    /// # Errors
    /// NO_SUCH_VM; STALE_EPOCH; MIGRATION_IN_PROGRESS; VM_STATE, also while memory is being
    /// populated; CAPABILITY_MISSING where memory cannot be watched and not `may_pause`;
    /// LIMIT_REACHED; PAGER_UNREACHABLE; SOURCE_PAUSE; NO_MEMORY. The VM goes on as it was.
    pub(crate) fn take_snapshot(&self, purpose: &str, may_pause: bool) -> Result<Taken, ApiError> {
        let identity = self.shared.identity(&self.shared.view())?;
        if let Err(error) = self.watchable(&identity.spec) {
            if may_pause {
                return self.take_still(purpose, &error);
            }
            return Err(error.with(
                "advice",
                "pause the VM and save it, or let the save pause it for as long as it takes",
            ));
        }
        // Before the lock: it may take seconds.
        let came = self.pager.await_connected(COMES);
        came.map_err(|error| self.paged(error))?;
        let touched = match purpose.starts_with("saves/") {
            true => self.touched(),
            false => Vec::new(),
        };
        let _arming = self.arming.lock().unwrap_or_else(PoisonError::into_inner);
        let end = Instant::now() + ARMS;
        for attempt in 1.. {
            match self.try_snapshot(purpose, end)? {
                Tried::Taken(taken) => return Ok(Taken { touched, ..*taken }),
                Tried::SlotsChanged if attempt < ATTEMPTS && Instant::now() < end => {}
                Tried::SlotsChanged => break,
            }
        }
        let vm = &self.shared.vm;
        let words = format!("{vm} cannot be saved or forked: its slots change all the time");
        Err(ApiError::new(Reason::VmState, words)
            .with("vm", vm)
            .with("state", self.shared.view().state.as_str_name())
            .with(
                "advice",
                "leave its slots alone for a moment, then try again",
            ))
    }

    /// Prepares, arms and begins. See the module for what is done under which lock.
    fn try_snapshot(&self, purpose: &str, end: Instant) -> Result<Tried, ApiError> {
        let (snapshot, before) = self.prepare_snapshot(purpose)?;
        let armed = self.arm_snapshot(snapshot, end);
        let control = self.control();
        let taken = armed.and_then(|()| {
            let view = self.admit_snapshot(control.fence)?;
            if (view.uid(), view.epoch) != (before.uid, before.epoch) {
                return Err(self.shared.stale_epoch(&view));
            }
            if self.memory.table().generation() != before.slots {
                return Ok(Tried::SlotsChanged);
            }
            let taken = self.begin_snapshot(&control, snapshot, &view)?;
            Ok(Tried::Taken(Box::new(taken)))
        });
        if !matches!(taken, Ok(Tried::Taken(_))) {
            self.pager.drop_snapshot(snapshot);
            let mut watching = self.watching();
            watching.snapshot_ended(snapshot);
            let unwatch = watching.is_on() && !watching.is_wanted();
            drop(watching);
            if unwatch {
                self.end_watching();
            }
        }
        taken
    }

    /// Makes its files, and has memory watched. What it was made for is looked at again later.
    fn prepare_snapshot(&self, purpose: &str) -> Result<(u64, Before), ApiError> {
        let control = self.control();
        let view = self.admit_snapshot(control.fence)?;
        let guest = self.watchable(&self.shared.identity(&view)?.spec)?;
        let table = self.memory.table();
        let snapshot = self.new_snapshot(table.slots(), false)?;
        self.watching().snapshot_begins(snapshot, purpose);
        if !self.is_watched() {
            let mapped = view.state != State::Created || self.prefault_shown().is_some();
            if let Err(error) = self.begin_watching(guest, mapped) {
                self.pager.drop_snapshot(snapshot);
                self.watching().snapshot_ended(snapshot);
                return Err(error);
            }
        }
        let before = Before {
            uid: view.uid(),
            epoch: view.epoch,
            slots: table.generation(),
        };
        Ok((snapshot, before))
    }

    /// Has the pager take leave to write away, while the guest runs. Holds no lock of the machine
    /// but `arming`.
    fn arm_snapshot(&self, snapshot: u64, end: Instant) -> Result<(), ApiError> {
        let pager = |error| self.paged(error);
        self.pager.await_attached(COMES).map_err(pager)?;
        // Twice: memory that was just swept has nothing mapped that could be protected, and the
        // guest maps what it uses in the next moment.
        for _ in 0..2 {
            let left = end.saturating_duration_since(Instant::now());
            let armed = self.pager.ask(Ask::Arm { snapshot }, left);
            if let Answer::Armed { left, rounds } = armed.map_err(pager)? {
                tracing::debug!(snapshot, left, rounds, "a snapshot can begin");
            }
        }
        Ok(())
    }

    /// Files of a snapshot that has not begun.
    pub(super) fn new_snapshot(
        &self,
        slots: &[Arc<SlotMemory>],
        still: bool,
    ) -> Result<u64, ApiError> {
        if self.pager.shown().snapshots >= MOST {
            let words = format!("{}: {MOST} snapshots are kept", self.shared.vm);
            return Err(ApiError::new(Reason::LimitReached, words)
                .with("vm", &self.shared.vm)
                .with("limit", MOST)
                .with("advice", "wait until a save or a fork has ended"));
        }
        let made = self.pager.add_snapshot(slots, still);
        made.map_err(PagerError::io("making files for a snapshot"))
            .map_err(|error| self.paged(error))
    }

    /// Whether a snapshot may be taken now. The caller has the control lock.
    pub(super) fn admit_snapshot(&self, fence: Fence) -> Result<View, ApiError> {
        let what = "be saved or forked";
        let view = self.shared.view();
        self.shared.identity(&view)?;
        if fence != Fence::Down || view.state == State::Relinquished {
            return Err(self.shared.stale_epoch(&view));
        }
        if let Some(migration) = view.participation.migration() {
            return Err(self.shared.migrating(migration, what));
        }
        if !matches!(view.state, State::Created | State::Running | State::Paused) {
            return Err(self.shared.bad_state(&view, what));
        }
        self.refuse_held(&view, what)?;
        // Its threads make huge pages, which takes mappings away behind the pager's back.
        self.refuse_unpopulated(&view)?;
        Ok(view)
    }

    /// The pause: protects the last pages and reads the state.
    fn begin_snapshot(
        &self,
        control: &Control,
        snapshot: u64,
        view: &View,
    ) -> Result<Taken, ApiError> {
        let backend = self.built_backend()?;
        let ran = self.shared.view().state == State::Running;
        let (begun, pause) = self.while_stopped(control, || {
            let now = self.shared.view();
            if ran && now.state != State::Running {
                return Err(self.shared.bad_state(&now, "be saved or forked"));
            }
            let begun = self.pager.ask(Ask::Begin { snapshot }, BEGINS);
            if let Err(error) = begun {
                // It may have begun for the pager.
                self.pager.give_up_pager();
                return Err(self.paged(error));
            }
            Ok(backend.save_state()?)
        })?;
        let vcpus = begun?;
        self.pager.snapshot_begun(snapshot);
        let table = self.memory.table();
        Ok(Taken {
            snapshot,
            vm: self.shown()?,
            left: Switchover {
                run: ran,
                never_ran: view.state == State::Created,
            },
            vcpus,
            slots: table.slots().iter().map(|slot| slot.spec()).collect(),
            generation: table.generation(),
            pause,
            paused: None,
            touched: Vec::new(),
        })
    }

    /// Whether its spec asks for a pager.
    pub(in crate::machine) fn is_paged_by_agent(&self) -> bool {
        let identity = self.shared.view().identity;
        identity.is_some_and(|identity| identity.spec.paging == Paging::Agent)
    }
}
