//! A shared mapping of a memfd: the host's view of one slot.
//!
//! Guest vCPUs, migration threads and the process itself read and write it at the same time; that is the nature of guest
//! memory. No Rust reference into it is ever made: access is by copies and atomics through raw pointers, bounds checked.
//! A copy of a page that the guest writes meanwhile may be torn; the dirty log brings that page again.
//!
//! Lifetime: the mapping is unmapped when the last `Arc` goes; users keep the `Arc` while they use pointers.

use std::{
    io,
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::{
    fs::{MemfdFlags, ftruncate, memfd_create},
    mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap},
};
use slat_proto::model::PAGE_SIZE;

const PAGE: usize = PAGE_SIZE as usize;

/// A memfd mapped read-write.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the pointer is to a shared mapping that lives as long as the value; every access through this type is a copy or an
// atomic operation, which any thread may do.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// `pages` pages of zeroes, not yet populated. `name` shows in /proc.
    ///
    /// # Errors
    /// When the kernel refuses the memfd, its length or the mapping.
    pub(crate) fn new(name: &str, pages: u64) -> io::Result<Self> {
        let len = usize::try_from(pages)
            .ok()
            .and_then(|pages| pages.checked_mul(PAGE))
            .filter(|len| *len > 0)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let fd = memfd_create(name, MemfdFlags::CLOEXEC)?;
        ftruncate(&fd, len as u64)?;
        // SAFETY: a new mapping at an address the kernel chooses; nothing else refers to it.
        let base = unsafe {
            mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                &fd,
                0,
            )?
        };
        let base = NonNull::new(base.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, len })
    }

    /// Length in bytes, a multiple of the page size.
    #[must_use]
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Length in pages.
    #[must_use]
    pub(crate) fn pages(&self) -> u64 {
        (self.len / PAGE) as u64
    }

    /// First byte, for kernel interfaces that take the address (memory slots, writev). Valid while `self` lives.
    #[must_use]
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        let end = offset.checked_add(len);
        assert!(
            end.is_some_and(|end| end <= self.len),
            "guest memory access at {offset:#x}+{len:#x} passes the end {:#x}",
            self.len
        );
        // SAFETY: offset + len <= self.len was just checked, so the result is inside the mapping.
        unsafe { self.base.as_ptr().add(offset) }
    }

    /// Pointer to `len` bytes at `offset`, for system calls that fill or send them. Valid while `self` lives.
    ///
    /// # Panics
    /// When the range passes the end. Ranges from outside are checked against the slot before.
    #[must_use]
    pub(crate) fn range_ptr(&self, offset: usize, len: usize) -> *mut u8 {
        self.at(offset, len)
    }

    /// Copies out.
    ///
    /// # Panics
    /// When the range passes the end.
    pub(crate) fn read(&self, offset: usize, to: &mut [u8]) {
        let from = self.at(offset, to.len());
        // SAFETY: both ranges are valid for to.len() bytes, and a shared mapping never overlaps a Rust slice.
        unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) }
    }

    /// Copies in.
    ///
    /// # Panics
    /// When the range passes the end.
    pub(crate) fn write(&self, offset: usize, from: &[u8]) {
        let to = self.at(offset, from.len());
        // SAFETY: both ranges are valid for from.len() bytes, and a shared mapping never overlaps a Rust slice.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) }
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8), "unaligned word at {offset:#x}");
        // SAFETY: in bounds and aligned (mappings are page aligned); the memory is only ever accessed as raw bytes and
        // atomics, and lives as long as `self`.
        unsafe { AtomicU64::from_ptr(self.at(offset, 8).cast()) }
    }

    /// An aligned little-endian word.
    ///
    /// # Panics
    /// When it is unaligned or passes the end.
    #[must_use]
    pub(crate) fn load(&self, offset: usize) -> u64 {
        u64::from_le(self.word(offset).load(Ordering::Relaxed))
    }

    /// Stores an aligned little-endian word.
    ///
    /// # Panics
    /// When it is unaligned or passes the end.
    pub(crate) fn store(&self, offset: usize, value: u64) {
        self.word(offset).store(value.to_le(), Ordering::Relaxed);
    }

    /// Whether the page holds only zeroes. Reads it a cache line at a time and stops at the first that is not.
    ///
    /// # Panics
    /// When there is no such page.
    #[must_use]
    pub(crate) fn page_is_zero(&self, page: u64) -> bool {
        let start = self.at(page as usize * PAGE, PAGE).cast::<[u64; 8]>();
        (0..PAGE / 64).all(|line| {
            // SAFETY: inside the page that was just bounds-checked; aligned to 64; a torn read only makes the page look
            // non-zero or be sent again by the dirty log.
            let words = unsafe { start.add(line).read_volatile() };
            words.iter().fold(0, |any, word| any | word) == 0
        })
    }

    /// Populates pages for writing, so that later writes do not fault in the kernel.
    ///
    /// # Errors
    /// When memory is short.
    ///
    /// # Panics
    /// When the range passes the end.
    pub(crate) fn populate(&self, page: u64, pages: u64) -> io::Result<()> {
        let (offset, len) = (page as usize * PAGE, pages as usize * PAGE);
        let start = self.at(offset, len);
        // SAFETY: inside our own mapping; populating changes no contents.
        unsafe { madvise(start.cast(), len, Advice::LinuxPopulateWrite)? }
        Ok(())
    }

    /// Drops this process's page-table entries of the range; the memfd keeps the contents. Under KVM the notifier zaps the
    /// second-stage mappings of the range.
    ///
    /// # Errors
    /// When the kernel refuses.
    ///
    /// # Panics
    /// When the range passes the end.
    pub(crate) fn drop_mappings(&self, page: u64, pages: u64) -> io::Result<()> {
        let (offset, len) = (page as usize * PAGE, pages as usize * PAGE);
        let start = self.at(offset, len);
        // SAFETY: inside our own shared file mapping, where DONTNEED drops translations and keeps contents.
        unsafe { madvise(start.cast(), len, Advice::LinuxDontNeed)? }
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `new`; no one can hold a pointer past the last owner.
        if let Err(error) = unsafe { munmap(self.base.as_ptr().cast(), self.len) } {
            tracing::error!(%error, "munmap of guest memory");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_words_and_zero_pages() {
        let mapping = Mapping::new("test", 4).unwrap();
        assert!(mapping.page_is_zero(3));
        mapping.write(3 * PAGE + PAGE - 1, &[7]);
        assert!(!mapping.page_is_zero(3));
        assert!(mapping.page_is_zero(2));
        mapping.store(8, 0x0102_0304_0506_0708);
        let mut bytes = [0; 8];
        mapping.read(8, &mut bytes);
        assert_eq!(bytes, [8, 7, 6, 5, 4, 3, 2, 1]);
        mapping.populate(0, 4).unwrap();
        mapping.drop_mappings(0, 4).unwrap();
        assert_eq!(mapping.load(8), 0x0102_0304_0506_0708);
    }

    #[test]
    #[should_panic(expected = "passes the end")]
    fn access_beyond_the_end_is_caught() {
        Mapping::new("test", 1).unwrap().write(PAGE - 1, &[0, 0]);
    }
}
