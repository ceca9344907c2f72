//! The two views of a slot's memory: two mappings of one memfd.
//!
//! The [`GuestView`] is what backends map for the guest: its address is what KVM's slot names, and
//! software vCPUs load and store through it. Whatever takes translations away from the guest
//! (invalidation, and what watches its faults) works on this mapping alone. The [`HostView`] is
//! what our own threads read and write through: sockets, digests, guest installation, the counters'
//! reader. It never faults on the guest's view, so no fault of the guest's can stop them.
//!
//! Guest vCPUs and our threads use the memory at the same time; that is the nature of guest memory.
//! No Rust reference into it is ever made: access is by copies and atomics through raw pointers,
//! bounds checked. A copy of a page that the guest writes meanwhile may be torn; the dirty log
//! brings that page again.
//!
//! Lifetime: a view is unmapped when its last `Arc` goes; users keep the `Arc` while they use
//! pointers.

use std::{
    io,
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};
use slat_proto::model::PAGE_SIZE;

use super::backing::Backing;

const PAGE: usize = PAGE_SIZE as usize;

/// A shared read-write mapping of a whole backing.
#[derive(Debug)]
struct Mapped {
    base: NonNull<u8>,
    backing: Arc<Backing>,
}

// SAFETY: the pointer is to a shared mapping that lives as long as the value; every access through
// this type is a copy or an atomic operation, which any thread may do.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl Mapped {
    fn new(backing: &Arc<Backing>) -> io::Result<Self> {
        // SAFETY: a new mapping at an address the kernel chooses; nothing else refers to it.
        let base = unsafe {
            mmap(
                std::ptr::null_mut(),
                backing.len(),
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                backing.fd(),
                0,
            )?
        };
        let base = NonNull::new(base.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let backing = Arc::clone(backing);
        Ok(Self { base, backing })
    }

    fn pages(&self) -> u64 {
        (self.backing.len() / PAGE) as u64
    }

    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        let end = offset.checked_add(len);
        assert!(
            end.is_some_and(|end| end <= self.backing.len()),
            "guest memory access at {offset:#x}+{len:#x} reaches beyond the end {:#x}",
            self.backing.len()
        );
        // SAFETY: offset + len was just checked against the mapping's length.
        unsafe { self.base.as_ptr().add(offset) }
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8), "unaligned word at {offset:#x}");
        // SAFETY: in bounds and aligned (mappings are page aligned); the memory is only ever
        // accessed as raw bytes and atomics, and lives as long as `self`.
        unsafe { AtomicU64::from_ptr(self.at(offset, 8).cast()) }
    }

    fn load(&self, offset: usize) -> u64 {
        u64::from_le(self.word(offset).load(Ordering::Relaxed))
    }

    fn store(&self, offset: usize, value: u64) {
        self.word(offset).store(value.to_le(), Ordering::Relaxed);
    }

    /// Pages of a shared memfd that are mapped to be read can be written, too: the kernel does not
    /// watch for the first write of memory that is never written back.
    fn map(&self, page: u64, pages: u64) -> io::Result<()> {
        self.advise(page, pages, Advice::LinuxPopulateRead)
    }

    /// Advice that changes no contents: populating, or dropping translations.
    fn advise(&self, page: u64, pages: u64, advice: Advice) -> io::Result<()> {
        let (offset, len) = (page as usize * PAGE, pages as usize * PAGE);
        let start = self.at(offset, len);
        // SAFETY: inside our own shared file mapping. Populating changes no contents there, and
        // DONTNEED only drops translations.
        unsafe { madvise(start.cast(), len, advice)? }
        Ok(())
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `new`; no one can hold a pointer past the last owner.
        if let Err(error) = unsafe { munmap(self.base.as_ptr().cast(), self.backing.len()) } {
            tracing::error!(%error, "munmap of guest memory");
        }
    }
}

/// What the guest's slot maps.
#[derive(Debug)]
pub(crate) struct GuestView(Mapped);

