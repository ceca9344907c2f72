//! Memory as a program gets it from the kernel without Slat: an anonymous mapping that asks for
//! 2 MiB pages, and a memfd that is populated page by page.
//!
//! Words are read and written as atomics; no other reference into a mapping is ever made.

use std::{io, ptr::NonNull, sync::atomic::AtomicU64};

use rustix::{
    fs::{MemfdFlags, ftruncate, memfd_create},
    mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap},
};

/// A private or shared mapping of zeroes, until it is dropped.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the pointer is to a mapping that lives as long as the value, and is used for atomic
// operations and for advice to the kernel alone.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

/// Has the machine touch so much memory and let it go, by pages of 2 MiB where it has them.
///
/// A machine that is itself a VM gives memory which it does not use back to its hypervisor (free
/// page reporting), and then pays for the next touch there: several times the work of the touch. No
/// such thing happens on hardware, and here it depends on what ran before.
///
/// # Errors
/// When memory is short.
pub fn warm(bytes: usize) -> io::Result<()> {
    Mapping::anonymous_huge(bytes).map(drop)
}

impl Mapping {
    /// Anonymous memory that asks for transparent huge pages, all of it there.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn anonymous_huge(bytes: usize) -> io::Result<Self> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address the kernel chooses; nothing else refers to it.
        let base = unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, access, flags)? };
        let mapping = Self::of(base, bytes)?;
        mapping.advise(Advice::LinuxHugepage)?;
        mapping.advise(Advice::LinuxPopulateWrite)?;
        Ok(mapping)
    }

    /// A memfd, none of it there yet.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn memfd(bytes: usize) -> io::Result<Self> {
        let file = memfd_create("slat-bench", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, bytes as u64)?;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address the kernel chooses; nothing else refers to it.
        let base = unsafe { mmap(std::ptr::null_mut(), bytes, access, flags, &file, 0)? };
        Self::of(base, bytes)
    }

    fn of(base: *mut std::ffi::c_void, bytes: usize) -> io::Result<Self> {
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, bytes })
    }

    /// Has the kernel make every page that is not there (MADV_POPULATE_WRITE).
    ///
    /// # Errors
    /// When memory is short.
    pub fn populate(&self) -> io::Result<()> {
        self.advise(Advice::LinuxPopulateWrite)
    }

    /// A mapping of a file of so many bytes.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn of_file(file: &impl std::os::fd::AsFd, bytes: usize) -> io::Result<Self> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address the kernel chooses; nothing else refers to it.
        let base = unsafe {
            mmap(
                std::ptr::null_mut(),
                bytes,
                access,
                MapFlags::SHARED,
                file,
                0,
            )?
        };
        Self::of(base, bytes)
    }

    /// Where it is.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.base.as_ptr().addr() as u64
    }

    /// Drops its translations of these bytes; a shared mapping's file keeps the contents.
    ///
    /// # Errors
    /// What the kernel refuses.
    ///
    /// # Panics
    /// When the range reaches beyond the end.
    pub fn drop_mappings(&self, offset: usize, bytes: usize) -> io::Result<()> {
        assert!(offset + bytes <= self.bytes);
        // SAFETY: inside our own mapping, used as atomics alone.
        unsafe {
            let start = self.base.as_ptr().byte_add(offset).cast();
            madvise(start, bytes, Advice::LinuxDontNeed)?;
        }
        Ok(())
    }

    fn advise(&self, advice: Advice) -> io::Result<()> {
        // SAFETY: our own mapping as a whole; neither advice changes contents.
        unsafe { madvise(self.base.as_ptr().cast(), self.bytes, advice)? }
        Ok(())
    }

    /// Its words.
    #[must_use]
    pub fn words(&self) -> &[AtomicU64] {
        let words = self.base.as_ptr().cast::<AtomicU64>();
        // SAFETY: the mapping is page aligned, as long, zeroed by the kernel, and lives as long as
        // `self`; it is only ever accessed as atomics.
        unsafe { std::slice::from_raw_parts(words, self.bytes / 8) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping that was made; no one can hold a reference past its owner.
        if let Err(error) = unsafe { munmap(self.base.as_ptr().cast(), self.bytes) } {
            eprintln!("munmap: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use super::*;

    #[test]
    fn both_kinds_are_zero_and_can_be_written() {
        let bytes = 4 << 20;
        for mapping in [Mapping::anonymous_huge(bytes), Mapping::memfd(bytes)] {
            let mapping = mapping.unwrap();
            mapping.populate().unwrap();
            let words = mapping.words();
            assert_eq!(words.len(), bytes / 8);
            assert!(words.iter().all(|word| word.load(Relaxed) == 0));
            words[words.len() - 1].store(7, Relaxed);
            assert_eq!(words[words.len() - 1].load(Relaxed), 7);
        }
    }
}
