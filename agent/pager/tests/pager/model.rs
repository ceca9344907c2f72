//! Random operations, held to a flat model: what each page of each memory has, and what it had when
//! each snapshot began.

use std::os::fd::OwnedFd;

use rustix::io::pwrite;
use slat_pager::Options;
use slat_paging::{
    PAGE,
    wire::{Answer, Ask, Layer},
};

use crate::{
    layers::LayerFds,
    saves,
    view::{copy, file, word},
    vm::{Config, Vm},
};

/// Of the two memories: the first begins with what is in a file.
const PAGES: [u64; 2] = [300, 130];

struct Moment {
    number: u64,
    layers: Vec<LayerFds>,
    words: [Vec<u64>; 2],
}

struct World {
    vm: Vm,
    random: fastrand::Rng,
    words: [Vec<u64>; 2],
    moments: Vec<Moment>,
    next: u64,
    gfns: [u64; 2],
}

fn origin() -> Option<(OwnedFd, Vec<u64>)> {
    let mut vm = Vm::start(Config::new(PAGES[0]))?;
    (0..PAGES[0])
        .filter(|page| page % 5 != 0)
        .for_each(|page| vm.write(page, page + 1000));
    let into = file("test-save", 0);
    let words = (0..PAGES[0]).map(|page| vm.contents(page)).collect();
    let layers = vm.fork(1);
    saves::save_of(PAGES[0], &into, layers, 1);
    Some((into, words))
}

fn config(can_protect: bool, origins: [Option<u32>; 2]) -> Config {
    let mut config = Config::new(0);
    config.memories = PAGES.into_iter().zip(origins).collect();
    config.can_protect = can_protect;
    config
}

impl World {
    fn place(&mut self) -> (usize, u64) {
        let memory = self.random.usize(..2);
        (memory, self.random.u64(..PAGES[memory]))
    }

    fn range(&mut self) -> (usize, u64, u64) {
        let (memory, first) = self.place();
        let pages = self.random.u64(1..40).min(PAGES[memory] - first);
        (memory, first, pages)
    }

    fn step(&mut self) {
        let op = self.random.u32(..100);
        match op {
            0..25 => {
                let (memory, page) = self.place();
                let found = self.vm.memories[memory].view.read(page);
                assert_eq!(
                    found, self.words[memory][page as usize],
                    "memory {memory} page {page}"
                );
            }
            25..55 => {
                let (memory, first, pages) = self.range();
                for page in first..first + pages {
                    let value = self.random.u64(..);
                    self.vm.memories[memory].view.write(page, value);
                    self.words[memory][page as usize] = value;
                }
            }
            55..62 => {
                let (memory, first, pages) = self.range();
                let gfn = self.gfns[memory] + first;
                self.vm.done(Ask::Discard { gfn, pages });
                self.words[memory][first as usize..(first + pages) as usize].fill(0);
            }
            62..70 => {
                // The VM process itself reads, or writes.
                let (memory, first, pages) = self.range();
                let (gfn, write) = (self.gfns[memory] + first, self.random.bool());
                self.vm.done(Ask::Load { gfn, pages, write });
                for page in first..first + pages {
                    let file = &self.vm.memories[memory].file;
                    let known = &mut self.words[memory][page as usize];
                    assert_eq!(word(file, page), *known, "memory {memory} page {page}");
                    if write {
                        *known = self.random.u64(..);
                        pwrite(file, &known.to_ne_bytes(), page * PAGE as u64).unwrap();
                    }
                }
            }
            70..74 => {
                let (memory, first, pages) = self.range();
                let gfn = self.gfns[memory] + first;
                self.vm.done(Ask::Unmap { gfn, pages });
            }
            74..78 => {
                let (memory, first, pages) = self.range();
                let gfn = self.gfns[memory] + first;
                let aged = self.vm.ask(Ask::Age { gfn, pages });
                assert!(matches!(aged, Ok(Answer::Frames(_))));
            }
            78..82 => {
                let (memory, first, pages) = self.range();
                let gfn = self.gfns[memory] + first;
                // Refused where the host cannot.
                let _ = self.vm.ask(Ask::Protect { gfn, pages });
            }
            82..85 => {
                let memory = self.random.usize(..2);
                let base_gfn = 0x1_0000 * (1 + memory as u64) + self.random.u64(..0x8000);
                let id = memory as u32;
                self.vm.done(Ask::Move {
                    memory: id,
                    base_gfn,
                });
                self.gfns[memory] = base_gfn;
            }
            85..91 if self.moments.len() < 3 => {
                self.next += 1;
                let number = self.next;
                self.vm.arm(number);
                let (memory, page) = self.place();
                self.vm.memories[memory].view.write(page, 5);
                self.words[memory][page as usize] = 5;
                self.vm.begin(number);
                self.moments.push(Moment {
                    number,
                    layers: self.vm.layers_of(number),
                    words: self.words.clone(),
                });
            }
            91..95 if !self.moments.is_empty() => {
                let at = self.random.usize(..self.moments.len());
                let moment = self.moments.swap_remove(at);
                self.look(moment);
            }
            95..97 => self.mirrored(),
            97..98 => self.vm.done(Ask::LoadAll),
            98..100 => {
                self.vm.kill_pager();
                let mapped = self.random.bool();
                if !mapped {
                    for (mem, pages) in self.vm.memories.iter().zip(PAGES) {
                        mem.view.drop_mappings(0, pages);
                    }
                }
                // The next one is told the places of the beginning.
                self.gfns = [0, 1].map(|memory: usize| self.vm.memories[memory].base_gfn);
                self.vm.attach(Options::default(), mapped);
                self.vm.wake();
            }
            _ => {}
        }
    }

