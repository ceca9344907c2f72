//! Pages that are mapped before anybody touches them.

use std::{fs::File, os::fd::OwnedFd, sync::Arc};

use slat_image::{
    Compression, ImageId, MemorySpec, Section, WorkingRun, Writer, working_set_section,
};
use slat_pager::Options;
use slat_paging::{
    PAGE,
    uffd::Uffd,
    wire::{Answer, Ask, ProblemKind},
};

use crate::{
    saves::restored_of,
    source::{Fake, Wrong},
    view::{copy, file},
    vm::{Config, Vm},
};

const PAGES: u64 = 2000;

fn prefault(vm: &Vm, page: u64, pages: u64) -> Result<u64, ProblemKind> {
    let gfn = vm.mem().base_gfn + page;
    match vm.ask(Ask::Prefault { gfn, pages }) {
        Ok(Answer::Prefaulted { pages }) => Ok(pages),
        Ok(other) => panic!("{other:?}"),
        Err(problem) => Err(problem.kind),
    }
}

/// The pages that the kernel has mapped, and of these those that are protected.
fn mapped(vm: &Vm) -> (Vec<u64>, Vec<u64>) {
    let map = vm.mem().view.pagemap();
    let all = (0..).zip(map).filter(|(_, (mapped, _))| *mapped);
    let all: Vec<(u64, bool)> = all
        .map(|(page, (_, protected))| (page, protected))
        .collect();
    let protected = all.iter().filter(|(_, protected)| *protected);
    (
        all.iter().map(|(page, _)| *page).collect(),
        protected.map(|(page, _)| *page).collect(),
    )
}

fn with_source(source: &Arc<Fake>) -> Config {
    let mut config = Config::new(PAGES);
    config.memories = vec![(PAGES, Some(7))];
    let source: Arc<Fake> = Arc::clone(source);
    config.options = Options {
        source: Some(source),
        ..Options::default()
    };
    config
}

#[test]
fn exactly_what_was_asked_for_is_mapped_and_costs_no_fault_afterwards() {
    let Some(vm) = Vm::start(Config::new(PAGES)) else {
        return;
    };
    // Some are mapped already, and some in the file and not mapped.
    vm.write(700, 9);
    vm.done(Ask::Unmap {
        gfn: vm.mem().base_gfn + 700,
        pages: 1,
    });
    vm.write(705, 5);
    let before = vm.settled().faults;
    assert_eq!(prefault(&vm, 300, 1000), Ok(1000));
    let (all, protected) = mapped(&vm);
    let wanted = all.iter().filter(|page| (300..1300).contains(*page));
    assert_eq!(wanted.count(), 1000);
    // A fault maps a few that come after it.
    assert!(all.iter().all(|page| (300..1300).contains(page)), "{all:?}");
    assert!(protected.is_empty(), "{protected:?}");
    for page in 300..1300 {
        let was = match page {
            700 => 9,
            705 => 5,
            _ => 0,
        };
        assert_eq!(vm.read(page), was, "page {page}");
        vm.write(page, page);
    }
    assert_eq!(
        vm.settled().faults,
        before,
        "they were mapped, to be written"
    );
    // Again: nothing is left to do. Beyond the end: as far as there is memory.
    assert_eq!(prefault(&vm, 300, 1000), Ok(1000));
    assert_eq!(prefault(&vm, PAGES - 10, 100), Ok(10));
    assert_eq!(prefault(&vm, PAGES, 1), Ok(0));
    vm.assert_mirrored();
    vm.stop();
}

#[test]
fn contents_come_from_the_source_and_what_can_be_had_is_done_before_the_error() {
    let source = Arc::new(Fake::new());
    source.set(Wrong::Fails(ProblemKind::SourceGone), 160..320);
    let Some(vm) = Vm::start(with_source(&source)) else {
        return;
    };
    let mut at = 100;
    let kind = loop {
        match prefault(&vm, at, 300) {
            Ok(0) => panic!("no progress at page {at}"),
            Ok(done) => at += done,
            Err(kind) => break kind,
        }
    };
    assert_eq!((at, kind), (160, ProblemKind::SourceGone));
    assert_eq!(mapped(&vm).0, (100..160).collect::<Vec<u64>>());
    source.set(Wrong::Nothing, 0..0);
    vm.done(Ask::Retry);
    assert_eq!(prefault(&vm, at, 300), Ok(300));
    let before = vm.settled().faults;
    for page in 100..460 {
        assert_eq!(vm.read(page), Fake::word(7, page), "page {page}");
    }
    assert_eq!(vm.settled().faults, before);
    vm.assert_mirrored();
    vm.stop();
}

