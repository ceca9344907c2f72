//! Memories of the guest in the test's own address space: files, and mappings that a pager serves.

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use rustix::{
    fs::{MemfdFlags, ftruncate, memfd_create},
    mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap},
};
use slat_paging::{PAGE, bits::SharedBits};

/// A memory of the guest.
pub(crate) struct Mem {
    pub(crate) number: u32,
    pub(crate) file: OwnedFd,
    pub(crate) base_gfn: u64,
    pub(crate) pages: u64,
    pub(crate) view: View,
    pub(crate) loaded: Option<SharedBits>,
    pub(crate) origin: Option<u32>,
    pub(crate) read_only: bool,
}

/// A mapping of a memory file.
pub(crate) struct View {
    base: usize,
    pub(crate) len: usize,
}

impl View {
    pub(crate) fn new(file: &OwnedFd, pages: u64) -> Self {
        let len = pages as usize * PAGE;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address the kernel chooses.
        let base = unsafe { mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, file, 0) };
        Self {
            base: base.unwrap().expose_provenance(),
            len,
        }
    }

    pub(crate) fn address(&self) -> u64 {
        self.base as u64
    }

    fn word(&self, page: u64) -> &AtomicU64 {
        let at = self.base + page as usize * PAGE;
        assert!(at + PAGE <= self.base + self.len);
        // SAFETY: inside a mapping that lives as long as the view, aligned, used by atomics alone.
        unsafe { &*std::ptr::with_exposed_provenance::<AtomicU64>(at) }
    }

    pub(crate) fn read(&self, page: u64) -> u64 {
        self.word(page).load(Ordering::SeqCst)
    }

    pub(crate) fn write(&self, page: u64, value: u64) {
        self.word(page).store(value, Ordering::SeqCst);
    }

    pub(crate) fn drop_mappings(&self, page: u64, pages: u64) -> i32 {
        let at = self.base + page as usize * PAGE;
        let at = std::ptr::with_exposed_provenance_mut(at);
        // SAFETY: inside the mapping; contents stay in the file.
        match unsafe { madvise(at, pages as usize * PAGE, Advice::LinuxDontNeed) } {
            Ok(()) => 0,
            Err(error) => error.raw_os_error(),
        }
    }

    /// By page, whether the kernel has it mapped, and whether it is write-protected.
    pub(crate) fn pagemap(&self) -> Vec<(bool, bool)> {
        let map = std::fs::File::open("/proc/self/pagemap").unwrap();
        let mut bytes = vec![0; self.len / PAGE * 8];
        let at = (self.base / PAGE * 8) as u64;
        std::os::unix::fs::FileExt::read_exact_at(&map, &mut bytes, at).unwrap();
        let (words, _) = bytes.as_chunks::<8>();
        let words = words.iter().map(|word| u64::from_ne_bytes(*word));
        words
            .map(|word| (word >> 63 & 1 == 1, word >> 57 & 1 == 1))
            .collect()
    }
}

impl Drop for View {
    fn drop(&mut self) {
        let base = std::ptr::with_exposed_provenance_mut(self.base);
        // SAFETY: our own mapping, which nobody uses any more.
        unsafe { munmap(base, self.len).unwrap() };
    }
}

pub(crate) fn file(name: &str, pages: u64) -> OwnedFd {
    let fd = memfd_create(name, MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, pages * PAGE as u64).unwrap();
    fd
}

pub(crate) fn copy(fd: &impl AsFd) -> OwnedFd {
    fd.as_fd().try_clone_to_owned().unwrap()
}

/// The first word of a page of a file.
pub(crate) fn word(file: &OwnedFd, page: u64) -> u64 {
    let mut word = [0; 8];
    rustix::io::pread(file, &mut word, page * PAGE as u64).unwrap();
    u64::from_ne_bytes(word)
}

/// Ends those who look at it, also when its owner panics.
pub(crate) struct End<'a>(pub(crate) &'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
