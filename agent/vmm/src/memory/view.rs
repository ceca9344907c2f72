//! The two views of a slot's memory: two mappings of one memfd, or of its part of one.
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
//! # Watched
//! While a guest view is registered with userfaultfd ([`GuestView::watch`]) who touches a page of
//! it that is not mapped waits for the pager. So nothing of ours touches it then: memory is
//! populated through the host view, and no huge pages are made, which would take mappings away
//! behind the pager's back. Whoever begins to watch keeps those that make huge pages out meanwhile.
//!
//! Lifetime: a view is unmapped when its last `Arc` goes; users keep the `Arc` while they use
//! pointers.

use std::{
    io,
    ops::Range,
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use slat_paging::uffd::{Uffd, Watch};
use slat_proto::model::PAGE_SIZE;

use super::{backing::Backing, huge::BLOCK_BYTES, span::Span};

const PAGE: usize = PAGE_SIZE as usize;
const HUGE: usize = BLOCK_BYTES as usize;
/// Memory policy: these nodes, and no others.
pub(super) const MPOL_BIND: i32 = 2;

/// A shared read-write mapping of a whole backing.
#[derive(Debug)]
struct Mapped {
    base: NonNull<u8>,
    /// Before the backing: of a part, pages go when no view of it is left.
    _span: Arc<Span>,
    backing: Arc<Backing>,
}

// SAFETY: the pointer is to a shared mapping that lives as long as the value; every access through
// this type is a copy or an atomic operation, which any thread may do.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl Mapped {
    /// Begins at a multiple of 2 MiB when it is as long, so that the kernel can map it by such
    /// pages; of reserved pages at a multiple of one, and the first mapping reserves all of them.
    fn new(backing: &Arc<Backing>) -> io::Result<Self> {
        let align = backing.reserved_page().map_or(HUGE, |page| page as usize);
        if backing.len() < align {
            return Self::anywhere(backing);
        }
        let reserve = match backing.reserved_page() {
            Some(_) => MapFlags::empty(),
            None => MapFlags::NORESERVE,
        };
        let whole = backing.len().checked_add(align);
        let whole = whole.ok_or(io::ErrorKind::InvalidInput)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a reservation at an address the kernel chooses; nothing else refers to it.
        let start =
            unsafe { mmap_anonymous(std::ptr::null_mut(), whole, ProtFlags::empty(), flags)? };
        let head = start.addr().next_multiple_of(align) - start.addr();
        // SAFETY: head < align, so it is inside the reservation.
        let base = unsafe { start.byte_add(head) };
        // SAFETY: over our own reservation, which is as long from `base` on.
        let mapped = unsafe {
            mmap(
                base,
                backing.len(),
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::FIXED | reserve,
                backing.fd(),
                0,
            )
        };
        if let Err(error) = mapped {
            // SAFETY: the reservation, which nobody has seen.
            unsafe { munmap(start, whole)? }
            return Err(error.into());
        }
        let base = NonNull::new(base.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let len = backing.len();
        let mapped = Self {
            base,
            _span: Arc::new(Span::made(base, len)),
            backing: Arc::clone(backing),
        };
        if head > 0 {
            // SAFETY: the reservation before the mapping.
            unsafe { munmap(start, head)? }
        }
        if head < align {
            // SAFETY: the reservation after the mapping.
            unsafe { munmap(start.byte_add(head + len), align - head)? }
        }
        Ok(mapped)
    }

    fn anywhere(backing: &Arc<Backing>) -> io::Result<Self> {
        let span = Span::new(backing.fd(), backing.len())?;
        Ok(Self::part(backing, &Arc::new(span)))
    }

    /// A backing in a mapping of its file.
    fn part(backing: &Arc<Backing>, span: &Arc<Span>) -> Self {
        // Both ends are in it.
        let first = backing.start() as usize;
        span.at(first + backing.len() - 1);
        Self {
            base: span.at(first),
            _span: Arc::clone(span),
            backing: Arc::clone(backing),
        }
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

    /// Makes one page of each of these 2 MiB blocks, contents kept. At least one page of each must
    /// be there.
    fn collapse(&self, blocks: Range<u64>) -> io::Result<()> {
        let len = (blocks.end - blocks.start) as usize * HUGE;
        let start = self.at(blocks.start as usize * HUGE, len);
        // SAFETY: inside our own shared file mapping; contents do not change.
        match unsafe { libc::madvise(start.cast(), len, libc::MADV_COLLAPSE) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Says whether touches may bring huge pages. A kernel that has none needs no such word.
    fn hint(&self, advice: Advice) -> io::Result<()> {
        match self.advise(0, self.pages(), advice) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            other => other,
        }
    }

    /// Pages of the file are those of one NUMA node from now on.
    fn bind(&self, node: u32) -> io::Result<()> {
        let mut mask = vec![0_u64; node as usize / 64 + 1];
        mask[node as usize / 64] = 1 << (node % 64);
        // The kernel looks at one bit less than it is told.
        let bits = mask.len() * 64 + 1;
        let start = self.at(0, self.backing.len());
        // SAFETY: inside our own mapping; the kernel reads `bits - 1` bits of `mask`. No page is
        // moved, so contents do not change.
        let bound = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                start,
                self.backing.len(),
                MPOL_BIND,
                mask.as_ptr(),
                bits,
                0,
            )
        };
        match bound {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Advice that changes no contents: populating, dropping translations, hints.
    fn advise(&self, page: u64, pages: u64, advice: Advice) -> io::Result<()> {
        let (offset, len) = (page as usize * PAGE, pages as usize * PAGE);
        let start = self.at(offset, len);
        // SAFETY: inside our own shared file mapping. Populating and hints change no contents
        // there, and DONTNEED only drops translations.
        unsafe { madvise(start.cast(), len, advice)? }
        Ok(())
    }
}

/// What the guest's slot maps.
#[derive(Debug)]
pub(crate) struct GuestView(Mapped, AtomicBool);

impl GuestView {
    fn of(mapped: Mapped) -> Self {
        Self(mapped, AtomicBool::new(false))
    }

    /// Has its faults told by a descriptor. What is mapped stays so.
    ///
    /// # Errors
    /// When the kernel refuses; it is not watched then.
    pub(crate) fn watch(&self, uffd: &Uffd, watch: Watch) -> io::Result<()> {
        uffd.register(self.address(), self.0.backing.len() as u64, watch)?;
        self.1.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Ends that. Who waits goes on, and the kernel maps what is touched.
    ///
    /// # Errors
    /// When the kernel refuses; it stays watched.
    pub(crate) fn unwatch(&self, uffd: &Uffd) -> io::Result<()> {
        if self.is_watched() {
            uffd.unregister(self.address(), self.0.backing.len() as u64)?;
            self.1.store(false, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Whether its faults are told.
    #[must_use]
    pub(crate) fn is_watched(&self) -> bool {
        self.1.load(Ordering::SeqCst)
    }

    /// # Errors
    /// When the kernel refuses the mapping.
    pub(super) fn new(backing: &Arc<Backing>) -> io::Result<Self> {
        Mapped::new(backing).map(Self::of)
    }

    /// Of all parts of a file, in their order.
    ///
    /// # Errors
    /// When the kernel refuses the mapping.
    pub(super) fn of_parts(parts: &[Arc<Backing>]) -> io::Result<Vec<Self>> {
        let Some(last) = parts.last() else {
            return Ok(Vec::new());
        };
        let whole = last.start() as usize + last.len();
        let span = Arc::new(Span::new(last.fd(), whole)?);
        let view = |part| Self::of(Mapped::part(part, &span));
        Ok(parts.iter().map(view).collect())
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

    /// Makes one page of each of these 2 MiB blocks, of each of which at least a page is there, and
    /// maps it so. Contents stay, whoever uses them meanwhile; under KVM the notifier zaps the
    /// second-stage mappings of the blocks.
    ///
    /// # Errors
    /// When the kernel has no such page, or cannot move what is there now: for one of them at
    /// least.
    ///
    /// # Panics
    /// When a block reaches beyond the end.
    pub(super) fn collapse(&self, blocks: Range<u64>) -> io::Result<()> {
        self.0.collapse(blocks)
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

    /// Says whether touches may bring huge pages.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(super) fn hint(&self, advice: Advice) -> io::Result<()> {
        self.0.hint(advice)
    }

    /// Pages of the file, in whatever view they are touched first, are those of one NUMA node from
    /// now on.
    ///
    /// # Errors
    /// EINVAL when there is no such node, or this process may not use it.
    pub(super) fn bind(&self, node: u32) -> io::Result<()> {
        self.0.bind(node)
    }

    /// The policy of a page, and the first of its nodes.
    #[cfg(test)]
    pub(super) fn node(&self, page: u64) -> io::Result<(i32, u32)> {
        const MPOL_F_ADDR: usize = 2;
        let (mut mode, mut mask) = (0_i32, [0_u64; 16]);
        let at = self.0.at(page as usize * PAGE, PAGE);
        // SAFETY: the kernel writes one int and 1,024 bits, which are there.
        let told = unsafe {
            libc::syscall(
                libc::SYS_get_mempolicy,
                &raw mut mode,
                mask.as_mut_ptr(),
                mask.len() * 64,
                at,
                MPOL_F_ADDR,
            )
        };
        if told != 0 {
            return Err(io::Error::last_os_error());
        }
        let word = mask.iter().position(|word| *word != 0).unwrap_or(0);
        Ok((mode, word as u32 * 64 + mask[word].trailing_zeros()))
    }

    /// Drops the view's translations of the range; the backing keeps the contents. Under KVM the
    /// notifier zaps the second-stage mappings of the range. Of reserved pages whole ones lose
    /// theirs.
    ///
    /// # Errors
    /// When the kernel refuses.
    ///
    /// # Panics
    /// When the range reaches beyond the end.
    pub(crate) fn drop_mappings(&self, page: u64, pages: u64) -> io::Result<()> {
        let per = self.0.backing.reserved_page().unwrap_or(PAGE_SIZE) / PAGE_SIZE;
        let first = page - page % per;
        let end = (page + pages).next_multiple_of(per);
        self.0.advise(first, end - first, Advice::LinuxDontNeed)
    }
}

/// What our own threads read and write through.
#[derive(Debug)]
pub(crate) struct HostView(Mapped);

impl HostView {
    /// # Errors
    /// When the kernel refuses the mapping.
    pub(super) fn new(backing: &Arc<Backing>) -> io::Result<Self> {
        match backing.span() {
            Some(span) => Ok(Self(Mapped::part(backing, span))),
            None => Mapped::new(backing).map(Self),
        }
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

    /// Overwrites pages with zeroes.
    ///
    /// # Panics
    /// When the range reaches beyond the end.
    pub(super) fn clear(&self, page: u64, pages: u64) {
        let len = pages as usize * PAGE;
        let to = self.0.at(page as usize * PAGE, len);
        // SAFETY: the range is inside the shared mapping; what the guest reads meanwhile may be
        // torn between what was there and zeroes, as with any write of the host's.
        unsafe { std::ptr::write_bytes(to, 0, len) }
    }

    /// Says whether touches may bring huge pages.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(super) fn hint(&self, advice: Advice) -> io::Result<()> {
        self.0.hint(advice)
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

    /// Allocates pages that are not there and maps all of them here.
    ///
    /// # Errors
    /// When memory is short.
    ///
    /// # Panics
    /// When the range reaches beyond the end.
    pub(super) fn populate(&self, page: u64, pages: u64) -> io::Result<()> {
        self.0.advise(page, pages, Advice::LinuxPopulateWrite)
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
    of_mapping(start, "Rss:")
}

/// Bytes of the mapping at `start` that this process's page tables map by 2 MiB.
#[cfg(test)]
pub(crate) fn mapped_huge(start: u64) -> u64 {
    of_mapping(start, "ShmemPmdMapped:")
}

/// A figure that the kernel gives of the mapping at `start`.
#[cfg(test)]
fn of_mapping(start: u64, what: &str) -> u64 {
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let range = format!("{start:x}-");
    let of = maps.lines().skip_while(|line| !line.starts_with(&range));
    let figure = of
        .filter_map(|line| line.strip_prefix(what))
        .next()
        .unwrap();
    let kib = figure.trim().strip_suffix(" kB").unwrap();
    kib.parse::<u64>().unwrap() << 10
}

#[cfg(test)]
mod tests;
