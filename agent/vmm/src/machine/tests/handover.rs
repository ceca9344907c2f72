//! Both sides of a handover, and that a VM that was given away never runs again.

use slat_proto::model::SlotSpec;

use super::*;
use crate::backend::GuestEvent;

fn running() -> FakeVm {
    let vm = fake::created();
    vm.machine.start().unwrap();
    vm
}

/// Everything that could make vCPUs run.
fn nothing_runs_it(vm: &FakeVm) {
    let runs = vm.backend.state().runs;
    let machine = &vm.machine;
    for attempt in [machine.start(), machine.resume(), machine.pause()] {
        assert_eq!(reason(attempt), Reason::StaleEpoch);
    }
    assert_eq!(
        reason(machine.begin_outgoing(&other(), 1)),
        Reason::StaleEpoch
    );
    assert_eq!(
        reason(machine.end_outgoing(&migration())),
        Reason::PastPointOfNoReturn
    );
    assert_eq!(reason(machine.delete()), Reason::StaleEpoch);
    assert_eq!(reason(machine.update_slots(&[], 0)), Reason::StaleEpoch);
    assert_eq!(reason(machine.invalidate(None)), Reason::StaleEpoch);
    assert_eq!(reason(machine.check_dirty_readable()), Reason::StaleEpoch);
    assert_eq!(reason(machine.stop()), Reason::PastPointOfNoReturn);
    assert!(machine.enter_switchover(&migration()).is_err());
    assert!(own(machine, true, false).is_err());
    assert!(machine.backend().unwrap().run().is_err());
    assert_eq!(vm.backend.state().runs, runs);
    assert!(!vm.backend.state().running);
    assert_eq!(state(vm), v1::vm::State::Relinquished);
}

#[test]
fn a_source_gives_its_vm_away() {
    let vm = running();
    let engaged = vm.machine.begin_outgoing(&migration(), 1).unwrap();
    assert_eq!(engaged.migration, "migrations/m1");
    let refused = vm.machine.begin_outgoing(&other(), 1).unwrap_err();
    assert_eq!(refused.reason, Reason::MigrationInProgress);
    assert_eq!(refused.metadata["migration"], "migrations/m1");
    assert_eq!(reason(vm.machine.delete()), Reason::MigrationInProgress);
    assert_eq!(
        reason(vm.machine.update_slots(&[], 0)),
        Reason::MigrationInProgress
    );
    assert_eq!(
        reason(vm.machine.enter_switchover(&other())),
        Reason::NoSuchMigration
    );
    assert_eq!(
        refusal(vm.machine.relinquish(&migration())),
        Reason::VmState,
        "not before the switchover"
    );

    assert!(vm.machine.enter_switchover(&migration()).unwrap().run);
    assert_eq!(state(&vm), v1::vm::State::Paused);
    for refused in [vm.machine.start(), vm.machine.pause(), vm.machine.resume()] {
        assert_eq!(reason(refused), Reason::MigrationInProgress);
    }
    assert_eq!(
        refusal(vm.machine.relinquish(&other())),
        Reason::NoSuchMigration
    );
    vm.machine.relinquish(&migration()).unwrap();
    assert_eq!(
        ownership(&vm),
        Ownership::Relinquished {
            migration: "m1".into(),
            epoch: 1
        }
    );
    nothing_runs_it(&vm);
    vm.machine.digest().expect("the frozen memory can be read");
    vm.machine.release().unwrap();
    assert_eq!(ownership(&vm), Ownership::Ended);
    assert_eq!(exit(&vm), Some(Exit::Released));
}

/// In the switchover, with a disk that is about to fail.
fn about_to_relinquish() -> FakeVm {
    let vm = running();
    vm.machine.begin_outgoing(&migration(), 1).unwrap();
    vm.machine.enter_switchover(&migration()).unwrap();
    break_journal(&vm, true);
    vm
}