impl GuestView {
    /// # Errors
    /// When the kernel refuses the mapping.
    pub(super) fn new(backing: &Arc<Backing>) -> io::Result<Self> {
        Mapped::new(backing).map(Self)
    }

    /// Length in pages.
    #[must_use]
    pub(crate) fn pages(&self) -> u64 {
        self.0.pages()
    }

    /// Where it begins in this process, which is what a slot of KVM's names. Valid while `self`
    /// lives.
    #[must_use]
    pub(crate) fn address(&self) -> u64 {
        self.0.base.addr().get() as u64
    }

    /// An aligned little-endian word, as a vCPU loads it.
    ///
    /// # Panics
    /// When it is unaligned or reaches beyond the end.
    #[must_use]
    pub(crate) fn load(&self, offset: usize) -> u64 {
        self.0.load(offset)
    }

    /// Stores an aligned little-endian word, as a vCPU does.
    ///
    /// # Panics
    /// When it is unaligned or reaches beyond the end.
    pub(crate) fn store(&self, offset: usize, value: u64) {
        self.0.store(offset, value);
    }

    /// Allocates pages that are not there and maps all of them, each by a fault of its own.
    ///
    /// # Errors
    /// When memory is short.
    ///
    /// # Panics
    /// When the range reaches beyond the end.
    pub(super) fn populate(&self, page: u64, pages: u64) -> io::Result<()> {
        self.0.advise(page, pages, Advice::LinuxPopulateWrite)
    }

    /// Maps pages that are there, many at a time, so that the guest's first access costs no fault
    /// of the host's.
    ///
    /// # Errors
    /// When memory is short.
    ///
    /// # Panics
    /// When the range reaches beyond the end.
    pub(super) fn map(&self, page: u64, pages: u64) -> io::Result<()> {
        self.0.map(page, pages)
    }

    /// Drops the view's translations of the range; the backing keeps the contents. Under KVM the
    /// notifier zaps the second-stage mappings of the range.
    ///
    /// # Errors
    /// When the kernel refuses.
    ///
    /// # Panics
    /// When the range reaches beyond the end.
    pub(crate) fn drop_mappings(&self, page: u64, pages: u64) -> io::Result<()> {
        self.0.advise(page, pages, Advice::LinuxDontNeed)
    }
}

/// What our own threads read and write through.
#[derive(Debug)]
pub(crate) struct HostView(Mapped);

impl HostView {
    /// # Errors
    /// When the kernel refuses the mapping.
    pub(super) fn new(backing: &Arc<Backing>) -> io::Result<Self> {
        Mapped::new(backing).map(Self)
    }

    /// Pointer to `len` bytes at `offset`, for system calls that fill or send them. Valid while
    /// `self` lives.
    ///
    /// # Panics
    /// When the range reaches beyond the end. Ranges from outside are checked against the slot
    /// before.
    #[must_use]
    pub(crate) fn range_ptr(&self, offset: usize, len: usize) -> *mut u8 {
        self.0.at(offset, len)
    }

    /// An aligned little-endian word, in one piece whatever writes it meanwhile.
    ///
    /// # Panics
    /// When it is unaligned or reaches beyond the end.
    #[must_use]
    pub(crate) fn load(&self, offset: usize) -> u64 {
        self.0.load(offset)
    }

    /// Stores an aligned little-endian word in one piece.
    ///
    /// # Panics
    /// When it is unaligned or reaches beyond the end.
    pub(crate) fn store(&self, offset: usize, value: u64) {
        self.0.store(offset, value);
    }

