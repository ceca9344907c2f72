//! Figures, for people: `cargo test --release -p slat-pager --test pager -- --ignored measure`.
//!
//! Each is beside the same with a bare handler, which reads a fault and maps the page.

use std::{
    os::fd::OwnedFd,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{FallocateFlags, fallocate},
    io::pwrite,
};
use slat_paging::{
    PAGE,
    uffd::{Uffd, Watch},
    wire::Ask,
};

use crate::{
    saves,
    view::{View, file},
    vm::{Config, Vm},
};

const PAGES: u64 = 8192;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    Continue,
    Zero,
    Allocate,
}

/// Times of touches in this order, sorted.
fn touches(order: &[u64], touch: impl Fn(u64)) -> Vec<Duration> {
    let mut times: Vec<Duration> = order
        .iter()
        .map(|page| {
            let since = Instant::now();
            touch(*page);
            since.elapsed()
        })
        .collect();
    times.sort();
    times
}

fn say(what: &str, times: &[Duration]) {
    if times.is_empty() {
        return;
    }
    let at = |part: usize| times[times.len() * part / 100];
    let sum: Duration = times.iter().sum();
    let mean = sum / times.len() as u32;
    println!(
        "{what:44} p50 {:>9.2?} p95 {:>9.2?} p99 {:>9.2?} mean {mean:>9.2?} all {sum:.2?}",
        at(50),
        at(95),
        at(99)
    );
}

fn filled() -> OwnedFd {
    let file = file("test-memory", PAGES);
    pwrite(&file, &vec![1; PAGES as usize * PAGE], 0).unwrap();
    file
}

/// The same by several threads at once, each with a part of the order.
fn touches_by(threads: usize, order: &[u64], touch: impl Fn(u64) + Sync) -> Vec<Duration> {
    let mut times: Vec<Duration> = std::thread::scope(|scope| {
        let parts = order.chunks(order.len().div_ceil(threads));
        let touch = &touch;
        let running: Vec<_> = parts
            .map(|part| scope.spawn(move || touches(part, touch)))
            .collect();
        let times = running.into_iter().map(|thread| thread.join().unwrap());
        times.flatten().collect()
    });
    times.sort();
    times
}

/// A handler that does nothing else.
fn bare(order: &[u64], how: How) -> Option<Vec<Duration>> {
    bare_by(1, order, how)
}

fn bare_by(threads: usize, order: &[u64], how: How) -> Option<Vec<Duration>> {
    let (uffd, _) = Uffd::open().ok()?;
    let file = if how == How::Continue {
        filled()
    } else {
        file("test-memory", PAGES)
    };
    let view = View::new(&file, PAGES);
    let watch = Watch::MISSING | Watch::MINOR;
    uffd.register(view.address(), PAGES * PAGE as u64, watch)
        .unwrap();
    let stop = AtomicBool::new(false);
    let times = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut faults = Vec::new();
            let patience = Timespec {
                tv_sec: 0,
                tv_nsec: 50_000_000,
            };
            while !stop.load(Ordering::Relaxed) {
                faults.clear();
                if uffd.read(&mut faults).is_err() {
                    let _ = poll(&mut [PollFd::new(&uffd, PollFlags::IN)], Some(&patience));
                    continue;
                }
                for fault in &faults {
                    if how == How::Allocate {
                        let at = fault.address - view.address();
                        fallocate(&file, FallocateFlags::KEEP_SIZE, at, PAGE as u64).unwrap();
                    }
                    let done = match how {
                        How::Zero => uffd.zero(fault.address, PAGE as u64),
                        _ => uffd.map(fault.address, PAGE as u64, false, true),
                    };
                    assert!(done.error.is_none());
                }
            }
        });
        let times = touches_by(threads, order, |page| _ = view.read(page));
        stop.store(true, Ordering::Relaxed);
        times
    });
    Some(times)
}

/// Far from each other, each once.
fn random() -> Vec<u64> {
    let mut order: Vec<u64> = (0..PAGES).step_by(2).collect();
    fastrand::Rng::with_seed(1).shuffle(&mut order);
    order
}

