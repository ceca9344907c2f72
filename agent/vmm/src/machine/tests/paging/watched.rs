//! A guest that is paged from its creation on.

use slat_proto::{
    model::{CursorName, DirtyEngine, SlotChange, SlotSpec},
    v1::paging_status::State as PagingState,
};

use super::*;

fn paged() -> (Host, FakePager) {
    let host = Host::new();
    host.machine.create(spec(Paging::Agent)).unwrap();
    let pager = host.pager();
    host.machine.start().unwrap();
    (host, pager)
}

#[test]
fn a_guest_runs_whose_pages_all_come_by_its_pager() {
    need_paging!();
    let host = Host::new();
    let vm = host.machine.create(spec(Paging::Agent)).unwrap();
    for capability in [v1::Capability::Paging, v1::Capability::PageProtection] {
        assert!(vm.capabilities().any(|has| has == capability));
    }
    assert_eq!(vm.paging.unwrap().state(), PagingState::NoPager);
    let pager = host.pager();
    host.machine.start().unwrap();
    host.runs_on(10_000);
    assert!(pager.seen.missing.load(Ordering::Relaxed) > 1000);
    assert!(!pager.seen.mapped_before.load(Ordering::Relaxed));
    let shown = host.paging().unwrap();
    assert_eq!(shown.state(), PagingState::Serving);
    assert_eq!((shown.pager_pid, shown.pager_restarts), (4711, 0));
    assert_eq!(shown.because, ["paging: AGENT"]);
    // Nothing makes huge pages of it.
    host.machine.make_huge_pages();
    let second = host.pager();
    assert!(second.ended().is_err(), "there is one");
    host.finish();
}

#[test]
fn a_pager_that_dies_is_followed_by_another_under_a_running_guest() {
    need_paging!();
    let (host, mut pager) = paged();
    for restarts in 1..=5 {
        host.runs_on(2000);
        drop(pager);
        until("the pager to be missed", || {
            host.paging().unwrap().state() == PagingState::NoPager
        });
        // The guest waits, and can be stopped and deleted all the same.
        host.machine.pause().unwrap();
        host.machine.resume().unwrap();
        pager = host.pager();
        until("another one", || {
            host.paging().unwrap().state() == PagingState::Serving
        });
        assert_eq!(host.paging().unwrap().pager_restarts, restarts);
        assert!(pager.seen.mapped_before.load(Ordering::Relaxed));
    }
    host.runs_on(2000);
    host.finish();
}

#[test]
fn what_a_dead_pager_was_asked_the_next_one_does() {
    need_paging!();
    let (host, pager) = paged();
    host.runs_on(2000);
    host.machine.pause().unwrap();
    drop(pager);
    until("the pager to be missed", || {
        host.paging().unwrap().state() == PagingState::NoPager
    });
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| host.machine.invalidate(Some((0x200, 0x100))));
        std::thread::sleep(Duration::from_millis(50));
        assert!(!asked.is_finished());
        let pager = host.pager();
        asked.join().unwrap().unwrap();
        host.machine.resume().unwrap();
        host.runs_on(2000);
        drop(pager);
    });
    host.finish();
}

#[test]
fn without_a_pager_it_does_not_start() {
    need_paging!();
    let host = Host::new();
    host.machine.create(spec(Paging::Agent)).unwrap();
    let error = host.machine.start().unwrap_err();
    assert_eq!(error.reason, Reason::PagerUnreachable);
    assert_eq!(error.metadata["vm"], "vms/web");
    let _pager = host.pager();
    host.machine.start().unwrap();
    host.runs_on(100);
    host.finish();
}

#[test]
fn slots_come_go_and_move_under_it() {
    need_paging!();
    let (host, pager) = paged();
    host.runs_on(1000);
    let slot = SlotSpec::new(9, 0x10_0000, 64, false).unwrap();
    for change in [
        SlotChange::Create(slot),
        SlotChange::Move {
            slot: 9,
            base_gfn: 0x20_0000,
        },
        SlotChange::SetFlags {
            slot: 9,
            read_only: true,
        },
        SlotChange::Delete { slot: 9 },
    ] {
        host.machine.update_slots(&[change], 0).unwrap();
        host.runs_on(500);
    }
    // One that is undone: the second overlaps the first.
    let twice = [
        SlotChange::Create(slot),
        SlotChange::Create(SlotSpec { slot: 10, ..slot }),
    ];
    host.machine.update_slots(&twice, 0).unwrap_err();
    // A pager to come knows what is there.
    host.machine
        .update_slots(&[SlotChange::Create(slot)], 0)
        .unwrap();
    drop(pager);
    let _pager = host.pager();
    host.runs_on(1000);
    host.machine
        .update_slots(&[SlotChange::Delete { slot: 9 }], 0)
        .unwrap();
    host.finish();
}

#[test]
fn mappings_are_listed_aged_and_taken_away() {
    need_paging!();
    let (host, pager) = paged();
    host.runs_on(20_000);
    host.machine.pause().unwrap();
    let (mapped, next) = host.machine.list_mappings(0).unwrap();
    let pages: u64 = mapped.iter().map(|run| run.pages).sum();
    assert!(pages > 1000 && next.is_none());
    let (young, _) = host.machine.harvest_working_set(None).unwrap();
    assert_eq!(young.iter().map(|(_, pages)| pages).sum::<u64>(), pages);
    assert!(host.machine.list_mappings(0).unwrap().0.is_empty());
    assert!(host.machine.harvest_working_set(None).unwrap().0.is_empty());
    let error = host.machine.harvest_working_set(Some((u64::MAX, 1)));
    assert_eq!(error.unwrap_err().reason, Reason::BadParameter);
    let minor = pager.seen.minor.load(Ordering::Relaxed);
    host.machine.resume().unwrap();
    host.runs_on(2000);
    assert!(pager.seen.minor.load(Ordering::Relaxed) > minor);
    host.finish();
}

