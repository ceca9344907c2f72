//! Saves: the file has the moment, and a VM that begins with it has it again.

use std::{
    fs::File,
    io::Write as _,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        RwLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use slat_image::Reader;
use slat_pager::writer;
use slat_paging::wire::{Ask, FromWriter, Layer, ProblemKind, Socket, ToWriter, Written};

use crate::{
    layers::LayerFds,
    view::{End, copy, file},
    vm::{Config, PATIENCE, Vm},
};

const PAGES: u64 = 900;

/// Says all that a writer has to hear.
fn order(
    socket: &Socket,
    pages: u64,
    into: &OwnedFd,
    bases: &[OwnedFd],
    layers: &[LayerFds],
    zstd_level: u32,
) {
    let send = |message: ToWriter, fds: &[BorrowedFd<'_>]| socket.send(&message, fds).unwrap();
    let mut fds = vec![into.as_fd()];
    fds.extend(bases.iter().map(AsFd::as_fd));
    let begin = ToWriter::Begin {
        name: "the save".to_owned(),
        zstd_level,
        bases: bases.iter().map(|_| "a base".to_owned()).collect(),
    };
    send(begin, &fds);
    let mut contents = File::from(file("test-section", 0));
    contents.write_all(b"spec").unwrap();
    let section = ToWriter::Section {
        name: "spec".to_owned(),
        version: 3,
        optional: false,
    };
    send(section, &[contents.as_fd()]);
    send(ToWriter::Memory { number: 0, pages }, &[]);
    for layer in layers {
        let fds: Vec<_> = layer.fds.iter().map(AsFd::as_fd).collect();
        send(ToWriter::Layer(layer.layer.clone()), &fds);
        for (memory, fds) in &layer.memories {
            let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            send(ToWriter::LayerMemory(memory.clone()), &fds);
        }
    }
    send(ToWriter::Go, &[]);
}

/// The last word of a writer.
fn last(socket: &Socket) -> FromWriter {
    socket.set_patience(Some(PATIENCE)).unwrap();
    loop {
        match socket.receive::<FromWriter>().unwrap().message {
            FromWriter::Progress(written) => assert!(written.done <= written.all),
            last => return last,
        }
    }
}

fn save(into: &OwnedFd, bases: &[OwnedFd], layers: Vec<LayerFds>, level: u32) -> FromWriter {
    save_all(PAGES, into, bases, layers, level)
}

/// A save of a VM with so many pages.
pub(crate) fn save_of(pages: u64, into: &OwnedFd, layers: Vec<LayerFds>, level: u32) {
    written(save_all(pages, into, &[], layers, level));
}

fn save_all(
    pages: u64,
    into: &OwnedFd,
    bases: &[OwnedFd],
    layers: Vec<LayerFds>,
    level: u32,
) -> FromWriter {
    let (near, far) = Socket::pair().unwrap();
    let writing = std::thread::spawn(move || writer::run(far));
    order(&near, pages, into, bases, &layers, level);
    drop(layers);
    let last = last(&near);
    writing.join().unwrap().unwrap();
    last
}

fn written(last: FromWriter) -> Written {
    match last {
        FromWriter::Done(written) => written,
        other => panic!("{other:?}"),
    }
}

/// A VM that begins with files, the nearest first.
fn restored(files: &[&OwnedFd]) -> Vm {
    restored_of(PAGES, files)
}

pub(crate) fn restored_of(pages: u64, files: &[&OwnedFd]) -> Vm {
    let mut config = Config::new(pages);
    config.memories = vec![(pages, Some(0))];
    let layer = LayerFds {
        layer: Layer::File {
            name: "the save".to_owned(),
        },
        fds: files.iter().map(|file| copy(*file)).collect(),
        memories: Vec::new(),
    };
    Vm::start_with(config, vec![layer]).unwrap()
}

fn image(vm: &Vm) -> Vec<u64> {
    (0..PAGES).map(|page| vm.contents(page)).collect()
}

#[test]
fn a_save_has_the_moment_and_comes_back_lazily_while_the_guest_writes_on() {
    let Some(vm) = Vm::start(Config::new(PAGES)) else {
        return;
    };
    (0..PAGES)
        .step_by(2)
        .for_each(|page| vm.write(page, page + 1));
    let vm = RwLock::new(vm);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for seed in 0..2 {
            let (vm, stop) = (&vm, &stop);
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(seed);
                while !stop.load(Ordering::Relaxed) {
                    vm.read()
                        .unwrap()
                        .write(random.u64(..PAGES), random.u64(..));
                }
            });
        }
        let _end = End(&stop);
        for (number, level) in [(1, 0), (2, 1)] {
            let into = file("test-save", 0);
            let (layers, moment) = {
                let mut vm = vm.write().unwrap();
                (vm.fork(number), image(&vm))
            };
            let written = written(save(&into, &[], layers, level));
            assert_eq!((written.done, written.all), (PAGES, PAGES));
            let data = moment.iter().filter(|word| **word != 0).count() as u64;
            assert_eq!((written.pages, written.empty), (data, PAGES - data));
            vm.read().unwrap().snapshot_ended(number);
            let reader = Reader::open(File::from(copy(&into)), None).unwrap();
            assert_eq!(reader.section("spec").unwrap().unwrap().contents, b"spec");
            assert!(reader.verify(1).unwrap().faults.is_empty());
            let restored = restored(&[&into]);
            let mut random = fastrand::Rng::with_seed(number);
            for _ in 0..2 * PAGES {
                let page = random.u64(..PAGES);
                assert_eq!(restored.read(page), moment[page as usize], "page {page}");
            }
            restored.done(Ask::LoadAll);
            restored.loaded();
            assert_eq!(image(&restored), moment);
            restored.assert_mirrored();
            restored.stop();
        }
    });
}

