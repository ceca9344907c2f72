//! The machine over a fake backend: what each state allows, and that nothing runs what was given
//! away.

mod handover;
mod life;
mod paging;
mod prefault;
mod real;
mod slots;

use slat_proto::{ApiError, Reason, model::MigrationName, v1};
use slat_record::journal::Entry;

use super::*;
use crate::fake::{self, FakeVm};

fn migration() -> MigrationName {
    MigrationName::parse("m1").unwrap()
}

fn other() -> MigrationName {
    MigrationName::parse("m2").unwrap()
}

fn state(vm: &FakeVm) -> v1::vm::State {
    vm.machine.snapshot().expect("there is a VM").state()
}

fn reason<T: std::fmt::Debug>(result: Result<T, ApiError>) -> Reason {
    result.unwrap_err().reason
}

fn ownership(vm: &FakeVm) -> Ownership {
    Journal::read(&vm.machine.dir().journal())
        .unwrap()
        .unwrap()
        .ownership
}

/// Makes the journal's appends fail, or work again.
fn break_journal(vm: &FakeVm, broken: bool) {
    vm.disk.set_broken(broken);
}

/// Everything up to READY.
fn prepare(machine: &Machine, vcpus: &[u8]) -> Result<(), ApiError> {
    machine.load(&migration(), vcpus)?;
    machine.prepare(&migration())
}

/// Everything after COMMIT.
fn own(machine: &Machine, run: bool, never_ran: bool) -> Result<v1::Vm, ApiError> {
    let left = Switchover { run, never_ran };
    machine.own(&migration(), left)?;
    machine.run_owned(&migration(), left)
}

/// Whether the process is to end, and why.
fn exit(vm: &FakeVm) -> Option<Exit> {
    *vm.machine.shared.exit().borrow()
}
