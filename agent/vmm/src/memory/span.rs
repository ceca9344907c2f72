//! A mapping of a file, whole or shared by several slots that lie in one file.
//!
//! Slots below a 2 MiB page that come in one batch are parts of one file, with one mapping for the
//! guest and one for our own threads: a file and two mappings each would take longer than the
//! kernel takes for the slots. A part that goes gives its pages back; the mappings go with the last
//! part.

use std::{io, os::fd::OwnedFd, ptr::NonNull};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

/// A shared read-write mapping. Unmapped when its last user goes.
#[derive(Debug)]
pub(super) struct Span {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the pointer is to a shared mapping that lives as long as the value; what is done through
// it are copies and atomic operations, which any thread may do.
unsafe impl Send for Span {}
// SAFETY: as above.
unsafe impl Sync for Span {}

impl Span {
    /// The first `len` bytes of a file, at an address that the kernel chooses.
    ///
    /// # Errors
    /// When the kernel refuses the mapping.
    pub(super) fn new(fd: &OwnedFd, len: usize) -> io::Result<Self> {
        // SAFETY: a new mapping at an address the kernel chooses; nothing else refers to it.
        let base = unsafe {
            mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                fd,
                0,
            )?
        };
        let base = NonNull::new(base.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, len })
    }

    /// A mapping that was made elsewhere, which nobody else unmaps.
    pub(super) fn made(base: NonNull<u8>, len: usize) -> Self {
        Self { base, len }
    }

    /// Where byte `offset` of the mapping is.
    ///
    /// # Panics
    /// When there is no such byte.
    pub(super) fn at(&self, offset: usize) -> NonNull<u8> {
        assert!(offset < self.len, "beyond the mapping");
        // SAFETY: inside the mapping, as just checked.
        unsafe { self.base.add(offset) }
    }

    /// Gives the file's pages of a range back. Nobody uses the range any more, in this mapping or
    /// another.
    pub(super) fn remove(&self, offset: usize, len: usize) -> io::Result<()> {
        assert!(offset + len <= self.len, "beyond the mapping");
        let start = self.at(offset).as_ptr().cast();
        // SAFETY: inside our own mapping; the caller says that nobody uses the range.
        unsafe { madvise(start, len, Advice::LinuxRemove)? }
        Ok(())
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping that was made; no one can hold a pointer past the last owner.
        if let Err(error) = unsafe { munmap(self.base.as_ptr().cast(), self.len) } {
            tracing::error!(%error, "munmap of guest memory");
        }
    }
}