    /// Copies out.
    ///
    /// # Panics
    /// When the range reaches beyond the end.
    pub(crate) fn read(&self, offset: usize, to: &mut [u8]) {
        let from = self.0.at(offset, to.len());
        // SAFETY: both ranges are valid for to.len() bytes, and a shared mapping never overlaps a
        // Rust slice.
        unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) }
    }

    /// Copies in.
    ///
    /// # Panics
    /// When the range reaches beyond the end.
    pub(crate) fn write(&self, offset: usize, from: &[u8]) {
        let to = self.0.at(offset, from.len());
        // SAFETY: both ranges are valid for from.len() bytes, and a shared mapping never overlaps a
        // Rust slice.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) }
    }

    /// Whether the page holds only zeroes. Reads it a cache line at a time and stops at the first
    /// that does not.
    ///
    /// # Panics
    /// When there is no such page.
    #[must_use]
    pub(super) fn is_zero(&self, page: u64) -> bool {
        let start = self.0.at(page as usize * PAGE, PAGE).cast::<[u64; 8]>();
        (0..PAGE / 64).all(|line| {
            // SAFETY: inside the page that was just bounds-checked; aligned to 64; a torn read only
            // makes the page look non-zero or be sent again by the dirty log.
            let words = unsafe { start.add(line).read_volatile() };
            words.iter().fold(0, |any, word| any | word) == 0
        })
    }

    /// Maps pages that are there, many at a time, so that our threads' first access costs no fault.
    ///
    /// # Errors
    /// When memory is short.
    ///
    /// # Panics
    /// When the range reaches beyond the end.
    pub(super) fn map(&self, page: u64, pages: u64) -> io::Result<()> {
        self.0.map(page, pages)
    }
}

/// Bytes of the mapping at `start` that this process's page tables map.
#[cfg(test)]
pub(crate) fn resident(start: u64) -> u64 {
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let range = format!("{start:x}-");
    let of = maps.lines().skip_while(|line| !line.starts_with(&range));
    let rss = of
        .filter_map(|line| line.strip_prefix("Rss:"))
        .next()
        .unwrap();
    let kib = rss.trim().strip_suffix(" kB").unwrap();
    kib.parse::<u64>().unwrap() << 10
}

#[cfg(test)]
mod tests {
    use super::*;

    fn views(pages: u64) -> (GuestView, HostView) {
        let backing = Arc::new(Backing::new("test", pages).unwrap());
        (
            GuestView::new(&backing).unwrap(),
            HostView::new(&backing).unwrap(),
        )
    }

    #[test]
    fn bytes_words_and_zero_pages() {
        let (_, host) = views(4);
        assert!(host.is_zero(3));
        host.write(3 * PAGE + PAGE - 1, &[7]);
        assert!(!host.is_zero(3) && host.is_zero(2));
        host.write(8, &[8, 7, 6, 5, 4, 3, 2, 1]);
        let mut bytes = [0; 8];
        host.read(8, &mut bytes);
        assert_eq!(bytes, [8, 7, 6, 5, 4, 3, 2, 1]);
    }

    #[test]
    fn what_one_view_writes_the_other_reads_wherever_it_is_mapped() {
        let (guest, host) = views(4);
        guest.store(8, 0x0102_0304_0506_0708);
        let mut bytes = [0; 8];
        host.read(8, &mut bytes);
        assert_eq!(bytes, [8, 7, 6, 5, 4, 3, 2, 1]);
        host.write(PAGE, &[1]);
        assert_eq!(guest.load(PAGE), 1);
        assert_ne!(guest.address(), host.range_ptr(0, 1).addr() as u64);
    }

    #[test]
    fn what_the_guest_loses_the_host_keeps() {
        let (guest, host) = views(16);
        guest.populate(0, 16).unwrap();
        host.map(0, 16).unwrap();
        host.write(5 * PAGE, b"kept");
        guest.drop_mappings(0, 16).unwrap();
        assert_eq!(resident(guest.address()), 0);
        assert_eq!(resident(host.range_ptr(0, 1).addr() as u64), 16 * PAGE_SIZE);
        assert_eq!(guest.load(5 * PAGE), u64::from_le_bytes(*b"kept\0\0\0\0"));
    }

    #[test]
    #[should_panic(expected = "reaches beyond the end")]
    fn access_beyond_the_end_is_caught() {
        views(1).1.write(PAGE - 1, &[0, 0]);
    }

    #[test]
    fn a_view_outlives_the_one_that_was_made_with_it() {
        let (guest, host) = views(1);
        guest.store(0, 7);
        drop(guest);
        assert!(!host.is_zero(0));
    }
}
