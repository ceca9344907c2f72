//! Whose record of a uid counts. Pure.
//!
//! A VM that migrates is on two hosts, and a host that was silent comes back with what it knew. Of
//! several records of one uid that one counts which, in this order,
//!
//! 1. may run at all: a side (INCOMING, RELINQUISHED) never hides one that may;
//! 2. has the highest epoch;
//! 3. is RUNNING: nothing else said about that epoch outranks it;
//! 4. lives, if only by its journal (UNRESPONSIVE):
//!    LOST never outranks a record of the same epoch that lives;
//! 5. is of a host that answers.
//!
//! Between equals the first host by name wins, so that the order of reports does not matter.

use slat_proto::v1::{self, vm::State};

/// One host's record of a VM.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen<'a> {
    pub(super) vm: &'a v1::Vm,
    /// Its host answers.
    pub(super) ready: bool,
}

/// Whether a record is a VM's rather than a side's of a migration.
pub(super) fn may_run(vm: &v1::Vm) -> bool {
    !matches!(vm.state(), State::Incoming | State::Relinquished)
}

/// Whether a VM is there and is not known to have lost its memory.
pub(super) fn lives(vm: &v1::Vm) -> bool {
    may_run(vm) && vm.state() != State::Lost
}

impl Seen<'_> {
    fn key(&self) -> (bool, u64, bool, bool, bool) {
        (
            may_run(self.vm),
            self.vm.epoch,
            self.vm.state() == State::Running,
            lives(self.vm),
            self.ready,
        )
    }

    /// Whether this record counts rather than `other`, which is of the same uid.
    pub(super) fn outranks(&self, other: &Self) -> bool {
        let (own, its) = (self.key(), other.key());
        own > its || (own == its && self.vm.host < other.vm.host)
    }
}