#[test]
fn what_a_snapshot_needs_is_mapped_and_not_to_be_written() {
    let Some(mut vm) = Vm::start(Config::new(PAGES)) else {
        return;
    };
    if !vm.offer.protect {
        println!("SKIPPED: no write-protection");
        return;
    }
    for page in 0..64 {
        vm.write(page, page + 1);
    }
    vm.arm(1);
    // It is to begin: whatever is mapped now could not be written either.
    assert_eq!(prefault(&vm, 600, 10), Ok(10));
    vm.begin(1);
    // These have been kept: they may be written.
    vm.write(20, 77);
    vm.write(40, 78);
    assert_eq!(prefault(&vm, 0, 700), Ok(700));
    let (all, protected) = mapped(&vm);
    assert!((0..700).all(|page| all.contains(&page)));
    let guarded = (0..700).filter(|page| *page != 20 && *page != 40);
    assert_eq!(protected, guarded.collect::<Vec<u64>>());
    // And can be, after they were kept.
    vm.write(30, 79);
    assert_eq!((vm.read(20), vm.read(30), vm.read(31)), (77, 79, 32));
    vm.assert_mirrored();
    vm.stop();
}

#[test]
fn a_working_set_is_read_first_in_its_order_and_alone_without_a_background() {
    let mut source = Fake::new();
    // The third is of another VM's memory, and the last goes beyond the end.
    source.first = vec![(7, 800..812), (7, 96..200), (9, 0..5), (7, 1990..3000)];
    let source = Arc::new(source);
    let mut config = with_source(&source);
    config.options.tuning.loaders = 1;
    let Some(vm) = Vm::start(config) else { return };
    let all = 12 + 104 + 10;
    vm.pushed(|state| (state.working_set.loaded == all).then_some(()));
    let state = vm.state();
    assert_eq!(state.working_set.all, all);
    // With what is best read together, and nothing else.
    assert_eq!(state.load.loaded, 16 + 112 + 16);
    assert_eq!(*source.begun.lock().unwrap(), [800, 96, 160, 1984]);
    assert_eq!(vm.contents(805), Fake::word(7, 805));
    assert!(mapped(&vm).0.is_empty(), "nobody touched anything");
    assert_eq!(vm.read(100), Fake::word(7, 100));
    vm.stop();
}

#[test]
fn the_background_comes_after_the_working_set() {
    let mut source = Fake::new();
    source.first = vec![(7, 1600..1728)];
    let source = Arc::new(source);
    let mut config = with_source(&source);
    config.load_all = true;
    config.options.tuning.loaders = 1;
    let Some(vm) = Vm::start(config) else { return };
    vm.loaded();
    let begun = source.begun.lock().unwrap().clone();
    assert_eq!(begun[..3], [1600, 1664, 0], "{begun:?}");
    assert_eq!(
        source.pages.load(std::sync::atomic::Ordering::Relaxed),
        PAGES
    );
}

/// A file of a VM whose pages all have their number, with that section.
fn saved(section: Section) -> OwnedFd {
    let fd = file("test-save", 0);
    let options = slat_image::Options {
        id: ImageId([3; 16]),
        compression: Compression::Zstd(1),
        base: None,
    };
    let writer = Writer::new(File::from(copy(&fd)), &options).unwrap();
    let pages = PAGES;
    writer.add_memory(MemorySpec { number: 0, pages }).unwrap();
    for page in 0..PAGES {
        let words = (page + 1).to_ne_bytes().repeat(PAGE / 8);
        writer.write(0, page, &words).unwrap();
    }
    writer.add_section(section).unwrap();
    writer.finish().unwrap();
    fd
}

#[test]
fn the_working_set_of_a_file_is_read_first_and_one_that_means_nothing_is_passed_over() {
    if let Err(error) = Uffd::open() {
        println!("SKIPPED: {error}");
        return;
    }
    let run = |first, pages| WorkingRun {
        memory: 0,
        first,
        pages,
    };
    let memories = [MemorySpec {
        number: 0,
        pages: PAGES,
    }];
    let runs = [run(32, 16), run(1000, 50)];
    let section = working_set_section(&runs, &memories).unwrap();
    let hostile = Section {
        contents: vec![0xff; section.contents.len()],
        ..section.clone()
    };
    // Nothing else is read: nobody asked for the background.
    let vm = restored_of(PAGES, &[&saved(section)]);
    vm.pushed(|state| (state.working_set.loaded == 66).then_some(()));
    let state = vm.state();
    assert_eq!(state.working_set.all, 66);
    assert_eq!(
        state.load.loaded,
        16 + 64,
        "with the clusters that they are in"
    );
    assert_eq!((vm.contents(1040), vm.contents(500)), (1041, 0));
    assert_eq!(vm.read(500), 501);
    vm.stop();
    let vm = restored_of(PAGES, &[&saved(hostile)]);
    assert_eq!(vm.read(40), 41);
    let state = vm.state();
    assert_eq!((state.working_set.all, state.problem), (0, None));
    vm.stop();
}
