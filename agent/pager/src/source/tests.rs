//! Chains of snapshots whose VMs go on while they are read.

use std::{os::fd::OwnedFd, thread};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use slat_paging::{
    PAGE,
    bits::{Marks, SharedBits},
    wire::{Layer, LayerMemory},
};

use super::*;
use crate::page_file::PageFile;

const PAGES: u64 = 1024;
const ROUNDS: u64 = 16;

/// One memory of a VM, with all that a snapshot of it has.
struct Level {
    file: OwnedFd,
    kept: OwnedFd,
    marks: Marks,
    loaded: SharedBits,
}

impl Level {
    fn new() -> Self {
        let file = || {
            let fd = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
            ftruncate(&fd, PAGES * PAGE as u64).unwrap();
            fd
        };
        Self {
            file: file(),
            kept: file(),
            marks: Marks::new(PAGES).unwrap(),
            loaded: SharedBits::new("test", PAGES).unwrap(),
        }
    }

    fn add_to(&self, chain: &mut ChainBuilder, origin: Option<u32>) {
        use std::os::fd::AsFd as _;
        let name = "test".to_owned();
        let layer = Layer::Snapshot {
            memories: 1,
            name,
            shared: false,
        };
        let (_, lease) = rustix::pipe::pipe().unwrap();
        chain.layer(layer, vec![lease]).unwrap();
        let memory = LayerMemory {
            number: 0,
            pages: PAGES,
            file_start: 0,
            origin,
            has_loaded: true,
        };
        let copy = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned().unwrap();
        let fds = [
            self.file.as_fd(),
            self.kept.as_fd(),
            self.marks.as_fd(),
            self.loaded.as_fd(),
        ];
        chain.memory(&memory, fds.map(copy).into()).unwrap();
    }

    fn pages(&self, fd: &OwnedFd) -> PageFile {
        PageFile::new(fd.try_clone().unwrap(), 0, PAGES).unwrap()
    }
}

/// Reads all again and again until `go_on` has come to its end: each page has its number.
fn read_while(chain: &Chain, go_on: impl FnOnce() + Send) {
    thread::scope(|scope| {
        let going = scope.spawn(go_on);
        let mut last = false;
        while !last {
            last = going.is_finished();
            let mut contents = Contents::new();
            chain.read(0, 0..PAGES, &mut contents).unwrap();
            let mut seen = 0;
            for (first, count, bytes) in contents.runs() {
                let bytes = bytes.expect("a page of zeroes");
                for (page, bytes) in (first..first + count).zip(bytes.chunks(PAGE)) {
                    let (low, high) = (&bytes[..8], &bytes[PAGE - 8..]);
                    assert_eq!(low, (page + 1).to_ne_bytes(), "page {page}");
                    assert_eq!(high, (page + 1).to_ne_bytes(), "page {page}");
                    seen += 1;
                }
            }
            assert_eq!(seen, PAGES);
        }
    });
}

fn page_of(value: u64) -> Vec<u8> {
    value.to_ne_bytes().repeat(PAGE / 8)
}

/// From both ends, so that writer and reader meet.
fn order(round: u64) -> impl Iterator<Item = u64> {
    (0..PAGES).map(move |page| {
        if round.is_multiple_of(2) {
            page
        } else {
            PAGES - 1 - page
        }
    })
}

#[test]
fn a_page_that_is_kept_and_written_while_it_is_read_is_the_snapshots() {
    for round in 0..ROUNDS {
        let vm = Level::new();
        let (file, kept) = (vm.pages(&vm.file), vm.pages(&vm.kept));
        for page in 0..PAGES {
            file.write(page, &page_of(page + 1)).unwrap();
            vm.loaded.set(page);
        }
        let mut chain = ChainBuilder::default();
        vm.add_to(&mut chain, None);
        let chain = chain.build().unwrap().unwrap();
        read_while(&chain, || {
            for page in order(round) {
                kept.write(page, &page_of(page + 1)).unwrap();
                vm.marks.set_kept(page);
                file.write(page, &page_of(u64::MAX)).unwrap();
            }
        });
    }
}

#[test]
fn a_page_that_its_vm_loads_and_whose_source_is_then_written_is_the_snapshots() {
    for round in 0..ROUNDS {
        let (young, old) = (Level::new(), Level::new());
        let (file, below) = (young.pages(&young.file), old.pages(&old.file));
        for page in 0..PAGES {
            below.write(page, &page_of(page + 1)).unwrap();
            old.loaded.set(page);
        }
        let mut chain = ChainBuilder::default();
        young.add_to(&mut chain, Some(0));
        old.add_to(&mut chain, None);
        let chain = chain.build().unwrap().unwrap();
        read_while(&chain, || {
            for page in order(round) {
                file.write(page, &page_of(page + 1)).unwrap();
                young.loaded.set(page);
                old.marks.set_taken(page);
                below.write(page, &page_of(u64::MAX)).unwrap();
            }
        });
    }
}

#[test]
fn what_no_layer_has_is_zeroes_and_what_a_layer_lacks_is_said() {
    let vm = Level::new();
    let mut chain = ChainBuilder::default();
    vm.add_to(&mut chain, Some(9));
    let chain = chain.build().unwrap().unwrap();
    let mut contents = Contents::new();
    chain.read(0, 3..PAGES, &mut contents).unwrap();
    assert!(contents.runs().all(|run| run.2.is_none()));
    let kind = |memory, pages| {
        chain
            .read(memory, pages, &mut Contents::new())
            .unwrap_err()
            .kind
    };
    let truncated = slat_paging::wire::ProblemKind::SourceTruncated;
    assert_eq!(kind(1, 0..1), truncated);
    assert_eq!(kind(0, PAGES - 1..PAGES + 1), truncated);
}
