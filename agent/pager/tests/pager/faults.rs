//! Faults of a guest without a source.

use rustix::io::pwrite;
use slat_paging::{
    PAGE,
    wire::{Answer, Ask},
};

use crate::vm::{Config, Vm};

#[test]
fn what_was_never_written_is_zeroes_and_what_was_is_there() {
    let Some(vm) = Vm::start(Config::new(600)) else {
        return;
    };
    pwrite(&vm.mem().file, &7_u64.to_ne_bytes(), 5 * PAGE as u64).unwrap();
    assert_eq!((vm.read(5), vm.read(6), vm.read(599)), (7, 0, 0));
    vm.write(300, 9);
    assert_eq!((vm.read(300), vm.contents(300)), (9, 9));
    let faults = vm.settled().faults;
    assert_eq!((faults.minor, faults.missing), (1, 3));
    vm.assert_mirrored();
    vm.stop();
}

#[test]
fn pages_of_the_file_come_with_their_neighbours() {
    let Some(vm) = Vm::start(Config::new(2048)) else {
        return;
    };
    pwrite(&vm.mem().file, &vec![1; 2048 * PAGE], 0).unwrap();
    for page in 0..2048 {
        assert_ne!(vm.read(page), 0);
    }
    let state = vm.settled();
    assert!(state.faults.minor < 40, "{:?}", state.faults);
    assert_eq!(state.mapped_pages[0], 2048);
    assert_eq!(
        state.latency.buckets.iter().sum::<u64>(),
        state.faults.minor
    );
    vm.assert_mirrored();
}

#[test]
fn what_is_unmapped_keeps_its_contents_and_what_is_discarded_does_not() {
    let Some(vm) = Vm::start(Config::new(64)) else {
        return;
    };
    (0..64).for_each(|page| vm.write(page, page + 1));
    let gfn = vm.mem().base_gfn;
    vm.done(Ask::Unmap { gfn, pages: 32 });
    assert!(vm.mem().view.pagemap()[..32].iter().all(|page| !page.0));
    vm.assert_mirrored();
    vm.done(Ask::Discard {
        gfn: gfn + 16,
        pages: 32,
    });
    vm.assert_mirrored();
    for page in 0..64 {
        let expected = if (16..48).contains(&page) {
            0
        } else {
            page + 1
        };
        assert_eq!(vm.read(page), expected);
    }
    assert_eq!(vm.settled().mapped_pages[0], 64);
}

#[test]
fn what_is_aged_was_mapped_and_comes_again() {
    let Some(vm) = Vm::start(Config::new(256)) else {
        return;
    };
    (10..20).for_each(|page| vm.write(page, 1));
    let gfn = vm.mem().base_gfn;
    let age = || vm.ask(Ask::Age { gfn, pages: 256 }).unwrap();
    let Answer::Frames(runs) = age() else {
        panic!()
    };
    assert!(
        runs.iter()
            .any(|(first, count)| *first <= gfn + 10 && first + count >= gfn + 20)
    );
    assert_eq!(age(), Answer::Frames(Vec::new()));
    assert_eq!(vm.read(13), 1);
    let Answer::Frames(runs) = age() else {
        panic!()
    };
    assert!(
        runs.iter()
            .any(|(first, count)| (*first..first + count).contains(&(gfn + 13)))
    );
}

#[test]
fn what_is_protected_becomes_writable_by_the_next_write() {
    let Some(vm) = Vm::start(Config::new(64)) else {
        return;
    };
    if !vm.offer.protect {
        println!("SKIPPED: this kernel protects no shared memory");
        return;
    }
    (0..64).for_each(|page| vm.write(page, 1));
    let gfn = vm.mem().base_gfn;
    vm.done(Ask::Protect { gfn, pages: 64 });
    vm.assert_mirrored();
    assert!(vm.mem().view.pagemap().iter().all(|page| page.1));
    vm.write(30, 2);
    assert_eq!(vm.settled().faults.write_protect, 1);
    vm.assert_mirrored();
    assert!(!vm.mem().view.pagemap()[30].1 && vm.mem().view.pagemap()[31].1);
}

#[test]
fn a_memory_that_moves_is_mapped_nowhere_until_it_is_touched_and_one_that_is_removed_is_gone() {
    let mut config = Config::new(32);
    config.memories.push((32, None));
    let Some(vm) = Vm::start(config) else { return };
    vm.memories.iter().for_each(|mem| mem.view.write(3, 5));
    vm.done(Ask::Move {
        memory: 0,
        base_gfn: 0x9000,
    });
    assert!(vm.mem().view.pagemap().iter().all(|page| !page.0));
    assert_eq!(vm.read(3), 5);
    vm.settled();
    let Ok(Answer::Mapped { runs, .. }) = vm.ask(Ask::Mapped {
        gfn: 0x9000,
        pages: 32,
    }) else {
        panic!()
    };
    assert!(
        runs.iter()
            .any(|run| run.gfn <= 0x9003 && run.gfn + run.pages > 0x9003)
    );
    vm.done(Ask::Remove { memory: 1 });
    vm.ask(Ask::Remove { memory: 1 }).unwrap_err();
    assert_eq!(
        vm.memories[1].view.read(3),
        5,
        "a mapping that was not taken away"
    );
}