    /// A child has the moment, whatever its parent did since.
    fn look(&mut self, moment: Moment) {
        let can_protect = self.random.bool();
        let child = Vm::start_with(config(can_protect, [Some(0), Some(1)]), moment.layers).unwrap();
        let all = self.random.bool();
        if all {
            child.done(Ask::LoadAll);
        }
        for (memory, words) in moment.words.iter().enumerate() {
            for (page, expected) in words.iter().enumerate() {
                if self.random.u32(..3) > 0 {
                    let found = child.memories[memory].view.read(page as u64);
                    let number = moment.number;
                    assert_eq!(
                        found, *expected,
                        "snapshot {number} memory {memory} page {page}"
                    );
                }
            }
        }
        child.assert_mirrored();
        drop(child);
        self.vm.snapshot_ended(moment.number);
        self.vm.forget(moment.number);
    }

    /// What the kernel has is what the mirror has, at wherever memories are now.
    fn mirrored(&self) {
        self.vm.assert_mirrored_at(&self.gfns);
    }
}

fn run(seed: u64, steps: usize) -> Option<()> {
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let (origin, words) = origin()?;
    let layer = LayerFds {
        layer: Layer::File {
            name: "the origin".to_owned(),
        },
        fds: vec![copy(&origin)],
        memories: Vec::new(),
    };
    let vm = Vm::start_with(config(random.bool(), [Some(0), None]), vec![layer])?;
    let mut world = World {
        gfns: [0, 1].map(|memory: usize| vm.memories[memory].base_gfn),
        words: [words, vec![0; PAGES[1] as usize]],
        moments: Vec::new(),
        next: 0,
        random,
        vm,
    };
    (0..steps).for_each(|_| world.step());
    for moment in std::mem::take(&mut world.moments) {
        world.look(moment);
    }
    for (memory, words) in world.words.iter().enumerate() {
        for (page, expected) in words.iter().enumerate() {
            let found = world.vm.memories[memory].view.read(page as u64);
            assert_eq!(found, *expected, "memory {memory} page {page} in the end");
        }
    }
    world.mirrored();
    world.vm.stop();
    Some(())
}

#[test]
fn random_operations_end_where_the_model_does() {
    for seed in 0..5 {
        if run(seed, 300).is_none() {
            return;
        }
    }
    // One of its comparisons comes while a new pager sweeps.
    let _ = run(4067975854381390731, 300);
    let _ = run(fastrand::u64(..), 300);
}

#[test]
#[ignore = "takes minutes"]
fn random_operations_for_longer() {
    for _ in 0..200 {
        let _ = run(fastrand::u64(..), 500);
    }
}
