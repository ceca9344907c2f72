//! Memories whose contents come from a source, as far as it has them and when it has them.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use slat_pager::Options;
use slat_paging::wire::{Ask, ProblemKind};

use crate::{
    source::{Fake, Wrong},
    vm::{Config, PATIENCE, Vm},
};

const PAGES: u64 = 2000;

fn config(source: &Arc<Fake>) -> Config {
    let mut config = Config::new(PAGES);
    config.memories = vec![(PAGES, Some(7))];
    let source: Arc<Fake> = Arc::clone(source);
    config.options = Options {
        source: Some(source),
        ..Options::default()
    };
    // A busy machine is no stalled source.
    config.options.tuning.stalled_after = PATIENCE;
    config
}

fn all_right(vm: &Vm, pages: impl Iterator<Item = u64>) {
    for page in pages {
        assert_eq!(vm.read(page), Fake::word(7, page), "page {page}");
    }
}

#[test]
fn pages_come_when_they_are_touched_by_many_threads_and_each_is_read_once() {
    let source = Arc::new(Fake::new());
    let Some(vm) = Vm::start(config(&source)) else {
        return;
    };
    std::thread::scope(|scope| {
        for seed in 0..6 {
            let vm = &vm;
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(seed);
                for _ in 0..700 {
                    let page = random.u64(..PAGES / 2);
                    // A word of its own, so that what was written is seen to stay.
                    let at = page * 2 + 1;
                    let found = vm.read(at);
                    assert!(
                        found == Fake::word(7, at) || found == at + 5,
                        "page {at}: {found}"
                    );
                    if random.bool() {
                        vm.write(at, at + 5);
                        assert_eq!(vm.read(at), at + 5);
                    }
                    assert_eq!(vm.read(page * 2), Fake::word(7, page * 2));
                }
            });
        }
    });
    let read = source.pages.load(Ordering::Relaxed);
    assert_eq!(vm.settled().load.loaded, read, "a page was read twice");
    vm.assert_mirrored();
    vm.stop();
}

#[test]
fn everything_comes_by_itself_and_zeroes_stay_holes() {
    let source = Arc::new(Fake::new());
    let mut config = config(&source);
    config.load_all = true;
    let Some(vm) = Vm::start(config) else { return };
    vm.loaded();
    let state = vm.state();
    assert_eq!((state.load.loaded, state.load.all), (PAGES, PAGES));
    let blocks = rustix::fs::fstat(&vm.mem().file).unwrap().st_blocks as u64;
    assert_eq!(blocks / 8, PAGES - PAGES / 4);
    all_right(&vm, 0..PAGES);
    assert_eq!(Arc::strong_count(&source), 2, "the source is held on to");
}

#[test]
fn a_source_that_fails_holds_up_its_own_pages_until_it_is_mended() {
    for kind in [ProblemKind::SourceGone, ProblemKind::SourceCorrupt] {
        let source = Arc::new(Fake::new());
        source.set(Wrong::Fails(kind), 160..320);
        let Some(vm) = Vm::start(config(&source)) else {
            return;
        };
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| all_right(&vm, 200..210));
            let told = vm.pushed(|state| state.problem.clone());
            assert_eq!(told.kind, kind);
            all_right(&vm, (0..150).chain(330..500));
            assert_eq!(vm.state().waiting, 1);
            let gfn = vm.mem().base_gfn;
            let load = vm.ask(Ask::Load {
                gfn,
                pages: 300,
                write: false,
            });
            assert_eq!(load.unwrap_err().kind, kind);
            vm.ask(Ask::LoadAll).unwrap_err();
            assert!(!waits.is_finished());
            source.set(Wrong::Nothing, 0..0);
            vm.done(Ask::Retry);
            waits.join().unwrap();
            vm.pushed(|state| state.problem.is_none().then_some(()));
            vm.done(Ask::LoadAll);
            vm.loaded();
        });
        all_right(&vm, 0..PAGES);
    }
}

#[test]
fn a_source_that_ends_early_is_said_to() {
    let source = Arc::new(Fake::new());
    source.set(Wrong::Short, 100..PAGES);
    let Some(vm) = Vm::start(config(&source)) else {
        return;
    };
    all_right(&vm, 0..96);
    let gfn = vm.mem().base_gfn + 90;
    let load = vm.ask(Ask::Load {
        gfn,
        pages: 30,
        write: true,
    });
    assert_eq!(load.unwrap_err().kind, ProblemKind::SourceTruncated);
    let problem = vm.pushed(|state| state.problem.clone());
    assert_eq!(problem.kind, ProblemKind::SourceTruncated);
}

#[test]
fn a_source_that_stalls_is_said_to_and_clears_when_it_comes() {
    let source = Arc::new(Fake::new());
    source.set(Wrong::Hangs, 160..320);
    let mut config = config(&source);
    config.options.tuning.stalled_after = Duration::from_secs(1);
    let Some(vm) = Vm::start(config) else { return };
    std::thread::scope(|scope| {
        let since = Instant::now();
        let waits = scope.spawn(|| all_right(&vm, 200..201));
        let told = vm.pushed(|state| state.problem.clone());
        assert_eq!(told.kind, ProblemKind::SourceStalled);
        assert!(since.elapsed() >= Duration::from_secs(1));
        all_right(&vm, 0..150);
        let gfn = vm.mem().base_gfn;
        let load = vm.ask(Ask::Load {
            gfn,
            pages: 300,
            write: false,
        });
        assert_eq!(load.unwrap_err().kind, ProblemKind::SourceStalled);
        source.set(Wrong::Nothing, 0..0);
        waits.join().unwrap();
        vm.pushed(|state| state.problem.is_none().then_some(()));
    });
    vm.done(Ask::LoadAll);
    vm.loaded();
    all_right(&vm, 0..PAGES);
}

