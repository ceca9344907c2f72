//! Against the kernel at hand. Without a descriptor that sees the kernel's faults they are skipped.

use std::{io, os::fd::OwnedFd, thread};

use rustix::{
    fs::{MemfdFlags, ftruncate, memfd_create},
    io::{pread, pwrite},
    mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap},
};

use super::*;
use crate::PAGE;

const PAGES: usize = 8;

struct View {
    file: OwnedFd,
    base: *mut u8,
    uffd: Uffd,
    offer: Offer,
}

impl View {
    fn new() -> Option<Self> {
        let (uffd, offer) = match Uffd::open() {
            Ok(opened) => opened,
            Err(error) => {
                println!("SKIPPED: {error}");
                return None;
            }
        };
        let file = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, (PAGES * PAGE) as u64).unwrap();
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let len = PAGES * PAGE;
        // SAFETY: a new mapping at an address the kernel chooses.
        let base = unsafe { mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, &file, 0) };
        let view = Self {
            file,
            base: base.unwrap().cast(),
            uffd,
            offer,
        };
        let mut watch = Watch::MISSING | Watch::MINOR;
        watch.set(Watch::PROTECTED, offer.protect);
        view.uffd.register(view.at(0), len as u64, watch).unwrap();
        Some(view)
    }

    fn at(&self, page: usize) -> u64 {
        self.base.addr() as u64 + (page * PAGE) as u64
    }

    fn word(&self, page: usize) -> *mut u64 {
        self.base.wrapping_add(page * PAGE).cast()
    }

    /// Touches a page on a thread while `handle` resolves its faults, and what was read.
    fn touch(&self, page: usize, write: Option<u64>, handle: impl Fn(&Fault)) -> u64 {
        let word = self.word(page).expose_provenance();
        let touching = thread::spawn(move || {
            let word = std::ptr::with_exposed_provenance_mut::<u64>(word);
            // SAFETY: inside the mapping, aligned, and used by nobody else meanwhile.
            unsafe {
                if let Some(value) = write {
                    word.write_volatile(value);
                }
                word.read_volatile()
            }
        });
        while !touching.is_finished() {
            let mut faults = Vec::new();
            let mut poll = [rustix::event::PollFd::new(
                &self.uffd,
                rustix::event::PollFlags::IN,
            )];
            let patience = rustix::event::Timespec {
                tv_sec: 0,
                tv_nsec: 10_000_000,
            };
            if rustix::event::poll(&mut poll, Some(&patience)).unwrap() > 0 {
                // Who touched it may have been interrupted and told of anew.
                drop(self.uffd.read(&mut faults));
            }
            for fault in &faults {
                assert_eq!(fault.address, self.at(page));
                assert!(!self.offer.thread || fault.thread > 0);
                handle(fault);
            }
        }
        touching.join().unwrap()
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nobody uses any more.
        unsafe { munmap(self.base.cast(), PAGES * PAGE).unwrap() };
    }
}

#[test]
fn missing_pages_come_as_zeroes_or_with_contents() {
    let Some(view) = View::new() else { return };
    let read = view.touch(0, None, |fault| {
        assert_eq!((fault.kind, fault.write), (FaultKind::Missing, false));
        assert_eq!(
            view.uffd.zero(fault.address, PAGE as u64).bytes,
            PAGE as u64
        );
    });
    assert_eq!(read, 0);
    let read = view.touch(1, None, |fault| {
        assert_eq!(fault.kind, FaultKind::Missing);
        pwrite(&view.file, &7_u64.to_ne_bytes(), PAGE as u64).unwrap();
        let done = view.uffd.map(fault.address, PAGE as u64, false, true);
        assert!(done.error.is_none());
    });
    assert_eq!(read, 7);
    let mut word = [0; 8];
    pread(&view.file, &mut word, PAGE as u64).unwrap();
    assert_eq!(word, 7_u64.to_ne_bytes(), "the file has it");
}

#[test]
fn a_page_of_the_file_is_a_minor_fault_and_again_after_its_mapping_was_dropped() {
    let Some(view) = View::new() else { return };
    pwrite(&view.file, &9_u64.to_ne_bytes(), 2 * PAGE as u64).unwrap();
    for _ in 0..2 {
        let read = view.touch(2, None, |fault| {
            assert_eq!(fault.kind, FaultKind::Minor);
            let done = view.uffd.map(fault.address, PAGE as u64, false, true);
            assert!(done.error.is_none());
        });
        assert_eq!(read, 9);
        let base = view.word(2).cast();
        // SAFETY: the page's contents stay in the file.
        unsafe { madvise(base, PAGE, Advice::LinuxDontNeed).unwrap() };
    }
}

#[test]
fn a_protected_page_tells_of_writes_alone() {
    let Some(view) = View::new() else { return };
    if !view.offer.protect {
        println!("SKIPPED: this kernel protects no shared memory");
        return;
    }
    pwrite(&view.file, &[1; 2 * PAGE], 0).unwrap();
    let done = view.uffd.map(view.at(0), 2 * PAGE as u64, true, true);
    assert_eq!(done.bytes, 2 * PAGE as u64);
    view.touch(0, None, |fault| panic!("a read: {fault:?}"));
    let write = view.touch(0, Some(5), |fault| {
        assert_eq!((fault.kind, fault.write), (FaultKind::WriteProtect, true));
        view.uffd
            .unprotect(fault.address, PAGE as u64, true)
            .unwrap();
    });
    assert_eq!(write, 5);
    view.uffd.protect(view.at(0), PAGE as u64).unwrap();
    let told = std::cell::Cell::new(0);
    view.touch(0, Some(6), |fault| {
        told.set(told.get() + 1);
        view.uffd
            .unprotect(fault.address, PAGE as u64, true)
            .unwrap();
    });
    assert_eq!(told.get(), 1);
}

#[test]
fn a_run_that_meets_a_hole_says_how_far_it_came() {
    let Some(view) = View::new() else { return };
    pwrite(&view.file, &[1; 3 * PAGE], 0).unwrap();
    let done = view.uffd.map(view.at(0), 5 * PAGE as u64, false, true);
    assert_eq!(done.bytes, 3 * PAGE as u64);
    assert_eq!(done.error.unwrap().raw_os_error(), Some(libc::EFAULT));
    let done = view.uffd.map(view.at(2), PAGE as u64, false, true);
    assert_eq!(done.error.unwrap().kind(), io::ErrorKind::AlreadyExists);
}

#[test]
fn who_is_no_longer_watched_goes_on() {
    let Some(view) = View::new() else { return };
    let read = view.touch(3, None, |_| {
        view.uffd
            .unregister(view.at(0), (PAGES * PAGE) as u64)
            .unwrap();
    });
    assert_eq!(read, 0);
}
