//! The machine over a fake backend: what each state allows, and that nothing runs what was given away.

mod handover;
mod life;
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

/// Makes the next append fail in the kernel.
fn break_journal(vm: &FakeVm) {
    let path = vm.machine.dir().journal();
    let read_only = std::fs::File::open(&path).unwrap();
    vm.machine.control().journal = Journal::over(&path, read_only).unwrap();
}

/// Whether the process is to end, and why.
fn exit(vm: &FakeVm) -> Option<Exit> {
    *vm.machine.shared.exit().borrow()
}