#[test]
fn faults_of_many_threads_are_all_resolved() {
    let Some(vm) = Vm::start(Config::new(4096)) else {
        return;
    };
    std::thread::scope(|scope| {
        for seed in 0..8 {
            let vm = &vm;
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(seed);
                for _ in 0..500 {
                    let page = random.u64(..512) * 8 + seed;
                    let before = vm.read(page);
                    vm.write(page, before + 1);
                    assert_eq!(vm.read(page), before + 1);
                }
            });
        }
        let vm = &vm;
        scope.spawn(move || {
            for round in 0..30 {
                let gfn = vm.mem().base_gfn + round * 100;
                vm.done(Ask::Unmap { gfn, pages: 512 });
            }
        });
    });
    let sum: u64 = (0..4096).map(|page| vm.read(page)).sum();
    assert_eq!(sum, 8 * 500);
    assert_eq!(vm.settled().waiting, 0);
    vm.assert_mirrored();
}

#[test]
fn tables_of_what_was_unmapped_are_used_again_while_the_guest_stands_still() {
    let Some(vm) = Vm::start(Config::new(4096)) else {
        return;
    };
    let gfn = vm.mem().base_gfn;
    let round = || {
        (0..4096).step_by(100).for_each(|page| vm.write(page, 1));
        let mapped = vm.settled().table_pages;
        // From here on nobody faults.
        vm.done(Ask::Unmap { gfn, pages: 4096 });
        let state = vm.state();
        assert_eq!(state.mapped_pages[0], 0);
        (mapped, state.table_pages)
    };
    let first = round();
    assert!(first.1 <= first.0, "{first:?}");
    for _ in 0..4 {
        assert_eq!(round(), first);
    }
}

/// Which pages are mapped, as the kernel has it.
fn mapped(vm: &Vm) -> Vec<u64> {
    let pages = vm.mem().view.pagemap();
    let mapped = (0..).zip(&pages).filter(|(_, page)| page.0);
    mapped.map(|(page, _)| page).collect()
}

#[test]
fn a_random_fault_maps_the_group_around_it_as_far_as_it_is_in_the_file() {
    let Some(vm) = Vm::start(Config::new(256)) else {
        return;
    };
    // Groups are of frames.
    assert_eq!(vm.mem().base_gfn % 16, 0);
    let fill = |page: u64, pages: usize| {
        pwrite(&vm.mem().file, &vec![1; pages * PAGE], page * PAGE as u64).unwrap();
    };
    fill(32, 16);
    assert_ne!(vm.read(41), 0);
    assert_eq!(mapped(&vm), (32..48).collect::<Vec<_>>());
    // A hole behind it, and then one before it.
    fill(128, 10);
    assert_ne!(vm.read(135), 0);
    let all = (32..48).chain(128..138);
    assert_eq!(mapped(&vm), all.clone().collect::<Vec<_>>());
    fill(198, 10);
    assert_ne!(vm.read(203), 0);
    let all = all.chain(203..208);
    assert_eq!(mapped(&vm), all.collect::<Vec<_>>());
    let faults = vm.settled().faults;
    assert_eq!((faults.minor, faults.missing), (3, 0));
    vm.assert_mirrored();
}

#[test]
fn while_a_snapshot_is_armed_a_write_maps_one_page_and_a_read_maps_its_group_protected() {
    let Some(mut vm) = Vm::start(Config::new(256)) else {
        return;
    };
    if !vm.offer.protect {
        println!("SKIPPED: this kernel protects no shared memory");
        return;
    }
    pwrite(&vm.mem().file, &vec![1; 256 * PAGE], 0).unwrap();
    vm.arm(1);
    vm.write(40, 2);
    assert_eq!(mapped(&vm), [40]);
    assert_ne!(vm.read(70), 0);
    let pages = vm.mem().view.pagemap();
    assert!((64..80).all(|page| pages[page] == (true, true)));
    // Neighbours of a page that a snapshot guards stay as they are.
    vm.begin(1);
    vm.write(43, 2);
    vm.assert_mirrored();
    let writable = (0..256).filter(|page| vm.mem().view.pagemap()[*page] == (true, false));
    assert_eq!(writable.collect::<Vec<_>>(), [43]);
}