#[test]
#[ignore = "figures, no test"]
fn measure_faults() {
    for round in 0..3 {
        println!("round {round}");
        let order = random();
        for how in [How::Continue, How::Zero, How::Allocate] {
            let Some(times) = bare(&order, how) else {
                return;
            };
            say(&format!("bare, random, {how:?}"), &times);
        }
        let alone = |full: bool, around: u64| {
            let mut config = Config::new(PAGES);
            config.options.tuning.around = around;
            let vm = Vm::start(config).unwrap();
            if full {
                pwrite(&vm.mem().file, &vec![1; PAGES as usize * PAGE], 0).unwrap();
            }
            vm
        };
        for around in [1, 16] {
            let vm = alone(true, around);
            let times = touches(&order, |page| _ = vm.read(page));
            say(
                &format!("pager, random, in the file, around {around}"),
                &times,
            );
        }
        let vm = alone(false, 16);
        let times = touches(&order, |page| _ = vm.read(page));
        say("pager, random, not in the file", &times);
        let order: Vec<u64> = (0..PAGES).collect();
        say(
            "bare, in order, in the file",
            &bare(&order, How::Continue).unwrap(),
        );
        for full in [true, false] {
            let vm = alone(full, 16);
            let times = touches(&order, |page| vm.write(page, 1));
            say(&format!("pager, in order, in the file: {full}"), &times);
        }
        let mut vm = alone(true, 16);
        (0..PAGES).for_each(|page| vm.write(page, 2));
        let since = Instant::now();
        println!("{:?} armed in {:.2?}", vm.arm(1), since.elapsed());
        let since = Instant::now();
        vm.begin(1);
        println!("begun in {:.2?}", since.elapsed());
        let order = random();
        let (some, rest) = order.split_at(1000);
        let times = touches(some, |page| vm.write(page, 3));
        say("pager, a first write under a snapshot", &times);
        let kept = vm.settled().kept_pages;
        vm.done(Ask::EndSnapshot { snapshot: 1 });
        let times = touches(&rest[..1000], |page| vm.write(page, 3));
        say(
            &format!("pager, a first write after it ({kept} kept)"),
            &times,
        );
    }
}

/// One to four threads, beside a bare handler, with what can be tuned.
#[test]
#[ignore = "figures, no test"]
fn measure_threads() {
    // Around, in turn, microseconds of looking again.
    let ways = [
        (1, 1, 0),
        (1, 16, 0),
        (1, 16, 50),
        (16, 16, 0),
        (16, 16, 50),
        (16, 1, 50),
    ];
    let mut order: Vec<u64> = (0..PAGES).collect();
    fastrand::Rng::with_seed(1).shuffle(&mut order);
    for round in 0..3 {
        for threads in 1..=4 {
            println!("round {round}, {threads} threads");
            let Some(times) = bare_by(threads, &order, How::Continue) else {
                return;
            };
            say("bare", &times);
            for (around, in_turn, look_again) in ways {
                let mut config = Config::new(PAGES);
                let tuning = &mut config.options.tuning;
                (tuning.around, tuning.in_turn) = (around, in_turn);
                tuning.look_again = Duration::from_micros(look_again);
                let vm = Vm::start(config).unwrap();
                pwrite(&vm.mem().file, &vec![1; PAGES as usize * PAGE], 0).unwrap();
                let times = touches_by(threads, &order, |page| _ = vm.read(page));
                let what = format!("around {around}, in turn {in_turn}, again {look_again} us");
                say(&what, &times);
                // What the same threads wait for where neighbours do not come along.
                let slow = times
                    .iter()
                    .filter(|time| **time > Duration::from_micros(3));
                say(
                    "  of these, slower than 3 us",
                    &slow.copied().collect::<Vec<_>>(),
                );
                assert_eq!(vm.settled().mapped_pages[0], PAGES);
            }
        }
    }
}

#[test]
#[ignore = "figures, no test"]
fn measure_saves() {
    const LARGE: u64 = 128 << 10;
    for level in [0, 1] {
        let Some(mut vm) = Vm::start(Config::new(LARGE)) else {
            return;
        };
        let mut random = fastrand::Rng::with_seed(1);
        let mut page = vec![0; PAGE];
        for at in 0..LARGE {
            random.fill(&mut page[..PAGE / 2]);
            pwrite(&vm.mem().file, &page, at * PAGE as u64).unwrap();
        }
        let into = file("test-save", 0);
        let layers = vm.fork(1);
        let since = Instant::now();
        saves::save_of(LARGE, &into, layers, level);
        let seconds = since.elapsed().as_secs_f64();
        let megabytes = (LARGE * PAGE as u64) as f64 / 1e6;
        println!("saved at level {level}: {:.0} MB/s", megabytes / seconds);
        let back = saves::restored_of(LARGE, &[&into]);
        let mut order: Vec<u64> = (0..LARGE).step_by(64).collect();
        random.shuffle(&mut order);
        let times = touches(&order, |page| _ = back.read(page));
        say("pager, random, from the file", &times);
        let since = Instant::now();
        back.done(Ask::LoadAll);
        let seconds = since.elapsed().as_secs_f64();
        println!("loaded again: {:.0} MB/s", megabytes / seconds);
    }
}