#[test]
fn an_increment_has_what_differs_and_reads_through_its_base() {
    let Some(mut vm) = Vm::start(Config::new(PAGES)) else {
        return;
    };
    (0..PAGES)
        .step_by(2)
        .for_each(|page| vm.write(page, page + 1));
    let whole = file("test-save", 0);
    let layers = vm.fork(1);
    written(save(&whole, &[], layers, 1));
    (0..100).for_each(|page| vm.write(page, 77_777));
    let gfn = vm.mem().base_gfn + 200;
    vm.done(Ask::Discard { gfn, pages: 50 });
    let part = file("test-save", 0);
    let layers = vm.fork(2);
    let second = written(save(&part, &[copy(&whole)], layers, 1));
    assert_eq!(second.pages, 100);
    let moment = image(&vm);
    let back = restored(&[&part, &whole]);
    for page in 0..PAGES {
        assert_eq!(back.read(page), moment[page as usize], "page {page}");
    }
    // A save of a VM that is itself not yet loaded, through both.
    let mut lazy = restored(&[&part, &whole]);
    lazy.write(500, 9);
    let third = file("test-save", 0);
    let layers = lazy.fork(3);
    written(save(&third, &[], layers, 0));
    let back = restored(&[&third]);
    for page in 0..PAGES {
        let expected = if page == 500 {
            9
        } else {
            moment[page as usize]
        };
        assert_eq!(back.read(page), expected, "page {page}");
    }
}

#[test]
fn what_a_writer_took_is_not_kept_and_kept_pages_are_given_back() {
    let Some(mut vm) = Vm::start(Config::new(PAGES)) else {
        return;
    };
    (0..PAGES).for_each(|page| vm.write(page, 1));
    let layers = vm.fork(1);
    let kept = copy(&layers[0].memories[0].1[1]);
    let lease = copy(&layers[0].fds[0]);
    (0..100).for_each(|page| vm.write(page, 2));
    let before = vm.settled().kept_pages;
    assert!(before >= 100);
    assert!(rustix::fs::fstat(&kept).unwrap().st_blocks > 0);
    written(save(&file("test-save", 0), &[], layers, 0));
    assert_eq!(rustix::fs::fstat(&kept).unwrap().st_blocks, 0);
    // The snapshot is still there, and needs nothing.
    (0..PAGES).for_each(|page| vm.write(page, 3));
    assert_eq!(vm.settled().kept_pages, before);
    drop(lease);
    vm.snapshot_ended(1);
}

#[test]
fn a_full_disk_and_a_damaged_base_are_said_to_be_so() {
    let Some(mut vm) = Vm::start(Config::new(PAGES)) else {
        return;
    };
    (0..PAGES).for_each(|page| vm.write(page, page));
    let full = File::options()
        .read(true)
        .write(true)
        .open("/dev/full")
        .unwrap();
    let layers = vm.fork(1);
    let FromWriter::Failed(problem) = save(&OwnedFd::from(full), &[], layers, 0) else {
        panic!("written to a full disk");
    };
    assert_eq!(problem.kind, ProblemKind::NoSpace);
    vm.snapshot_ended(1);
    let layers = vm.fork(2);
    let nothing = file("test-base", 3);
    let FromWriter::Failed(problem) = save(&file("test-save", 0), &[nothing], layers, 0) else {
        panic!("built on nothing");
    };
    assert_eq!(
        problem.kind,
        ProblemKind::SourceCorrupt,
        "{}",
        problem.message
    );
    vm.snapshot_ended(2);
}

#[test]
fn a_writer_whose_connection_ends_ends() {
    let Some(mut vm) = Vm::start(Config::new(PAGES)) else {
        return;
    };
    (0..PAGES).for_each(|page| vm.write(page, page));
    let layers = vm.fork(1);
    let (near, far) = Socket::pair().unwrap();
    let writing = std::thread::spawn(move || writer::run(far));
    // A source that never comes: the lease is all that is said.
    order(&near, PAGES, &file("test-save", 0), &[], &layers, 19);
    drop((layers, near));
    writing.join().unwrap().unwrap_err();
    vm.snapshot_ended(1);
    assert_eq!(vm.settled().waiting, 0);
    std::thread::sleep(Duration::ZERO);
}

#[test]
fn a_file_that_is_damaged_holds_up_the_pages_that_it_is_damaged_in() {
    let Some(mut vm) = Vm::start(Config::new(PAGES)) else {
        return;
    };
    (0..PAGES).for_each(|page| vm.write(page, page + 1));
    let into = file("test-save", 0);
    let layers = vm.fork(1);
    let all = written(save(&into, &[], layers, 0));
    // In the middle are pages.
    let middle = all.file_bytes / 2;
    let mut good = [0; 64];
    rustix::io::pread(&into, &mut good, middle).unwrap();
    rustix::io::pwrite(&into, &[0xff; 64], middle).unwrap();
    let back = restored(&[&into]);
    let error = back.ask(Ask::LoadAll).unwrap_err();
    assert_eq!(error.kind, ProblemKind::SourceCorrupt);
    let problem = back.pushed(|state| state.problem.clone());
    assert_eq!(problem.kind, ProblemKind::SourceCorrupt);
    rustix::io::pwrite(&into, &good, middle).unwrap();
    back.done(Ask::Retry);
    back.done(Ask::LoadAll);
    for page in 0..PAGES {
        assert_eq!(back.read(page), page + 1);
    }
}