fn refusal(result: Result<(), RelinquishError>) -> Reason {
    match result {
        Err(RelinquishError::Refused(error)) => error.reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn while_relinquished_may_be_durable_nothing_runs_the_vm() {
    let vm = about_to_relinquish();
    let failed = vm.machine.relinquish(&migration());
    assert!(matches!(failed, Err(RelinquishError::Unknown(_))));
    let seen = vm.machine.snapshot().unwrap();
    assert!(
        seen.state_message.contains("may or may not"),
        "{}",
        seen.state_message
    );
    assert_eq!(
        reason(vm.machine.end_outgoing(&migration())),
        Reason::PastPointOfNoReturn
    );
    assert_eq!(reason(vm.machine.resume()), Reason::MigrationInProgress);
    assert_eq!(
        reason(vm.machine.settle_relinquished(&migration())),
        Reason::Journal
    );
    assert_eq!(vm.backend.state().runs, 1);
}

#[test]
fn a_relinquish_that_never_reached_the_disk_leaves_the_vm_with_its_source() {
    let vm = about_to_relinquish();
    vm.machine.relinquish(&migration()).unwrap_err();
    break_journal(&vm, false);
    assert!(!vm.machine.settle_relinquished(&migration()).unwrap());
    assert_eq!(ownership(&vm), Ownership::Owner { epoch: 1 });
    vm.machine.end_outgoing(&migration()).unwrap();
    assert_eq!(state(&vm), v1::vm::State::Running);
}

#[test]
fn while_relinquished_may_be_durable_the_process_does_not_end() {
    let vm = about_to_relinquish();
    vm.disk.set_late();
    vm.machine.relinquish(&migration()).unwrap_err();
    break_journal(&vm, false);
    // SIGTERM. ENDED in the journal, and Abort to a destination that the journal tells to commit,
    // would contradict each other.
    assert_eq!(reason(vm.machine.stop()), Reason::PastPointOfNoReturn);
    assert_eq!(reason(vm.machine.delete()), Reason::MigrationInProgress);
    assert!(vm.machine.settle_relinquished(&migration()).unwrap());
    nothing_runs_it(&vm);
}

#[test]
fn a_relinquish_that_did_reach_the_disk_counts() {
    let vm = about_to_relinquish();
    vm.disk.set_late();
    vm.machine.relinquish(&migration()).unwrap_err();
    break_journal(&vm, false);
    assert!(vm.machine.settle_relinquished(&migration()).unwrap());
    nothing_runs_it(&vm);
    assert_eq!(
        refusal(vm.machine.relinquish(&migration())),
        Reason::StaleEpoch
    );
    vm.machine.release().unwrap();
    assert_eq!(ownership(&vm), Ownership::Ended);
}

#[test]
fn a_failed_migration_leaves_the_vm_as_the_user_wants_it() {
    // Running, not yet in the switchover.
    let vm = running();
    vm.machine.begin_outgoing(&migration(), 1).unwrap();
    assert_eq!(
        reason(vm.machine.end_outgoing(&other())),
        Reason::NoSuchMigration
    );
    let after = vm.machine.end_outgoing(&migration()).unwrap();
    assert_eq!(
        (after.state(), after.migration.as_str()),
        (v1::vm::State::Running, "")
    );
    assert_eq!(vm.backend.state().runs, 1, "it never stopped");

    // In the switchover.
    vm.machine.begin_outgoing(&migration(), 1).unwrap();
    vm.machine.enter_switchover(&migration()).unwrap();
    let after = vm.machine.end_outgoing(&migration()).unwrap();
    assert_eq!(after.state(), v1::vm::State::Running);
    assert!(vm.backend.state().running);

    // Paused by the user during precopy.
    vm.machine.begin_outgoing(&migration(), 1).unwrap();
    vm.machine.pause().unwrap();
    assert!(!vm.machine.enter_switchover(&migration()).unwrap().run);
    let after = vm.machine.end_outgoing(&migration()).unwrap();
    assert_eq!(after.state(), v1::vm::State::Paused);
    assert!(!vm.backend.state().running);

    // Resumed by the user during precopy, and never run at all.
    vm.machine.begin_outgoing(&migration(), 1).unwrap();
    vm.machine.resume().unwrap();
    assert!(vm.machine.enter_switchover(&migration()).unwrap().run);
    vm.machine.end_outgoing(&migration()).unwrap();
    let vm = fake::created();
    vm.machine.begin_outgoing(&migration(), 1).unwrap();
    assert!(!vm.machine.enter_switchover(&migration()).unwrap().run);
    let after = vm.machine.end_outgoing(&migration()).unwrap();
    assert_eq!(after.state(), v1::vm::State::Created);
    assert_eq!(ownership(&vm), Ownership::Owner { epoch: 1 });
}

#[test]
fn what_cannot_be_migrated_is_refused() {
    let vm = fake::empty();
    assert_eq!(
        reason(vm.machine.begin_outgoing(&migration(), 1)),
        Reason::NoSuchVm
    );
    let vm = running();
    let stale = vm.machine.begin_outgoing(&migration(), 2).unwrap_err();
    assert_eq!(stale.reason, Reason::StaleEpoch);
    assert_eq!(stale.metadata["epoch"], "1");
    vm.backend.state().lacks = vec![v1::Capability::VcpuState];
    let blocked = vm.machine.begin_outgoing(&migration(), 1).unwrap_err();
    assert_eq!(blocked.reason, Reason::MigrationBlocked);
    assert_eq!(blocked.metadata["blocked_reasons"], "CAPABILITY_VCPU_STATE");
    assert_eq!(reason(vm.machine.release()), Reason::VmState);
}

#[test]
fn a_guest_that_ends_during_migration_is_not_given_away() {
    let vm = running();
    vm.machine.begin_outgoing(&migration(), 1).unwrap();
    vm.backend.guest_event(GuestEvent::Stopped);
    let error = vm.machine.enter_switchover(&migration()).unwrap_err();
    assert_eq!(error.reason, Reason::VmStoppedDuringMigration);
    let after = vm.machine.end_outgoing(&migration()).unwrap();
    assert_eq!(after.state(), v1::vm::State::Stopped);

    // The news comes when the vCPUs are stopped already.
    let vm = running();
    vm.machine.begin_outgoing(&migration(), 1).unwrap();
    vm.machine.enter_switchover(&migration()).unwrap();
    vm.backend.guest_event(GuestEvent::Failed("late".into()));
    assert_eq!(
        refusal(vm.machine.relinquish(&migration())),
        Reason::VmStoppedDuringMigration
    );
    assert_eq!(ownership(&vm), Ownership::Owner { epoch: 1 });
    let after = vm.machine.end_outgoing(&migration()).unwrap();
    assert_eq!(after.state(), v1::vm::State::Failed);
    assert!(!vm.backend.state().running);
}

#[test]
fn vcpus_that_do_not_stop_undo_the_switchover() {
    let vm = running();
    vm.machine.begin_outgoing(&migration(), 1).unwrap();
    vm.backend.state().fail.push("pause");
    assert_eq!(
        reason(vm.machine.enter_switchover(&migration())),
        Reason::SourcePause
    );
    assert_eq!(state(&vm), v1::vm::State::Running);
    vm.machine.pause().expect("users may act again");
    vm.machine.end_outgoing(&migration()).unwrap();
}

fn source() -> (v1::Vm, Vec<SlotSpec>) {
    let vm = running();
    let shown = vm.machine.snapshot().unwrap();
    let table = vm.machine.memory().table();
    (
        shown,
        table.slots().iter().map(|slot| slot.spec()).collect(),
    )
}

fn receiving() -> FakeVm {
    let (source, slots) = source();
    let vm = fake::empty();
    vm.machine
        .begin_incoming(&migration(), &source, &slots)
        .unwrap();
    vm
}

#[test]
fn a_destination_without_such_slots_refuses_by_name() {
    let (source, slots) = source();
    let rom = SlotSpec::new(3, 0x10_0000, 1, true).unwrap();
    let slots = [slots, vec![rom]].concat();
    let vm = fake::empty();
    vm.backend.state().lacks = vec![v1::Capability::ReadOnlySlots];
    let refused = vm.machine.begin_incoming(&migration(), &source, &slots);
    assert_eq!(reason(refused), Reason::CapabilityMissing);
    let vm = fake::empty();
    vm.backend.state().most_slots = 3;
    let error = vm.machine.begin_incoming(&migration(), &source, &slots);
    let error = error.unwrap_err();
    assert_eq!(error.reason, Reason::LimitReached);
    assert_eq!(error.metadata["limit"], "3");
    assert!(vm.machine.snapshot().is_none(), "nothing is there");
}

#[test]
fn a_destination_takes_the_vm_over() {
    let (source, slots) = source();
    let vm = fake::empty();
    vm.machine
        .begin_incoming(&migration(), &source, &slots)
        .unwrap();
    let seen = vm.machine.snapshot().unwrap();
    assert_eq!(seen.state(), v1::vm::State::Incoming);
    assert_eq!((seen.uid.as_str(), seen.epoch), (source.uid.as_str(), 1));
    assert_eq!(seen.create_time, source.create_time);
    assert_eq!(seen.guest_counters, None);
    let mut first = [1; 10];
    assert!(vm.machine.memory().table().read(0, &mut first));
    assert_eq!(first, [0; 10], "no guest was installed");
    for refused in [vm.machine.start(), vm.machine.pause(), vm.machine.resume()] {
        assert_eq!(reason(refused), Reason::VmState);
    }
    assert_eq!(reason(vm.machine.delete()), Reason::MigrationInProgress);
    assert_eq!(reason(vm.machine.check_dirty_readable()), Reason::VmState);
    vm.machine
        .digest()
        .expect("for the comparison before the commit");
    assert!(own(&vm.machine, true, false).is_err(), "not prepared");
    assert_eq!(vm.backend.state().runs, 0);

    prepare(&vm.machine, b"fake vCPUs").unwrap();
    assert_eq!(reason(prepare(&vm.machine, b"fake vCPUs")), Reason::VmState);
    assert_eq!(reason(vm.machine.stop()), Reason::PastPointOfNoReturn);
    assert_eq!(
        reason(vm.machine.own(
            &other(),
            Switchover {
                run: true,
                never_ran: false
            }
        )),
        Reason::NoSuchMigration
    );
    let owned = own(&vm.machine, true, false).unwrap();
    assert_eq!(owned.state(), v1::vm::State::Running);
    assert_eq!((owned.epoch, owned.migration.as_str()), (2, ""));
    assert_eq!(ownership(&vm), Ownership::Owner { epoch: 2 });
    assert_eq!(
        reason(vm.machine.abort_incoming(&migration())),
        Reason::NoSuchMigration
    );
    assert_eq!(state(&vm), v1::vm::State::Running);
    vm.machine.pause().unwrap();
    vm.machine
        .begin_outgoing(&other(), 2)
        .expect("and back again");
}

#[test]
fn a_vm_arrives_paused_or_unrun_as_it_left() {
    for (left, never_ran, arrives) in [
        (v1::vm::State::Paused, false, v1::vm::State::Paused),
        (v1::vm::State::Created, true, v1::vm::State::Created),
        // Started and paused while it was copied.
        (v1::vm::State::Created, false, v1::vm::State::Paused),
    ] {
        let (mut source, slots) = source();
        source.set_state(left);
        let vm = fake::empty();
        vm.machine
            .begin_incoming(&migration(), &source, &slots)
            .unwrap();
        prepare(&vm.machine, b"fake vCPUs").unwrap();
        assert_eq!(own(&vm.machine, false, never_ran).unwrap().state(), arrives);
        assert_eq!(vm.backend.state().runs, 0);
        if arrives == v1::vm::State::Paused {
            vm.machine.resume().unwrap();
        }
    }
}

#[test]
fn a_vm_started_and_paused_while_it_is_copied_has_run() {
    for (start, never_ran) in [(false, true), (true, false)] {
        let vm = fake::created();
        vm.machine.begin_outgoing(&migration(), 1).unwrap();
        if start {
            vm.machine.start().unwrap();
            vm.machine.pause().unwrap();
        }
        let found = vm.machine.enter_switchover(&migration()).unwrap();
        assert_eq!(
            found,
            Switchover {
                run: false,
                never_ran
            }
        );
    }
}

#[test]
fn a_digest_does_not_slip_into_the_switchover() {
    let vm = running();
    vm.machine.begin_outgoing(&migration(), 1).unwrap();
    vm.machine.pause().unwrap();
    vm.machine.digest().expect("precopy does not mind");
    vm.machine.enter_switchover(&migration()).unwrap();
    assert_eq!(reason(vm.machine.digest()), Reason::MigrationInProgress);
    vm.machine.end_outgoing(&migration()).unwrap();
    vm.machine.digest().unwrap();
}

#[test]
fn a_vm_the_host_cannot_hold_is_not_received() {
    let (source, mut slots) = source();
    // Mapped without a word: only the pages would find out.
    slots.push(SlotSpec::new(7, 1 << 24, 1 << 30, false).unwrap());
    let vm = fake::empty();
    let error = vm
        .machine
        .begin_incoming(&migration(), &source, &slots)
        .unwrap_err();
    assert_eq!(error.reason, Reason::DstNoMemory);
    for key in ["needed_bytes", "free_bytes", "vm", "migration"] {
        assert!(error.metadata.contains_key(key), "{key}: {error:?}");
    }
    assert_eq!(vm.machine.snapshot(), None);
}

#[test]
fn what_is_received_goes_first_when_memory_runs_out() {
    let vm = fake::empty();
    let path = vm.machine.parts.oom_score.clone().unwrap();
    let score = || std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, "-100\n").unwrap();
    let (source, slots) = source();
    vm.machine
        .begin_incoming(&migration(), &source, &slots)
        .unwrap();
    assert_eq!(score(), "500");
    prepare(&vm.machine, b"fake vCPUs").unwrap();
    assert_eq!(score(), "500");
    own(&vm.machine, true, false).unwrap();
    assert_eq!(score(), "-100");

    let vm = fake::empty();
    vm.machine
        .begin_incoming(&migration(), &source, &slots)
        .expect("a score that cannot be raised stops nothing");
}

#[test]
fn ownership_that_could_not_be_journalled_is_tried_again_before_anything_runs() {
    let vm = receiving();
    prepare(&vm.machine, b"fake vCPUs").unwrap();
    break_journal(&vm, true);
    assert_eq!(reason(own(&vm.machine, true, false)), Reason::Journal);
    break_journal(&vm, false);
    assert_eq!(vm.backend.state().runs, 0);
    assert_eq!(state(&vm), v1::vm::State::Incoming);
    let owned = own(&vm.machine, true, false).unwrap();
    assert_eq!((owned.state(), owned.epoch), (v1::vm::State::Running, 2));
    assert_eq!(ownership(&vm), Ownership::Owner { epoch: 2 });
}

#[test]
fn an_owner_whose_vcpus_do_not_run_can_be_resumed() {
    let vm = receiving();
    prepare(&vm.machine, b"fake vCPUs").unwrap();
    vm.backend.state().fail.push("run");
    let error = own(&vm.machine, true, false).unwrap_err();
    assert_eq!(error.metadata["vm_location"], "DESTINATION");
    assert_eq!(state(&vm), v1::vm::State::Paused);
    vm.machine.resume().unwrap();
}

#[test]
fn a_destination_that_is_given_up_owns_nothing() {
    let vm = receiving();
    let bad = prepare(&vm.machine, b"other vCPUs");
    assert_eq!(reason(bad), Reason::StateVersionUnsupported);
    vm.backend.state().fail.push("load_state");
    let bad = prepare(&vm.machine, b"fake vCPUs");
    assert_eq!(reason(bad), Reason::StateLoad);
    assert_eq!(
        reason(vm.machine.abort_incoming(&other())),
        Reason::NoSuchMigration
    );
    vm.machine.abort_incoming(&migration()).unwrap();
    vm.machine.abort_incoming(&migration()).expect("idempotent");
    assert_eq!(state(&vm), v1::vm::State::Failed);
    assert_eq!(exit(&vm), Some(Exit::Aborted));
    assert!(own(&vm.machine, true, false).is_err());
    assert!(vm.machine.resume().is_err());
    assert_eq!(vm.backend.state().runs, 0);
    assert_eq!(
        ownership(&vm),
        Ownership::Aborted {
            migration: "m1".into()
        }
    );

    let vm = receiving();
    vm.machine.stop().expect("SIGTERM before PREPARED");
    assert_eq!(exit(&vm), Some(Exit::Aborted));
}

#[test]
fn what_the_source_says_is_checked() {
    let (good, slots) = source();
    let try_with = |change: &dyn Fn(&mut v1::Vm, &mut Vec<SlotSpec>)| {
        let (mut vm, mut slots) = (good.clone(), slots.clone());
        change(&mut vm, &mut slots);
        let target = fake::empty();
        let error = target
            .machine
            .begin_incoming(&migration(), &vm, &slots)
            .unwrap_err();
        assert_eq!(target.machine.snapshot(), None);
        assert_eq!(
            Journal::read(&target.machine.dir().journal()).unwrap(),
            None
        );
        error.reason
    };
    let backend = |vm: &mut v1::Vm, backend: v1::Backend| {
        let spec = vm.spec.as_mut().unwrap();
        spec.set_backend(backend);
        spec.set_format(v1::Format::Unspecified);
    };
    let extra = |base| SlotSpec::new(7, base, 4, false).unwrap();
    assert_eq!(
        try_with(&|vm, _| vm.name = "vms/other".into()),
        Reason::BadParameter
    );
    assert_eq!(try_with(&|vm, _| vm.uid.clear()), Reason::BadParameter);
    assert_eq!(try_with(&|vm, _| vm.epoch = 0), Reason::BadParameter);
    assert_eq!(try_with(&|vm, _| vm.epoch = u64::MAX), Reason::BadParameter);
    assert_eq!(try_with(&|vm, _| vm.spec = None), Reason::BadParameter);
    assert_eq!(
        try_with(&|vm, _| backend(vm, v1::Backend::Unspecified)),
        Reason::BadParameter
    );
    assert_eq!(
        try_with(&|vm, _| backend(vm, v1::Backend::Kvm)),
        Reason::CapabilityMissing
    );
    assert_eq!(try_with(&|_, slots| slots.clear()), Reason::BadSlotTable);
    assert_eq!(
        try_with(&|_, slots| slots.push(extra(0))),
        Reason::BadSlotTable
    );
    let vm = fake::created();
    let taken = vm.machine.begin_incoming(&migration(), &good, &slots);
    assert_eq!(reason(taken), Reason::VmExists);
}