#[test]
fn discarded_pages_are_the_pagers_to_give_back() {
    need_paging!();
    let (host, pager) = paged();
    let slot = SlotSpec::new(9, 0x10_0000, 64, false).unwrap();
    host.machine
        .update_slots(&[SlotChange::Create(slot)], 0)
        .unwrap();
    let table = host.machine.memory().table();
    let memory = table.slot(9).unwrap();
    memory.host().write(0, &[7; 4096 * 64]);
    let discarded = host.machine.discard(&[(0x10_0000 + 8, 16)]).unwrap();
    assert_eq!((discarded.pages, discarded.freed_bytes), (16, 16 * 4096));
    assert_eq!(pager.seen.discarded.load(Ordering::Relaxed), 16);
    assert!(memory.page_is_zero(8) && !memory.page_is_zero(7));
    host.runs_on(500);
    host.finish();
}

#[test]
fn who_reads_dirty_pages_sees_what_it_saw() {
    need_paging!();
    for engine in [DirtyEngine::Bitmap, DirtyEngine::Ring] {
        let host = Host::new();
        let spec = VmSpec {
            dirty_engine: Some(engine),
            ..spec(Paging::Agent)
        };
        match host.machine.create(spec) {
            Ok(_) => {}
            Err(error) => {
                eprintln!("SKIPPED: {error}");
                continue;
            }
        }
        let _pager = host.pager();
        host.machine.start().unwrap();
        let cursor = CursorName::parse("c").unwrap();
        host.machine.dirty().attach(&cursor).unwrap();
        host.runs_on(3000);
        host.machine.pause().unwrap();
        let before = pages(&host);
        let batch = host.machine.dirty().harvest(&cursor).unwrap();
        host.machine
            .dirty()
            .acknowledge(&cursor, batch.batch)
            .unwrap();
        assert!(batch.pages > 500);
        host.machine.resume().unwrap();
        host.runs_on(300);
        host.machine.pause().unwrap();
        let batch = host.machine.dirty().harvest(&cursor).unwrap();
        let after = pages(&host);
        let of = batch.slots.iter().find(|(slot, _)| *slot == 0);
        let written = &of.unwrap().1;
        for (page, (before, after)) in before.iter().zip(&after).enumerate() {
            let dirty = written.runs().any(|(first, len)| {
                let page = page as u64;
                first <= page && page < first + len
            });
            assert!(before == after || dirty, "page {page} of {engine:?}");
        }
        host.finish();
    }
}

/// Digests of the pages of slot 0.
fn pages(host: &Host) -> Vec<u128> {
    let table = host.machine.memory().table();
    let slot = table.slot(0).unwrap();
    let mut page = [0; 4096];
    let digest = |at| {
        slot.read_page(at, &mut page);
        crate::memory::digest_page(at, &page)
    };
    (0..slot.spec().pages).map(digest).collect()
}

#[test]
fn one_that_arrives_is_watched_once_it_is_owned_and_a_pager_is_there() {
    need_paging!();
    let (source, _pager) = paged();
    source.runs_on(2000);
    let destination = Host::new();
    let vm = source.machine.begin_outgoing(&migration(), 1).unwrap();
    let table = source.machine.memory().table();
    let slots: Vec<_> = table.slots().iter().map(|slot| slot.spec()).collect();
    let there = &destination.machine;
    there.begin_incoming(&migration(), &vm, &slots).unwrap();
    let pager = destination.pager();
    let left = source.machine.enter_switchover(&migration()).unwrap();
    let mut page = [0; 4096];
    for slot in table.slots() {
        let to = there.memory().table();
        let to = to.slot(slot.spec().slot).unwrap();
        for at in 0..slot.spec().pages {
            slot.read_page(at, &mut page);
            to.host().write(at as usize * 4096, &page);
        }
    }
    let state = source.machine.backend().unwrap().save_state().unwrap();
    prepare(there, &state).unwrap();
    assert!(destination.paging().is_none(), "not before it is owned");
    source.machine.relinquish(&migration()).unwrap();
    there.own(&migration(), left).unwrap();
    there.run_owned(&migration(), left).unwrap();
    until("it to be watched", || {
        let paging = destination.paging();
        paging.is_some_and(|paging| paging.state() == PagingState::Serving)
    });
    assert!(pager.seen.mapped_before.load(Ordering::Relaxed));
    destination.runs_on(5000);
    source.machine.release().unwrap();
    destination.finish();
}

#[test]
fn what_is_populated_before_it_is_watched_is_not_mapped_behind_the_pagers_back() {
    need_paging!();
    let host = Host::new();
    let spec = VmSpec {
        prefault: true,
        ..spec(Paging::Agent)
    };
    host.machine.create(spec).unwrap();
    let _pager = host.pager();
    until("memory to be there", || {
        let vm = host.machine.snapshot().unwrap();
        vm.prefault.unwrap().done
    });
    let slot = SlotSpec::new(9, 0x10_0000, 1024, false).unwrap();
    host.machine
        .update_slots(&[SlotChange::Create(slot)], 0)
        .unwrap();
    for slot in host.machine.memory().table().slots() {
        assert_eq!(slot.allocated().unwrap(), slot.spec().bytes());
        assert_eq!(crate::memory::resident(slot.guest().address()), 0);
    }
    host.machine.start().unwrap();
    host.runs_on(500);
    host.finish();
}
