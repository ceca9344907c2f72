//! A bitmap in shared memory, one bit a page, set by one process and seen by others.
//!
//! It is a memfd that cannot change its length (sealed), so a mapping of it never faults, whoever
//! else has the descriptor. Bits are only ever set. A bit that is seen set (acquire) was set after
//! whatever its setter did before (release).

use std::{
    io,
    ops::Range,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::{
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create},
    mm::{MapFlags, ProtFlags, mmap, munmap},
};

const SEALS: SealFlags = SealFlags::SHRINK
    .union(SealFlags::GROW)
    .union(SealFlags::SEAL);

/// See the module.
#[derive(Debug)]
pub struct SharedBits {
    fd: OwnedFd,
    words: NonNull<AtomicU64>,
    count: usize,
    bits: u64,
}

// SAFETY: the mapping is shared memory that lives as long as the value and is used by atomic
// operations alone.
unsafe impl Send for SharedBits {}
// SAFETY: as above.
unsafe impl Sync for SharedBits {}

impl SharedBits {
    /// `bits` clear bits. `name` shows in /proc.
    ///
    /// # Errors
    /// When the kernel refuses the file, its seals or its mapping.
    pub fn new(name: &str, bits: u64) -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = memfd_create(name, flags)?;
        ftruncate(&fd, length(bits)? as u64)?;
        fcntl_add_seals(&fd, SEALS)?;
        Self::open(fd, bits)
    }

    /// Those of another process.
    ///
    /// # Errors
    /// `InvalidData` when the file is not sealed or has another length than `bits` need; what the
    /// kernel says to the mapping.
    pub fn open(fd: OwnedFd, bits: u64) -> io::Result<Self> {
        let len = length(bits)?;
        let sealed = fcntl_get_seals(&fd)?.contains(SEALS);
        if !sealed || fstat(&fd)?.st_size as u64 != len as u64 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        // SAFETY: a new mapping at an address the kernel chooses, of a file that cannot shrink.
        let base = unsafe {
            mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &fd,
                0,
            )?
        };
        let words = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self {
            fd,
            words,
            count: len / 8,
            bits,
        })
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.bits
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bits == 0
    }

    /// Whether a bit is set. Acquire.
    ///
    /// # Panics
    /// When there is no such bit.
    #[must_use]
    pub fn get(&self, bit: u64) -> bool {
        self.word(bit).load(Ordering::Acquire) >> (bit % 64) & 1 == 1
    }

    /// Sets a bit; whether it was clear. Release, and acquire when it was set.
    ///
    /// # Panics
    /// When there is no such bit.
    pub fn set(&self, bit: u64) -> bool {
        let mask = 1 << (bit % 64);
        self.word(bit).fetch_or(mask, Ordering::AcqRel) & mask == 0
    }

    /// How many are set, about now.
    #[must_use]
    pub fn count(&self) -> u64 {
        let ones = |word: &AtomicU64| u64::from(word.load(Ordering::Relaxed).count_ones());
        self.words().iter().map(ones).sum()
    }

    /// How many of a range are set, about now. What lies beyond the last bit is not.
    #[must_use]
    pub fn count_in(&self, range: Range<u64>) -> u64 {
        let (mut at, end) = (range.start, range.end.min(self.bits));
        let mut count = 0;
        while at < end {
            let next = end.min((at / 64 + 1) * 64);
            let word = self.word(at).load(Ordering::Relaxed) >> (at % 64);
            let mask = u64::MAX >> (64 - (next - at));
            count += u64::from((word & mask).count_ones());
            at = next;
        }
        count
    }

    /// The first clear bit from `from` on, or [`SharedBits::len`].
    #[must_use]
    pub fn next_clear(&self, from: u64) -> u64 {
        let mut at = from;
        while at < self.bits {
            let word = self.word(at).load(Ordering::Acquire) | ((1 << (at % 64)) - 1);
            if word != u64::MAX {
                return (at / 64 * 64 + u64::from(word.trailing_ones())).min(self.bits);
            }
            at = (at / 64 + 1) * 64;
        }
        self.bits
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping has as many words, aligned, and is shared: atomics may alias.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr(), self.count) }
    }

    fn word(&self, bit: u64) -> &AtomicU64 {
        assert!(bit < self.bits, "bit {bit} of {}", self.bits);
        &self.words()[(bit / 64) as usize]
    }
}

