//! VMs made of snapshots.

use slat_proto::model::SlotSpec;

use super::{
    super::super::paging::{CopyOrder, Taken},
    *,
};

fn slots(host: &Host) -> Vec<SlotSpec> {
    let table = host.machine.memory().table();
    table.slots().iter().map(|slot| slot.spec()).collect()
}

fn order<'a>(taken: &'a Taken, slots: &'a [SlotSpec], lazy: bool) -> CopyOrder<'a> {
    CopyOrder {
        vm: &taken.vm,
        slots,
        vcpus: &taken.vcpus,
        generation: Some(taken.generation),
        lazy,
        start: false,
        paging: None,
    }
}

/// A guest that has run, and its snapshot.
fn original(paging: Paging) -> (Host, FakePager, Taken, agent::Taken) {
    let host = Host::new();
    host.machine.create(spec(paging)).unwrap();
    let pager = host.pager();
    host.machine.start().unwrap();
    host.runs_on(5000);
    let taken = host.machine.take_snapshot("vms/copy", false).unwrap();
    let layers = agent::take(&host.socket(), taken.snapshot).unwrap();
    (host, pager, taken, layers)
}

#[test]
fn a_fork_goes_on_where_the_snapshot_was_and_both_find_every_page() {
    need_paging!();
    let (host, _pager, taken, layers) = original(Paging::Kernel);
    let copy = Host::new();
    agent::hand_over(&copy.socket(), &layers).unwrap();
    drop(layers);
    let slots = slots(&host);
    let pager = copy.slow_pager();
    let order = CopyOrder {
        start: true,
        ..order(&taken, &slots, true)
    };
    let vm = copy.machine.build_copy(order).unwrap();
    assert_eq!(vm.state(), v1::vm::State::Running);
    assert_ne!(vm.uid, taken.vm.uid);
    assert_eq!((vm.epoch, vm.host.as_str()), (1, "hosts/a"));
    let shown = copy.paging().unwrap();
    assert_eq!(shown.because, ["a fork"]);
    assert!(shown.source_bytes > 0 && shown.loaded_bytes < shown.source_bytes);
    let journal = Journal::read(&copy.machine.dir().journal()).unwrap();
    assert_eq!(journal.unwrap().ownership, Ownership::Owner { epoch: 1 });
    for _ in 0..3 {
        host.runs_on(1000);
        copy.runs_on(1000);
    }
    assert!(pager.seen.brought.load(Ordering::Relaxed) > 100);
    // A digest needs all of it, and then the source is not needed any more.
    copy.machine.pause().unwrap();
    pager.seen.stalls.store(false, Ordering::Relaxed);
    copy.machine.digest().unwrap();
    copy.machine.resume().unwrap();
    until("the copy to be the kernel's", || copy.paging().is_none());
    until("the original to be the kernel's", || {
        host.paging().is_none()
    });
    host.runs_on(1000);
    copy.runs_on(5000);
    copy.finish();
    host.finish();
}

#[test]
fn a_whole_copy_has_every_page_and_is_never_watched() {
    need_paging!();
    let (host, _pager, taken, layers) = original(Paging::Kernel);
    // What its pager has read need not be kept any more, for whoever looks after it.
    host.machine.pause().unwrap();
    let copy = Host::new();
    agent::hand_over(&copy.socket(), &layers).unwrap();
    let slots = slots(&host);
    let pager = copy.pager();
    let vm = copy
        .machine
        .build_copy(order(&taken, &slots, false))
        .unwrap();
    assert_eq!(vm.state(), v1::vm::State::Paused);
    assert!(vm.paging.is_none() && !pager.seen.watched.load(Ordering::Relaxed));
    let source = layers.source();
    let table = copy.machine.memory().table();
    for slot in table.slots() {
        let (mut page, spec) = ([0; 4096], slot.spec());
        for at in 0..spec.pages {
            slot.read_page(at, &mut page);
            assert!(page == source.page(Some(spec.slot), at), "page {at}");
        }
    }
    drop((layers, source));
    host.machine.resume().unwrap();
    let generation = copy.machine.list_slots().unwrap().generation;
    assert_eq!(generation, taken.generation);
    copy.machine.resume().unwrap();
    copy.runs_on(5000);
    copy.finish();
    host.finish();
}

