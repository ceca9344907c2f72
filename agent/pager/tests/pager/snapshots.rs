//! Snapshots: what a reader sees while the guest writes on.

use std::sync::{
    RwLock,
    atomic::{AtomicBool, Ordering},
};

use slat_paging::wire::{Answer, Ask};

use crate::{
    layers::LayerFds,
    view::End,
    vm::{Config, Vm},
};

const PAGES: u64 = 700;

/// A child of a snapshot: its memory begins with what is in the layers.
fn child(layers: Vec<LayerFds>, protect: bool) -> Vm {
    child_of(PAGES, layers, protect)
}

fn child_of(pages: u64, layers: Vec<LayerFds>, protect: bool) -> Vm {
    let mut config = Config::new(pages);
    config.memories = vec![(pages, Some(0))];
    config.can_protect = protect;
    Vm::start_with(config, layers).unwrap()
}

fn image(vm: &Vm) -> Vec<u64> {
    (0..PAGES).map(|page| vm.contents(page)).collect()
}

/// Runs `body` while threads write, each under the gate.
fn while_writing(vm: &RwLock<Vm>, threads: u64, body: impl FnOnce()) {
    let stop = AtomicBool::new(false);
    let stop = &stop;
    std::thread::scope(|scope| {
        for seed in 0..threads {
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(seed);
                let mut value = seed << 40;
                while !stop.load(Ordering::Relaxed) {
                    let vm = vm.read().unwrap();
                    let first = random.u64(..PAGES);
                    for page in (first..PAGES).take(random.usize(1..20)) {
                        value += 1;
                        vm.write(page, value);
                    }
                }
            });
        }
        let _end = End(stop);
        body();
    });
}

fn moment_is_kept(protect: bool) {
    let mut config = Config::new(PAGES);
    config.can_protect = protect;
    let Some(vm) = Vm::start(config) else { return };
    (0..PAGES / 2).for_each(|page| vm.write(page * 2, page + 1));
    let vm = RwLock::new(vm);
    while_writing(&vm, 3, || {
        for number in 1..4 {
            // Armed while the others write; they hold the gate for reading, and so does this.
            let (layers, moment) = {
                let mut vm = vm.write().unwrap();
                let armed = vm.arm(number);
                assert!(matches!(armed, Answer::Armed { .. }));
                vm.begin(number);
                let moment = image(&vm);
                (vm.layers_of(number), moment)
            };
            let child = child(layers, protect);
            let mut random = fastrand::Rng::with_seed(number);
            for _ in 0..PAGES {
                let page = random.u64(..PAGES);
                assert_eq!(child.read(page), moment[page as usize], "page {page}");
            }
            child.done(Ask::LoadAll);
            child.loaded();
            assert_eq!(image(&child), moment);
            child.assert_mirrored();
            child.stop();
            vm.read().unwrap().snapshot_ended(number);
        }
    });
    let vm = vm.into_inner().unwrap();
    assert!(vm.settled().kept_pages > 0);
    vm.assert_mirrored();
    vm.stop();
}

#[test]
fn a_child_sees_the_moment_while_its_parent_writes_on() {
    moment_is_kept(true);
}

#[test]
fn the_same_where_pages_cannot_be_protected() {
    moment_is_kept(false);
}

#[test]
fn a_child_writes_its_own_and_its_parent_never_sees_it() {
    let Some(mut vm) = Vm::start(Config::new(PAGES)) else {
        return;
    };
    (0..PAGES).for_each(|page| vm.write(page, page + 1));
    let layers = vm.fork(1);
    let child = child(layers, true);
    (0..PAGES).step_by(3).for_each(|page| child.write(page, 5));
    (0..PAGES).step_by(2).for_each(|page| vm.write(page, 6));
    for page in 0..PAGES {
        let expected = if page % 3 == 0 { 5 } else { page + 1 };
        assert_eq!(child.read(page), expected, "page {page}");
        let expected = if page % 2 == 0 { 6 } else { page + 1 };
        assert_eq!(vm.read(page), expected, "page {page}");
    }
}

#[test]
fn arming_leaves_little_to_protect_however_fast_the_guest_writes() {
    let Some(mut vm) = Vm::start(Config::new(PAGES)) else {
        return;
    };
    (0..PAGES).for_each(|page| vm.write(page, 1));
    let armed = vm.arm(1);
    assert!(
        matches!(armed, Answer::Armed { left: 0, rounds: 1 }),
        "{armed:?}"
    );
    vm.write(8, 2);
    vm.begin(1);
    vm.write(8, 3);
    vm.write(9, 3);
    let layers = vm.layers_of(1);
    let child = child(layers, true);
    assert_eq!((child.read(8), child.read(9)), (2, 1));
    vm.ask(Ask::Begin { snapshot: 1 }).unwrap_err();
    vm.ask(Ask::Arm { snapshot: 5 }).unwrap_err();
}

