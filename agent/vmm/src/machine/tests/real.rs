//! The machine over every real backend of this host: memstress runs, its memory goes to a second
//! machine by bulk copy and harvested pages, and the guest there finds every page as it left it.

use std::time::{Duration, Instant};

use slat_proto::model::{BackendKind, CursorName, MemstressPattern, MemstressSpec, VmSpec};

use super::*;

const PATIENCE: Duration = Duration::from_secs(60);

fn machine(dir: &slat_test_dir::TestDir, host: &str) -> Arc<Machine> {
    Machine::new(
        VmDir::new(dir.path()),
        VmName::parse("web").unwrap(),
        HostName::parse(host).unwrap(),
    )
    .unwrap()
}

fn counters(machine: &Machine) -> v1::GuestCounters {
    let vm = machine.snapshot().unwrap();
    assert_eq!(vm.state_message, "");
    vm.guest_counters.expect("memstress counts")
}

/// Waits until the guest has written `more` pages than now.
fn runs_on(machine: &Machine, more: u64) {
    let goal = counters(machine).pages_written + more;
    let deadline = Instant::now() + PATIENCE;
    while counters(machine).pages_written < goal {
        assert!(Instant::now() < deadline, "the guest stands still");
        std::thread::yield_now();
    }
}

fn copy(from: &Machine, to: &Machine, pages: impl Iterator<Item = (u32, u64)>) -> u64 {
    let (from, to) = (from.memory().table(), to.memory().table());
    let mut page = [0; 4096];
    let mut copied = 0;
    for (slot, index) in pages {
        from.slot(slot).unwrap().read_page(index, &mut page);
        let to = to.slot(slot).unwrap();
        to.host().write(index as usize * 4096, &page);
        copied += 1;
    }
    copied
}

fn moves(kind: BackendKind) {
    let (here, there) = (slat_test_dir::TestDir::new(), slat_test_dir::TestDir::new());
    let (source, destination) = (machine(&here, "a"), machine(&there, "b"));
    let spec = VmSpec {
        memory_bytes: 16 << 20,
        vcpus: 2,
        backend: Some(kind),
        guest: GuestSpec::Memstress(MemstressSpec {
            pattern: MemstressPattern::Random,
            ..MemstressSpec::default()
        }),
        ..fake::spec()
    };
    match source.create(spec) {
        Ok(_) => {}
        Err(error) if error.reason == Reason::CapabilityMissing => {
            eprintln!("SKIPPED: {kind}: {error}");
            return;
        }
        Err(error) => panic!("{kind}: {error}"),
    }
    source.start().unwrap();
    runs_on(&source, 1000);

    let vm = source.begin_outgoing(&migration(), 1).unwrap();
    let table = source.memory().table();
    let slots: Vec<_> = table.slots().iter().map(|slot| slot.spec()).collect();
    destination
        .begin_incoming(&migration(), &vm, &slots)
        .unwrap();
    let cursor = CursorName::parse("migration").unwrap();
    source.dirty().attach(&cursor).unwrap();
    let all = slots
        .iter()
        .flat_map(|slot| (0..slot.pages).map(|page| (slot.slot, page)));
    copy(&source, &destination, all);
    runs_on(&source, 1000);

    assert!(source.enter_switchover(&migration()).unwrap().run);
    let batch = source.dirty().harvest(&cursor).unwrap();
    let dirty = batch.slots.iter().flat_map(|(slot, bitmap)| {
        let pages = |(first, len)| first..first + len;
        bitmap.runs().flat_map(pages).map(|page| (*slot, page))
    });
    let copied = copy(&source, &destination, dirty);
    assert!(copied > 0 && copied == batch.pages, "{copied}");
    let state = source.backend().unwrap().save_state().unwrap();
    prepare(&destination, &state).unwrap();
    source.relinquish(&migration()).unwrap();
    assert_eq!(
        source.digest().unwrap(),
        destination.digest().unwrap(),
        "{kind}: every page arrived"
    );
    let before = counters(&source);
    let owned = own(&destination, true, false).unwrap();
    assert_eq!(owned.state(), v1::vm::State::Running);
    runs_on(&destination, 5000);
    destination.pause().unwrap();
    let after = counters(&destination);
    assert!(after.pages_written > before.pages_written);
    assert_eq!((before.errors, after.errors), (0, 0), "{kind}");
    assert_eq!(counters(&source), before, "the source stands still");

    // The log is left as it was found, and a slot can come and go under a real backend.
    source.dirty().detach(&cursor).unwrap();
    assert!(!source.snapshot().unwrap().dirty_logging);
    destination.resume().unwrap();
    let slot = slat_proto::model::SlotSpec::new(9, 0x10_0000, 64, false).unwrap();
    let change = slat_proto::model::SlotChange::Create(slot);
    destination.update_slots(&[change], 0).unwrap();
    let change = slat_proto::model::SlotChange::Delete { slot: 9 };
    destination.update_slots(&[change], 0).unwrap();
    destination.invalidate(None).unwrap();
    runs_on(&destination, 1000);
    source.release().unwrap();
    destination.delete().unwrap();
}

#[test]
fn a_real_guest_moves_between_two_machines() {
    let (kinds, why_no_kvm) = crate::backend::available();
    if let Some(why) = why_no_kvm {
        eprintln!("SKIPPED: kvm: {why}");
    }
    for kind in kinds {
        moves(kind);
    }
}
