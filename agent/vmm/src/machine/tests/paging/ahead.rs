//! Pages that are mapped ahead, readers of the working set, and what a save says of it.

use slat_proto::model::{CursorName, SlotChange, SlotSpec};

use super::*;

fn created() -> (Host, FakePager, SlotSpec) {
    let host = Host::new();
    host.machine.create(spec(Paging::Agent)).unwrap();
    let pager = host.pager();
    let table = host.machine.memory().table();
    let last = table.slots().iter().map(|slot| slot.spec());
    let last = last.max_by_key(|spec| spec.base_gfn).unwrap();
    (host, pager, last)
}

fn mapped(host: &Host) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    let mut from = 0;
    loop {
        let (more, next) = host.machine.list_mappings(from).unwrap();
        for run in more {
            match runs.last_mut() {
                Some((gfn, pages)) if *gfn + *pages == run.gfn => *pages += run.pages,
                _ => runs.push((run.gfn, run.pages)),
            }
        }
        match next {
            Some(next) => from = next,
            None => return runs,
        }
    }
}

#[test]
fn pages_are_mapped_ahead_as_far_as_there_is_a_slot() {
    need_paging!();
    let (host, _pager, slot) = created();
    let (base, end) = (slot.base_gfn, slot.end_gfn());
    // In more than one piece.
    let done = host.machine.prefault_memory(base + 3, 2500).unwrap();
    assert_eq!(done, (2500, None));
    assert_eq!(mapped(&host), [(base + 3, 2500)]);
    // Progress first, then the error.
    let done = host.machine.prefault_memory(end - 10, 25).unwrap();
    assert_eq!(done, (10, Some(end)));
    let error = host.machine.prefault_memory(end, 15).unwrap_err();
    assert_eq!(error.reason, Reason::BadParameter);
    assert_eq!(error.metadata["gfn"], end.to_string());
    for (gfn, pages) in [(base, 0), (u64::MAX, 2), (u64::MAX, 1)] {
        let error = host.machine.prefault_memory(gfn, pages).unwrap_err();
        assert_eq!(error.reason, Reason::BadParameter, "{gfn} {pages}");
    }
    // Over two slots that touch.
    let next = SlotSpec::new(9, end, 64, false).unwrap();
    let come = SlotChange::Create(next);
    host.machine.update_slots(&[come], 0).unwrap();
    let done = host.machine.prefault_memory(end - 20, 84).unwrap();
    assert_eq!(done, (84, None));
    host.machine.start().unwrap();
    host.runs_on(2000);
    host.finish();
}

#[test]
fn a_slot_that_comes_and_goes_ends_it_by_name() {
    need_paging!();
    let (host, _pager, slot) = created();
    let end = slot.end_gfn();
    let come = SlotChange::Create(SlotSpec::new(9, end, 256, false).unwrap());
    let go = SlotChange::Delete { slot: 9 };
    std::thread::scope(|scope| {
        let changing = scope.spawn(|| {
            for _ in 0..20 {
                host.machine.update_slots(&[come], 0).unwrap();
                host.machine.update_slots(&[go], 0).unwrap();
            }
        });
        let mut calls = 0;
        while !changing.is_finished() || calls == 0 {
            calls += 1;
            match host.machine.prefault_memory(end - 8, 8 + 256) {
                Ok((done, next)) => {
                    assert!((8..=264).contains(&done), "{done}");
                    assert_eq!(next, (done < 264).then_some(end - 8 + done));
                }
                Err(error) => panic!("the first pages are always there: {error}"),
            }
            if let Err(error) = host.machine.prefault_memory(end, 256) {
                let gone = [Reason::BadParameter, Reason::VmState];
                assert!(gone.contains(&error.reason), "{error}");
            }
        }
    });
    host.machine.start().unwrap();
    host.finish();
}

#[test]
fn each_reader_is_told_what_any_found_since_its_last_look() {
    need_paging!();
    let (host, _pager, slot) = created();
    let name = |text: &str| CursorName::from_id(text).unwrap();
    let (a, b) = (name("a"), name("b"));
    let base = slot.base_gfn + 512;
    let touch = |page: u64, pages: u64| {
        host.machine.prefault_memory(base + page, pages).unwrap();
    };
    let read = |reader: &CursorName| host.machine.harvest_for_reader(reader, None, false);
    touch(0, 4);
    assert_eq!(read(&a).unwrap(), (vec![(base, 4)], true));
    touch(10, 2);
    assert_eq!(read(&b).unwrap(), (vec![(base + 10, 2)], true));
    touch(20, 1);
    let (unnamed, _) = host.machine.harvest_working_set(None).unwrap();
    assert_eq!(unnamed, [(base + 20, 1)]);
    touch(30, 1);
    let all = vec![(base + 10, 2), (base + 20, 1), (base + 30, 1)];
    assert_eq!(read(&a).unwrap(), (all, false));
    assert_eq!(read(&a).unwrap(), (vec![], false));
    // Only a part of what is there to be told.
    let part = Some((base + 20, 5));
    let told = host.machine.harvest_for_reader(&b, part, false).unwrap();
    assert_eq!(told.0, [(base + 20, 1)]);
    let last = host.machine.harvest_for_reader(&b, None, true).unwrap();
    assert_eq!(last.0, [(base + 30, 1)]);
    assert!(read(&b).unwrap().1, "it ended, and is made anew");
    for number in 2..16 {
        read(&name(&format!("r{number}"))).unwrap();
    }
    let error = read(&name("more")).unwrap_err();
    assert_eq!(error.reason, Reason::LimitReached);
    host.machine.harvest_working_set(None).unwrap();
    host.machine.start().unwrap();
    host.finish();
}

#[test]
fn a_save_says_what_was_touched_and_a_fork_and_the_kernels_guest_do_not() {
    need_paging!();
    let (host, _pager, slot) = created();
    let base = slot.base_gfn;
    host.machine.prefault_memory(base + 700, 3).unwrap();
    host.machine.prefault_memory(base + 705, 2).unwrap();
    let taken = host.machine.take_snapshot("saves/s", false).unwrap();
    let touched = taken.touched.iter();
    let touched = touched.map(|run| (run.slot, run.page, run.pages));
    let touched: Vec<_> = touched.collect();
    assert_eq!(touched, [(slot.slot, 700, 3), (slot.slot, 705, 2)]);
    let fork = host.machine.take_snapshot("vms/copy", false).unwrap();
    assert!(fork.touched.is_empty());
    host.machine.delete().unwrap();
    let host = Host::new();
    host.machine.create(spec(Paging::Kernel)).unwrap();
    let _pager = host.pager();
    let taken = host.machine.take_snapshot("saves/s", false).unwrap();
    assert!(taken.touched.is_empty());
    host.machine.delete().unwrap();
}
