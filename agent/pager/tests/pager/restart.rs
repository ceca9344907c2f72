//! A pager that dies, and the next one.

use std::sync::{
    Arc, RwLock,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use slat_pager::Options;

use crate::{
    source::Fake,
    view::End,
    vm::{Config, Vm},
};

const PAGES: u64 = 1000;

#[test]
fn the_guest_goes_on_and_nothing_is_lost_when_pagers_die() {
    let source = Arc::new(Fake::new());
    let mut config = Config::new(PAGES);
    config.memories = vec![(PAGES, Some(7))];
    config.options.source = Some(Arc::clone(&source) as _);
    let Some(vm) = Vm::start(config) else { return };
    let vm = RwLock::new(vm);
    // The pager is replaced while others touch: they use the memories alone.
    let memories = Arc::clone(&vm.read().unwrap().memories);
    let (stop, touched) = (AtomicBool::new(false), AtomicU64::new(0));
    let (stop, touched) = (&stop, &touched);
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let view = &memories[0].view;
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(seed);
                let mut counts = vec![0; PAGES as usize];
                while !stop.load(Ordering::Relaxed) {
                    let page = random.u64(..PAGES / 4) * 4 + seed;
                    let count = &mut counts[page as usize];
                    let before = if *count == 0 {
                        Fake::word(7, page)
                    } else {
                        *count
                    };
                    assert_eq!(view.read(page), before, "page {page}");
                    *count = before + 1;
                    view.write(page, *count);
                    touched.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let _end = End(stop);
        for round in 0..6 {
            let before = touched.load(Ordering::Relaxed);
            let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
            while touched.load(Ordering::Relaxed) < before + 300 {
                assert!(
                    std::time::Instant::now() < end,
                    "nobody goes on in round {round}"
                );
                std::thread::yield_now();
            }
            let mut vm = vm.write().unwrap();
            vm.kill_pager();
            let swept = round % 2 == 0;
            if !swept {
                vm.mem().view.drop_mappings(0, PAGES);
            }
            let options = Options {
                source: Some(Arc::clone(&source) as _),
                ..Options::default()
            };
            vm.attach(options, swept);
            vm.wake();
        }
    });
    let vm = vm.into_inner().unwrap();
    assert_eq!(vm.settled().waiting, 0);
    // Asked after the sweep.
    vm.assert_mirrored();
    vm.stop();
}

#[test]
fn a_snapshot_outlives_the_pager() {
    let Some(mut vm) = Vm::start(Config::new(PAGES)) else {
        return;
    };
    (0..PAGES).for_each(|page| vm.write(page, page + 1));
    vm.arm(1);
    vm.begin(1);
    (0..100).for_each(|page| vm.write(page, 5));
    vm.kill_pager();
    vm.attach(Options::default(), true);
    vm.wake();
    (50..200).for_each(|page| vm.write(page, 6));
    let layers = vm.layers_of(1);
    let mut config = Config::new(PAGES);
    config.memories = vec![(PAGES, Some(0))];
    let child = Vm::start_with(config, layers).unwrap();
    for page in 0..PAGES {
        assert_eq!(child.read(page), page + 1, "page {page}");
    }
    vm.assert_mirrored();
}
