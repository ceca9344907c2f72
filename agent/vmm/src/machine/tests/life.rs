//! Create, start, pause, resume, delete, stop.

use slat_proto::model::{BackendKind, Format, VmSpec};

use super::*;
use crate::{backend::GuestEvent, memory::SlotBitmaps};

#[test]
fn a_vm_is_built_run_paused_and_deleted() {
    let vm = fake::empty();
    assert_eq!(vm.machine.snapshot(), None);
    assert_eq!(reason(vm.machine.start()), Reason::NoSuchVm);
    let built = vm.machine.create(fake::spec()).unwrap();
    assert_eq!(built.state(), v1::vm::State::Created);
    assert_eq!(
        (built.name.as_str(), built.host.as_str()),
        ("vms/web", "hosts/a")
    );
    assert_eq!((built.epoch, built.pid), (1, std::process::id()));
    let spec = built.spec.unwrap();
    assert_eq!(spec.backend(), v1::Backend::Software);
    assert_eq!(spec.format(), v1::Format::Ept4);
    assert_eq!(built.guest_counters.unwrap().pages, 2048);
    let stats = built.mmu_stats.unwrap();
    assert_eq!(
        (stats.faults_taken, stats.dirty_pages_harvested),
        (Some(7), Some(0))
    );
    assert_eq!(
        stats.exits, None,
        "what the backend does not offer stays unset"
    );
    assert_eq!(ownership(&vm), Ownership::Owner { epoch: 1 });
    assert_eq!(reason(vm.machine.create(fake::spec())), Reason::VmExists);

    assert_eq!(reason(vm.machine.pause()), Reason::VmState);
    assert_eq!(reason(vm.machine.resume()), Reason::VmState);
    for _ in 0..2 {
        assert_eq!(vm.machine.start().unwrap().state(), v1::vm::State::Running);
    }
    for _ in 0..2 {
        assert_eq!(vm.machine.pause().unwrap().state(), v1::vm::State::Paused);
        assert!(!vm.backend.state().running);
    }
    assert_eq!(reason(vm.machine.start()), Reason::VmState);
    assert_eq!(vm.machine.resume().unwrap().state(), v1::vm::State::Running);
    assert_eq!(vm.backend.state().runs, 2);

    vm.machine.delete().unwrap();
    assert_eq!(vm.machine.snapshot(), None);
    assert!(!vm.backend.state().running);
    assert_eq!(ownership(&vm), Ownership::Ended);
    assert_eq!(exit(&vm), Some(Exit::Deleted));
    assert_eq!(reason(vm.machine.delete()), Reason::NoSuchVm);
    assert_eq!(reason(vm.machine.create(fake::spec())), Reason::VmExists);
}

#[test]
fn each_change_of_state_wakes_the_watchers() {
    let vm = fake::created();
    let mut changes = vm.machine.watch();
    changes.mark_unchanged();
    for call in [Machine::start, Machine::pause, Machine::resume] {
        call(&vm.machine).unwrap();
        assert!(changes.has_changed().unwrap());
        changes.mark_unchanged();
    }
    vm.machine.snapshot();
    assert!(!changes.has_changed().unwrap());
}

#[test]
fn a_vm_that_cannot_be_built_leaves_nothing() {
    for call in ["create", "add_slot"] {
        let vm = fake::empty();
        vm.backend.state().fail.push(call);
        assert_eq!(reason(vm.machine.create(fake::spec())), Reason::KvmIoctl);
        assert_eq!(vm.machine.snapshot(), None);
        assert!(vm.machine.memory().table().slots().is_empty());
        assert_eq!(Journal::read(&vm.machine.dir().journal()).unwrap(), None);
        assert_eq!(reason(vm.machine.backend().map(drop)), Reason::NoSuchVm);
        vm.backend.state().slots.clear();
        vm.machine.create(fake::spec()).unwrap();
    }
}

#[test]
fn backend_and_format_are_resolved_or_refused() {
    let vm = fake::empty();
    let plan = |backend, format| {
        vm.machine.plan(&VmSpec {
            backend,
            format,
            ..fake::spec()
        })
    };
    let chosen = plan(None, Some(Format::Sv48x4)).unwrap();
    assert_eq!(
        (chosen.backend, chosen.format),
        (Some(BackendKind::Software), Some(Format::Sv48x4))
    );
    let kvm = plan(Some(BackendKind::Kvm), None).unwrap_err();
    assert_eq!(kvm.reason, Reason::CapabilityMissing);
    assert!(kvm.message.contains("a test"), "says why: {kvm}");
    let mut parts = fake::parts(&vm.backend);
    parts.available = || (vec![BackendKind::Kvm], None);
    let spec = VmSpec {
        backend: Some(BackendKind::Kvm),
        format: Some(Format::Ept4),
        ..fake::spec()
    };
    assert_eq!(reason(resolve(&parts, &spec)), Reason::BadParameter);
    assert_eq!(resolve(&parts, &fake::spec()).unwrap().format, None);
}

#[test]
fn the_guests_end_is_seen_and_final() {
    let vm = fake::created();
    vm.machine.start().unwrap();
    vm.backend.guest_event(GuestEvent::Stopped);
    assert_eq!(state(&vm), v1::vm::State::Stopped);
    assert_eq!(reason(vm.machine.resume()), Reason::VmState);
    assert_eq!(reason(vm.machine.pause()), Reason::VmState);
    vm.machine.digest().unwrap();
    vm.machine.delete().unwrap();

    let vm = fake::created();
    vm.machine.start().unwrap();
    vm.backend
        .guest_event(GuestEvent::Failed("triple fault".into()));
    let seen = vm.machine.snapshot().unwrap();
    assert_eq!(seen.state(), v1::vm::State::Failed);
    assert_eq!(seen.state_message, "triple fault");
    let refused = vm.machine.begin_outgoing(&migration(), 1).unwrap_err();
    assert_eq!(refused.reason, Reason::VmState);
    assert_eq!(refused.metadata["failure"], "GUEST");
    assert_eq!(refused.metadata["meaning"], "triple fault");
    assert!(refused.message.contains("triple fault"), "{refused}");
}

