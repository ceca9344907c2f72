//! What is refused, and snapshots of guests whose memory cannot be watched.

use super::*;

fn served(vm: &fake::FakeVm) -> (ServedPagers, PathBuf) {
    let socket = vm.machine.dir().path().join(slat_paging::SOCKET);
    (vm.machine.serve_pagers(&socket).unwrap(), socket)
}

#[test]
fn memory_that_cannot_be_watched_is_refused_by_name() {
    let vm = fake::created();
    let error = vm.machine.take_snapshot("saves/s", false).unwrap_err();
    assert_eq!(error.reason, Reason::CapabilityMissing);
    assert_eq!(error.metadata["capability"], "CAPABILITY_PAGING");
    assert!(error.metadata.contains_key("why"));
    for refused in [
        vm.machine.list_mappings(0).map(drop),
        vm.machine.harvest_working_set(None).map(drop),
        vm.machine.prefault_memory(0, 1).map(drop),
    ] {
        assert_eq!(reason(refused), Reason::CapabilityMissing);
    }
    vm.machine.retry_page_source().unwrap();
    let shown = vm.machine.snapshot().unwrap();
    assert!(shown.paging.is_none());
    assert!(
        !shown
            .capabilities()
            .any(|has| has == v1::Capability::Paging)
    );
    let other = fake::empty();
    let paged = VmSpec {
        paging: Paging::Agent,
        ..fake::spec()
    };
    assert_eq!(
        reason(other.machine.create(paged)),
        Reason::CapabilityMissing
    );
}

#[test]
fn a_guest_that_must_be_paused_runs_again_when_the_lease_ends() {
    let vm = fake::created();
    let (_served, socket) = served(&vm);
    vm.machine.start().unwrap();
    let taken = vm.machine.take_snapshot("saves/s", true).unwrap();
    assert!(taken.left.run && taken.paused.as_ref().unwrap().contains("saves/s"));
    assert_eq!(taken.vcpus, b"fake vCPUs");
    assert_eq!(state(&vm), State::Paused);
    let error = vm.machine.resume().unwrap_err();
    assert_eq!(error.reason, Reason::VmState);
    assert!(error.message.contains("saves/s"), "{error}");
    assert_eq!(
        reason(vm.machine.take_snapshot("saves/t", true)),
        Reason::VmState
    );
    assert_eq!(
        reason(vm.machine.begin_outgoing(&migration(), 1)),
        Reason::VmState
    );
    // Its reader reads the memory itself.
    assert_eq!(reason(vm.machine.discard(&[(0, 1)])), Reason::VmState);
    let layers = agent::take(&socket, taken.snapshot).unwrap();
    let page = layers.source().page(Some(0), 0);
    assert_eq!(&page[..10], b"fake guest");
    assert_eq!(state(&vm), State::Paused);
    drop(layers);
    until("it to run again", || state(&vm) == State::Running);
    // One that a user paused meanwhile stays so.
    let taken = vm.machine.take_snapshot("saves/s", true).unwrap();
    vm.machine.pause().unwrap();
    drop(agent::take(&socket, taken.snapshot).unwrap());
    until("it to be free", || vm.machine.resume().is_ok());
    // One that nobody takes ends by itself.
    vm.machine.pause().unwrap();
    vm.machine.take_snapshot("saves/s", true).unwrap();
    until("it to be free", || vm.machine.resume().is_ok());
}

#[test]
fn a_migration_and_a_snapshot_keep_out_of_each_others_way() {
    let vm = fake::created();
    vm.machine.begin_outgoing(&migration(), 1).unwrap();
    assert_eq!(
        reason(vm.machine.take_snapshot("saves/s", true)),
        Reason::MigrationInProgress
    );
    vm.machine.end_outgoing(&migration()).unwrap();
    vm.backend.state().fail.push("save_state");
    assert_eq!(
        reason(vm.machine.take_snapshot("saves/s", true)),
        Reason::KvmIoctl
    );
    vm.machine.start().unwrap();
}

#[test]
fn a_peer_that_says_something_else_is_sent_away() {
    let vm = fake::created();
    let (_served, socket) = served(&vm);
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&socket).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    let peer = slat_paging::wire::Socket::connect(&socket).unwrap();
    peer.send(&"hello", &[]).unwrap();
    assert!(peer.receive::<String>().is_err());
    let later = slat_paging::wire::FromPager::Hello {
        role: slat_paging::Role::Pager,
        version: 99,
        pid: 1,
    };
    let peer = slat_paging::wire::Socket::connect(&socket).unwrap();
    peer.send(&later, &[]).unwrap();
    assert!(peer.receive::<String>().is_err());
    assert_eq!(
        agent::take(&socket, 7).err().unwrap().kind,
        slat_paging::wire::ProblemKind::Refused
    );
}
