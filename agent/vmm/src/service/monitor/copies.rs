//! Snapshots and copies of our own machine, as messages: everything but memory travels as it does
//! in a migration.

use slat_proto::{
    ApiError, Reason,
    model::{VmSpec, now},
    v1,
};

use super::CopySpec;
use crate::{
    handover::{preamble, state::VmState},
    machine::{CopyOrder, Machine, Taken},
};

/// Takes a snapshot, and says what is needed to make a VM of it.
pub(super) fn take(
    machine: &Machine,
    purpose: &str,
    may_pause: bool,
) -> Result<v1::TakeSnapshotResponse, ApiError> {
    let taken = machine.take_snapshot(purpose, may_pause)?;
    let snapshot = taken.snapshot;
    // Whoever does not hear of it never takes its lease, and it ends by itself.
    answer(machine, taken).map_err(|error| error.with("snapshot", snapshot))
}

fn answer(machine: &Machine, taken: Taken) -> Result<v1::TakeSnapshotResponse, ApiError> {
    let spec = taken.vm.spec.clone().unwrap_or_default();
    let backend = VmSpec::from_resource(&spec)?
        .backend
        .ok_or_else(|| ApiError::new(Reason::Internal, "a VM without a backend"))?;
    let cpu = machine.backend()?.cpu_facts();
    let state = VmState {
        left: taken.left,
        digest: None,
        vcpus: taken.vcpus,
        generation: taken.generation,
    };
    Ok(v1::TakeSnapshotResponse {
        snapshot: taken.snapshot,
        state: state.encode(),
        manifest: Some(v1::PrepareIncomingRequest {
            vm: Some(taken.vm),
            slots: taken.slots.iter().map(|slot| slot.to_message()).collect(),
            preamble: Some(preamble::describe(backend, cpu)),
            send_time: Some(now()),
            ..Default::default()
        }),
        pause_nanos: u64::try_from(taken.pause.as_nanos()).unwrap_or(u64::MAX),
        paused: taken.paused.unwrap_or_default(),
        ran: taken.left.run,
        working_set: taken
            .touched
            .iter()
            .map(|run| v1::WorkingSetRun {
                slot: run.slot,
                page: run.page,
                pages: run.pages,
            })
            .collect(),
    })
}

/// Makes the VM of this process.
pub(super) fn build(machine: &Machine, copy: &CopySpec) -> Result<v1::Vm, ApiError> {
    // Before anything is reserved.
    preamble::admit_here(&copy.manifest)?;
    let state = VmState::decode(&copy.state)?;
    let vm = copy.manifest.vm.as_ref();
    machine.build_copy(CopyOrder {
        vm: vm.ok_or_else(|| ApiError::bad_parameter("manifest.vm", "is missing"))?,
        slots: &copy.slots,
        vcpus: &state.vcpus,
        generation: state.generation,
        lazy: copy.lazy,
        start: copy.start,
        paging: copy.paging,
    })
}