#[test]
fn failures_to_run_and_to_stop_leave_a_true_state() {
    let vm = fake::created();
    vm.backend.state().fail.push("run");
    assert_eq!(reason(vm.machine.start()), Reason::KvmIoctl);
    assert_eq!(state(&vm), v1::vm::State::Created);
    vm.machine.start().unwrap();
    vm.backend.state().fail.push("pause");
    assert_eq!(reason(vm.machine.pause()), Reason::SourcePause);
    assert_eq!(state(&vm), v1::vm::State::Running);
    assert!(vm.backend.state().running);
    vm.backend.state().fail.extend(["pause", "run"]);
    assert_eq!(reason(vm.machine.pause()), Reason::SourcePause);
    assert_eq!(state(&vm), v1::vm::State::Failed);
    vm.machine.delete().unwrap();
}

#[test]
fn digest_needs_a_vm_at_rest() {
    let vm = fake::created();
    let before = vm.machine.digest().unwrap();
    vm.machine.start().unwrap();
    assert_eq!(reason(vm.machine.digest()), Reason::VmRunning);
    vm.machine.pause().unwrap();
    assert_eq!(vm.machine.digest().unwrap(), before);
    assert!(vm.machine.memory().table().write(0x5000, &[1]));
    assert_ne!(vm.machine.digest().unwrap(), before);
}

#[test]
fn a_delete_that_cannot_be_journalled_stops_the_vm_and_can_be_repeated() {
    let vm = fake::created();
    vm.machine.start().unwrap();
    break_journal(&vm, true);
    assert_eq!(reason(vm.machine.delete()), Reason::Journal);
    break_journal(&vm, false);
    assert_eq!(exit(&vm), None);
    assert_eq!(state(&vm), v1::vm::State::Paused);
    assert_eq!(reason(vm.machine.resume()), Reason::StaleEpoch);
    assert!(!vm.backend.state().running);
    vm.machine.delete().unwrap();
    assert_eq!(ownership(&vm), Ownership::Ended);
}

#[test]
fn only_the_machine_touches_the_backend() {
    let vm = fake::created();
    let backend = vm.machine.backend().unwrap();
    assert!(backend.run().is_err());
    assert!(backend.pause().is_err());
    assert!(backend.load_state(b"fake vCPUs").is_err());
    assert!(backend.harvest_dirty(&mut SlotBitmaps::new()).is_err());
    assert!(backend.set_dirty_logging(0, true).is_err());
    assert!(backend.remove_slot(0).is_err());
    assert_eq!(vm.backend.state().runs, 0);
    assert_eq!(backend.save_state().unwrap(), b"fake vCPUs");
}

#[test]
fn a_dead_process_journal_is_refused_unless_it_ended() {
    let begin = |entries: &[Entry]| {
        let dir = slat_test_dir::TestDir::new();
        let mut journal = Journal::open(&dir.path().join("journal")).unwrap();
        for entry in entries {
            journal.append(entry).unwrap();
        }
        drop(journal);
        Machine::new(
            VmDir::new(dir.path()),
            VmName::parse("web").unwrap(),
            HostName::parse("a").unwrap(),
        )
        .map(|machine| machine.snapshot())
    };
    let created = Entry::Created {
        vm: "web".into(),
        uid: "u".into(),
        epoch: 1,
    };
    let incoming = Entry::Incoming {
        vm: "web".into(),
        uid: "u".into(),
        migration: "m1".into(),
        epoch: 1,
    };
    let prepared = Entry::Prepared {
        uid: "u".into(),
        migration: "m1".into(),
        epoch: 2,
        grant: None,
    };
    let relinquished = Entry::Relinquished {
        uid: "u".into(),
        migration: "m1".into(),
        epoch: 1,
        grant: None,
    };
    let aborted = Entry::Aborted {
        uid: "u".into(),
        migration: "m1".into(),
    };
    assert_eq!(begin(&[]).unwrap(), None);
    let lost = begin(std::slice::from_ref(&created)).unwrap_err();
    assert_eq!(lost.reason, Reason::VmState);
    assert_eq!(lost.metadata["state"], "STATE_LOST");
    assert_eq!(
        reason(begin(std::slice::from_ref(&incoming))),
        Reason::VmState
    );
    assert_eq!(
        reason(begin(&[incoming.clone(), prepared])),
        Reason::InDoubt
    );
    assert_eq!(
        reason(begin(&[created.clone(), relinquished])),
        Reason::StaleEpoch
    );
    assert_eq!(
        begin(&[created, Entry::Ended { uid: "u".into() }]).unwrap(),
        None
    );
    assert_eq!(begin(&[incoming, aborted]).unwrap(), None);
}

#[test]
fn a_told_process_stops_its_vm() {
    let vm = fake::empty();
    vm.machine.stop().unwrap();
    assert_eq!(exit(&vm), Some(Exit::Deleted));

    let vm = fake::created();
    vm.machine.start().unwrap();
    vm.machine.begin_outgoing(&migration(), 1).unwrap();
    vm.machine.stop().unwrap();
    assert_eq!(ownership(&vm), Ownership::Ended);
    assert!(!vm.backend.state().running);
    assert!(matches!(
        vm.machine.relinquish(&migration()),
        Err(RelinquishError::Refused(error)) if error.reason == Reason::NoSuchVm
    ));
}