impl Drop for SharedBits {
    fn drop(&mut self) {
        // SAFETY: our own mapping, to which no reference is left.
        let unmapped = unsafe { munmap(self.words.as_ptr().cast(), self.count * 8) };
        debug_assert!(unmapped.is_ok());
    }
}

impl AsFd for SharedBits {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn length(bits: u64) -> io::Result<usize> {
    // A mapping has at least a byte.
    usize::try_from(bits.max(1).div_ceil(64) * 8).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// What a snapshot's reader and its pager tell each other of one memory. See the crate.
#[derive(Debug)]
pub struct Marks(SharedBits);

impl Marks {
    /// Of a memory of so many pages, none kept or taken.
    ///
    /// # Errors
    /// As [`SharedBits::new`].
    pub fn new(pages: u64) -> io::Result<Self> {
        SharedBits::new("slat-marks", both(pages)?).map(Self)
    }

    /// Those of another process.
    ///
    /// # Errors
    /// As [`SharedBits::open`].
    pub fn open(fd: OwnedFd, pages: u64) -> io::Result<Self> {
        SharedBits::open(fd, both(pages)?).map(Self)
    }

    fn half(&self) -> u64 {
        self.0.len() / 2
    }

    /// Whether a page is in the kept file.
    #[must_use]
    pub fn is_kept(&self, page: u64) -> bool {
        self.0.get(page)
    }

    /// Says that a page is in the kept file, before it may be written to.
    pub fn set_kept(&self, page: u64) {
        self.0.set(page);
    }

    /// Whether the reader has no need of a page any more.
    #[must_use]
    pub fn is_taken(&self, page: u64) -> bool {
        self.0.get(self.half() + page)
    }

    /// Says that the reader has no need of a page any more.
    pub fn set_taken(&self, page: u64) {
        self.0.set(self.half() + page);
    }
}

impl AsFd for Marks {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn both(pages: u64) -> io::Result<u64> {
    let half = pages.checked_next_multiple_of(64);
    half.and_then(|half| half.checked_mul(2))
        .ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_mapping_sets_the_other_sees() {
        let bits = SharedBits::new("test", 130).unwrap();
        let other = SharedBits::open(bits.as_fd().try_clone_to_owned().unwrap(), 130).unwrap();
        assert!(bits.set(129) && !bits.set(129) && bits.set(0));
        assert!(other.get(129) && other.get(0) && !other.get(64));
        assert_eq!((other.count(), other.next_clear(0)), (2, 1));
        for (range, set) in [(0..130, 2), (1..129, 0), (64..999, 1), (0..1, 1), (7..7, 0)] {
            assert_eq!(other.count_in(range.clone()), set, "{range:?}");
        }
        for bit in 0..130 {
            other.set(bit);
        }
        assert_eq!((other.count_in(3..129), other.count_in(60..70)), (126, 10));
        assert_eq!(bits.next_clear(0), 130);
    }

    #[test]
    fn a_file_that_could_shrink_is_refused() {
        let fd = memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, 8).unwrap();
        let error = SharedBits::open(fd, 64).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        let bits = SharedBits::new("test", 64).unwrap();
        let fd = bits.as_fd().try_clone_to_owned().unwrap();
        assert!(ftruncate(&fd, 0).is_err());
        assert!(SharedBits::open(fd, 65).is_err());
    }

    #[test]
    fn kept_and_taken_are_two_things() {
        let marks = Marks::new(65).unwrap();
        marks.set_kept(64);
        marks.set_taken(0);
        assert!(marks.is_kept(64) && !marks.is_taken(64));
        assert!(marks.is_taken(0) && !marks.is_kept(0));
    }
}