#[test]
fn a_copy_of_a_copy_reads_through_it() {
    need_paging!();
    let (host, _pager, taken, layers) = original(Paging::Agent);
    let slots = slots(&host);
    let first = Host::new();
    agent::hand_over(&first.socket(), &layers).unwrap();
    drop(layers);
    let first_pager = first.slow_pager();
    let made = CopyOrder {
        start: true,
        ..order(&taken, &slots, true)
    };
    first.machine.build_copy(made).unwrap();
    first.runs_on(300);
    let again = first.machine.take_snapshot("vms/other", false).unwrap();
    let layers = agent::take(&first.socket(), again.snapshot).unwrap();
    assert_eq!(layers.layers(), 2);
    let second = Host::new();
    agent::hand_over(&second.socket(), &layers).unwrap();
    drop(layers);
    let second_pager = second.slow_pager();
    let made = CopyOrder {
        start: true,
        paging: Some(Paging::Kernel),
        ..order(&again, &slots, true)
    };
    second.machine.build_copy(made).unwrap();
    for host in [&second, &first, &host] {
        host.runs_on(2000);
    }
    // Pagers may die at any time.
    drop((first_pager, second_pager));
    let (_one, _other) = (first.pager(), second.pager());
    for host in [&second, &first] {
        host.runs_on(2000);
        host.machine.pause().unwrap();
        host.machine.digest().unwrap();
        host.machine.resume().unwrap();
        host.runs_on(2000);
    }
    assert_eq!(first.paging().unwrap().because[0], "paging: AGENT");
    until("the second to be the kernel's", || {
        second.paging().is_none()
    });
    second.finish();
    first.finish();
    host.finish();
}

#[test]
fn a_source_that_fails_is_named_and_tried_again() {
    need_paging!();
    let (host, _pager, taken, layers) = original(Paging::Kernel);
    let slots = slots(&host);
    let copy = Host::new();
    agent::hand_over(&copy.socket(), &layers).unwrap();
    drop(layers);
    let pager = copy.slow_pager();
    copy.machine
        .build_copy(order(&taken, &slots, true))
        .unwrap();
    let error = copy.machine.digest().unwrap_err();
    assert_eq!(error.reason, Reason::PageSourceGone);
    let error = copy.machine.describe_outgoing(&migration(), 1).unwrap_err();
    assert_eq!(error.reason, Reason::VmState);
    assert!(error.metadata.contains_key("loaded_pages"));
    pager.seen.stalls.store(false, Ordering::Relaxed);
    copy.machine.retry_page_source().unwrap();
    copy.machine.describe_outgoing(&migration(), 1).unwrap();
    copy.machine.digest().unwrap();
    copy.finish();
    host.finish();
}

#[test]
fn what_cannot_be_built_leaves_nothing_behind() {
    need_paging!();
    let (host, _pager, taken, layers) = original(Paging::Kernel);
    let slots = slots(&host);
    let copy = Host::new();
    let refused = |order: CopyOrder<'_>| copy.machine.build_copy(order).unwrap_err().reason;
    assert_eq!(refused(order(&taken, &slots, true)), Reason::VmState);
    agent::hand_over(&copy.socket(), &layers).unwrap();
    assert_eq!(refused(order(&taken, &[], true)), Reason::BadSlotTable);
    let pager = copy.pager();
    let broken = CopyOrder {
        vcpus: b"nonsense",
        ..order(&taken, &slots, true)
    };
    assert_eq!(refused(broken), Reason::StateVersionUnsupported);
    assert!(copy.machine.snapshot().is_none());
    drop(pager);
    // All of it again, from the beginning.
    agent::hand_over(&copy.socket(), &layers).unwrap();
    let _pager = copy.pager();
    copy.machine
        .build_copy(order(&taken, &slots, true))
        .unwrap();
    assert!(agent::hand_over(&copy.socket(), &layers).is_err());
    copy.machine.resume().unwrap();
    copy.runs_on(1000);
    copy.finish();
    drop(layers);
    host.finish();
}

#[test]
fn a_guest_that_no_pager_can_serve_is_copied_whole() {
    let original = fake::created();
    let socket = original.machine.dir().path().join(slat_paging::SOCKET);
    let _served = original.machine.serve_pagers(&socket).unwrap();
    original.machine.start().unwrap();
    let table = original.machine.memory().table();
    table.slot(0).unwrap().host().write(4096 * 77, b"here");
    let taken = original.machine.take_snapshot("vms/copy", true).unwrap();
    let layers = agent::take(&socket, taken.snapshot).unwrap();
    let copy = fake::empty();
    let socket = copy.machine.dir().path().join(slat_paging::SOCKET);
    let _served = copy.machine.serve_pagers(&socket).unwrap();
    agent::hand_over(&socket, &layers).unwrap();
    let slots: Vec<SlotSpec> = table.slots().iter().map(|slot| slot.spec()).collect();
    let lazy = copy.machine.build_copy(order(&taken, &slots, true));
    assert_eq!(reason(lazy), Reason::CapabilityMissing);
    let pager = FakePager::connect(&socket);
    let made = CopyOrder {
        start: true,
        ..order(&taken, &slots, false)
    };
    let vm = copy.machine.build_copy(made).unwrap();
    drop(layers);
    assert_eq!(vm.state(), v1::vm::State::Running);
    assert!(vm.guest_counters.is_some() && vm.paging.is_none());
    assert_eq!(
        copy.backend.state().loaded.as_deref(),
        Some(&b"fake vCPUs"[..])
    );
    let table = copy.machine.memory().table();
    let mut word = [0; 4];
    table.slot(0).unwrap().host().read(4096 * 77, &mut word);
    assert_eq!(&word, b"here");
    pager.ended().unwrap();
    until("the original to run", || {
        original.machine.snapshot().unwrap().state() == v1::vm::State::Running
    });
}