#[test]
fn two_snapshots_at_once_have_each_their_own_moment() {
    let Some(mut vm) = Vm::start(Config::new(PAGES)) else {
        return;
    };
    (0..PAGES).for_each(|page| vm.write(page, 1));
    let first = vm.fork(1);
    (0..PAGES).step_by(2).for_each(|page| vm.write(page, 2));
    let second = vm.fork(2);
    (0..PAGES).step_by(3).for_each(|page| vm.write(page, 3));
    let gfn = vm.mem().base_gfn;
    vm.done(Ask::Discard {
        gfn: gfn + 10,
        pages: 100,
    });
    vm.done(Ask::Load {
        gfn: gfn + 200,
        pages: 100,
        write: true,
    });
    let (first, second) = (child(first, true), child(second, true));
    for page in 0..PAGES {
        assert_eq!(first.read(page), 1, "page {page}");
        assert_eq!(
            second.read(page),
            if page % 2 == 0 { 2 } else { 1 },
            "page {page}"
        );
    }
    vm.done(Ask::EndSnapshot { snapshot: 1 });
    vm.ask(Ask::EndSnapshot { snapshot: 1 }).unwrap_err();
    drop(second);
    vm.snapshot_ended(2);
    let kept = vm.settled().kept_pages;
    (0..PAGES).for_each(|page| vm.write(page, 4));
    assert_eq!(vm.settled().kept_pages, kept);
    vm.assert_mirrored();
}

#[test]
fn a_chain_of_three_is_read_through_while_all_write() {
    let Some(vm) = Vm::start(Config::new(PAGES)) else {
        return;
    };
    (0..PAGES).for_each(|page| vm.write(page, page * 10 + 1));
    let vm = RwLock::new(vm);
    while_writing(&vm, 2, || {
        let (layers, oldest) = {
            let mut vm = vm.write().unwrap();
            let layers = vm.fork(1);
            (layers, image(&vm))
        };
        let middle = RwLock::new(child(layers, true));
        let mut expected = oldest.clone();
        {
            let middle = middle.read().unwrap();
            for page in (0..PAGES).step_by(5) {
                middle.write(page, 77);
                expected[page as usize] = 77;
            }
            let gfn = middle.mem().base_gfn + 300;
            middle.done(Ask::Discard { gfn, pages: 30 });
            expected[300..330].fill(0);
        }
        let layers = middle.write().unwrap().fork(2);
        while_writing(&middle, 2, || {
            let youngest = child(layers, true);
            let mut random = fastrand::Rng::with_seed(3);
            for _ in 0..2 * PAGES {
                let page = random.u64(..PAGES);
                assert_eq!(youngest.read(page), expected[page as usize], "page {page}");
            }
            youngest.done(Ask::LoadAll);
            youngest.loaded();
            assert_eq!(image(&youngest), expected);
            youngest.assert_mirrored();
        });
    });
}

#[test]
fn a_reader_that_dies_ends_its_snapshot() {
    let Some(mut vm) = Vm::start(Config::new(PAGES)) else {
        return;
    };
    (0..PAGES).for_each(|page| vm.write(page, 1));
    let layers = vm.fork(1);
    vm.write(0, 2);
    assert!(vm.settled().kept_pages > 0);
    drop(layers);
    vm.snapshot_ended(1);
    (0..PAGES).for_each(|page| vm.write(page, 3));
    assert!(vm.settled().kept_pages < 40);
    vm.assert_mirrored();
}

#[test]
fn what_a_child_has_its_parent_need_not_keep() {
    let Some(mut vm) = Vm::start(Config::new(PAGES)) else {
        return;
    };
    (0..PAGES).for_each(|page| vm.write(page, 1));
    let layers = vm.fork(1);
    let child = child(layers, true);
    (0..100).for_each(|page| assert_eq!(child.read(page), 1));
    (0..100).for_each(|page| vm.write(page, 2));
    assert_eq!(vm.settled().kept_pages, 0);
    (100..200).for_each(|page| vm.write(page, 2));
    assert!(vm.settled().kept_pages >= 100 - 64);
    (0..200).for_each(|page| assert_eq!(child.read(page), 1));
}

#[test]
fn where_pages_cannot_be_protected_one_round_is_all() {
    const MANY: u64 = 400;
    let mut config = Config::new(4096);
    config.can_protect = false;
    let Some(mut vm) = Vm::start(config) else {
        return;
    };
    vm.write(0, 1);
    vm.announce(1);
    let hears = vm.hears();
    hears.hold();
    let armed = vm.send(Ask::Arm { snapshot: 1 });
    // While the first round is under way the guest has more than a few pages mapped.
    hears.held();
    (1000..1000 + MANY).for_each(|page| vm.write(page, 1));
    hears.let_go();
    let Ok(Answer::Armed { left, rounds }) = vm.reply(armed) else {
        panic!("not armed");
    };
    assert_eq!((left, rounds), (MANY, 1));
    vm.begin(1);
    (1000..1000 + MANY).for_each(|page| vm.write(page, 2));
    let layers = vm.layers_of(1);
    let child = child_of(4096, layers, false);
    assert!((1000..1000 + MANY).all(|page| child.read(page) == 1));
}