#[test]
fn what_is_discarded_before_it_came_never_comes() {
    let mut source = Fake::new();
    source.delay = Duration::from_millis(20);
    let source = Arc::new(source);
    let Some(vm) = Vm::start(config(&source)) else {
        return;
    };
    let gfn = vm.mem().base_gfn;
    std::thread::scope(|scope| {
        // A read that is under way meanwhile.
        let touching = scope.spawn(|| vm.read(40));
        vm.done(Ask::Discard {
            gfn: gfn + 32,
            pages: 16,
        });
        assert!([0, Fake::word(7, 40)].contains(&touching.join().unwrap()));
    });
    for page in 32..48 {
        assert_eq!(vm.read(page), 0);
    }
    all_right(&vm, (0..32).chain(48..200));
    vm.done(Ask::LoadAll);
    assert_eq!(vm.contents(40), 0);
    vm.assert_mirrored();
}

#[test]
fn discards_loads_protections_snapshots_and_writes_at_once_end_as_they_should() {
    let source = Arc::new(Fake::new());
    let Some(mut vm) = Vm::start(config(&source)) else {
        return;
    };
    let gfn = vm.mem().base_gfn;
    // Guards from the beginning, so that every first write and discard keeps.
    vm.arm(1);
    vm.begin(1);
    let can_protect = vm.offer.protect;
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let vm = &vm;
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(seed);
                for _ in 0..600 {
                    let page = random.u64(..PAGES);
                    let found = vm.read(page);
                    let known = [0, Fake::word(7, page), page + 5];
                    assert!(known.contains(&found), "page {page}: {found}");
                    if random.bool() {
                        vm.write(page, page + 5);
                    }
                }
            });
        }
        let vm = &vm;
        scope.spawn(move || {
            let mut random = fastrand::Rng::with_seed(99);
            for _ in 0..60 {
                let (gfn, pages) = (gfn + random.u64(..PAGES - 40), random.u64(1..40));
                vm.done(Ask::Discard { gfn, pages });
            }
        });
        scope.spawn(move || {
            for first in (0..PAGES).step_by(100) {
                let gfn = gfn + first;
                let write = first % 200 == 0;
                vm.done(Ask::Load {
                    gfn,
                    pages: 100,
                    write,
                });
                if can_protect {
                    let (gfn, pages) = (vm.mem().base_gfn, PAGES);
                    vm.done(Ask::Protect { gfn, pages });
                }
            }
        });
    });
    assert_eq!(vm.settled().waiting, 0);
    vm.assert_mirrored();
    vm.stop();
}

#[test]
fn a_guest_that_is_not_watched_is_loaded_and_nothing_else() {
    let source = Arc::new(Fake::new());
    let mut config = config(&source);
    config.watched = false;
    config.load_all = true;
    let Some(vm) = Vm::start(config) else { return };
    vm.done(Ask::LoadAll);
    vm.loaded();
    for page in 0..PAGES {
        assert_eq!(vm.contents(page), Fake::word(7, page));
    }
    let gfn = vm.mem().base_gfn;
    assert_eq!(
        vm.ask(Ask::Unmap { gfn, pages: 1 }).unwrap_err().kind,
        ProblemKind::Refused
    );
    vm.done(Ask::Discard { gfn, pages: 10 });
    assert_eq!((vm.contents(2), vm.contents(12)), (0, Fake::word(7, 12)));
    vm.stop();
}

#[test]
fn what_lacked_memory_is_tried_again_by_itself() {
    let source = Arc::new(Fake::new());
    source.set(Wrong::Fails(ProblemKind::NoMemory), 0..PAGES);
    let Some(vm) = Vm::start(config(&source)) else {
        return;
    };
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| all_right(&vm, 5..6));
        let told = vm.pushed(|state| state.problem.clone());
        assert_eq!(told.kind, ProblemKind::NoMemory);
        source.set(Wrong::Nothing, 0..0);
        waits.join().unwrap();
        vm.pushed(|state| state.problem.is_none().then_some(()));
    });
}

#[test]
fn who_waits_for_a_page_that_fails_goes_on_when_it_is_discarded() {
    let source = Arc::new(Fake::new());
    source.set(Wrong::Fails(ProblemKind::SourceCorrupt), 160..176);
    let Some(vm) = Vm::start(config(&source)) else {
        return;
    };
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| vm.read(165));
        vm.pushed(|state| state.problem.clone());
        let gfn = vm.mem().base_gfn + 160;
        vm.done(Ask::Discard { gfn, pages: 16 });
        assert_eq!(waits.join().unwrap(), 0);
    });
    vm.pushed(|state| state.problem.is_none().then_some(()));
    vm.assert_mirrored();
}
