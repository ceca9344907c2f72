//! What guest memory is made of: one memfd a slot, or a part of one that small slots of a batch
//! share (see `span`).
//!
//! Either its pages come from what everybody uses, as they are touched, or from those that the host
//! set aside (hugetlbfs): then its first mapping reserves all of them, or fails. A reserved file
//! has neither holes that can be asked for nor pages that can be written by a call.
//!
//! The file holds the contents; views only map it. It lives as long as any view of it, whatever
//! becomes of their translations.

use std::{
    io,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use rustix::{
    fs::{FallocateFlags, MemfdFlags, SeekFrom, fallocate, fstat, ftruncate, memfd_create, seek},
    io::{Errno, pwrite},
};
use slat_proto::model::{MemoryBacking, PAGE_SIZE};

use super::span::Span;

/// What is written to allocate pages; small enough to stay in a processor's cache.
static ZEROES: [u8; 1 << 16] = [0; 1 << 16];

/// A memfd of a fixed length, or a part of one.
#[derive(Debug)]
pub(super) struct Backing {
    fd: Arc<OwnedFd>,
    /// Its first byte in the file.
    start: u64,
    len: usize,
    /// Bytes of its pages when they are set aside for it.
    reserved_page: Option<u64>,
    /// Of a part, our own threads' mapping of the file.
    span: Option<Arc<Span>>,
    /// Another process has the file, and reads it also when this is gone.
    lent: AtomicBool,
}

impl Backing {
    /// `pages` pages of zeroes, which take no memory until they are touched. `name` shows in /proc.
    ///
    /// # Errors
    /// When the kernel refuses the file or its length, or has no pages of that size.
    pub(super) fn new(name: &str, pages: u64, kind: MemoryBacking) -> io::Result<Self> {
        let len = length(pages)?;
        let flags = match kind {
            MemoryBacking::Auto | MemoryBacking::Thp | MemoryBacking::Small => MemfdFlags::empty(),
            MemoryBacking::Hugetlb2M => MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
            MemoryBacking::Hugetlb1G => MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB,
        };
        let fd = memfd_create(name, MemfdFlags::CLOEXEC | flags)?;
        ftruncate(&fd, len as u64)?;
        Ok(Self {
            fd: Arc::new(fd),
            start: 0,
            len,
            reserved_page: kind.reserved_page(),
            span: None,
            lent: AtomicBool::new(false),
        })
    }

    /// Parts of one file, of so many pages each, all of them zeroes.
    ///
    /// # Errors
    /// When the kernel refuses the file, its length or its mapping.
    pub(super) fn parts(name: &str, pages: &[u64]) -> io::Result<Vec<Self>> {
        let all = pages
            .iter()
            .try_fold(0_u64, |all, pages| all.checked_add(*pages));
        let whole = Self::new(
            name,
            all.ok_or(io::ErrorKind::InvalidInput)?,
            MemoryBacking::Auto,
        )?;
        let span = Arc::new(Span::new(&whole.fd, whole.len)?);
        let mut start = 0;
        let part = |pages: &u64| {
            let len = length(*pages)?;
            let part = Self {
                fd: Arc::clone(&whole.fd),
                start,
                len,
                reserved_page: None,
                span: Some(Arc::clone(&span)),
                lent: AtomicBool::new(false),
            };
            start += len as u64;
            Ok(part)
        };
        pages.iter().map(part).collect()
    }

    /// Of a part, our own threads' mapping of the whole file.
    pub(super) fn span(&self) -> Option<&Arc<Span>> {
        self.span.as_ref()
    }

    /// The file that it is a part of, of which nothing is given back when this goes.
    #[cfg(test)]
    pub(super) fn whole(&self) -> Self {
        let len = fstat(&*self.fd).map_or(0, |file| file.st_size as usize);
        Self {
            fd: Arc::clone(&self.fd),
            start: 0,
            len,
            reserved_page: None,
            span: None,
            lent: AtomicBool::new(false),
        }
    }

    /// Its first byte in the file.
    pub(super) fn start(&self) -> u64 {
        self.start
    }

    /// Bytes of its pages when they are set aside for it.
    pub(super) fn reserved_page(&self) -> Option<u64> {
        self.reserved_page
    }

    /// Says that another process gets the file: pages of a part stay when the part goes.
    pub(super) fn lend(&self) {
        self.lent.store(true, Ordering::Relaxed);
    }

    /// The file, for whoever maps it.
    pub(super) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// Whether any page of bytes `[offset, offset + len)` is there. A file of reserved pages does
    /// not say, and has all of them to be asked for.
    pub(super) fn has_data(&self, offset: u64, len: u64) -> bool {
        let from = self.start + offset;
        self.reserved_page.is_some()
            || seek(&*self.fd, SeekFrom::Data(from)).is_ok_and(|data| data < from + len)
    }

    /// Allocates bytes `[offset, offset + len)`, all of them zero, if the file has none of them
    /// yet; false when it has some, or is of reserved pages. Nobody may write them meanwhile.
    ///
    /// The kernel takes less time to write zeroes to a file than to have each page of it faulted
    /// in, and pages that are there are then mapped many at a time.
    ///
    /// # Errors
    /// When memory is short.
    pub(super) fn allocate(&self, offset: u64, len: u64) -> io::Result<bool> {
        if self.reserved_page.is_some() {
            return Ok(false);
        }
        let from = self.start + offset;
        let end = from + len;
        match seek(&*self.fd, SeekFrom::Data(from)) {
            Ok(data) if data < end => return Ok(false),
            Ok(_) | Err(Errno::NXIO) => {}
            Err(error) => return Err(error.into()),
        }
        let mut at = from;
        while at < end {
            let piece = (ZEROES.len() as u64).min(end - at) as usize;
            match pwrite(&*self.fd, &ZEROES[..piece], at)? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                written => at += written as u64,
            }
        }
        Ok(true)
    }

    /// Gives the pages of bytes `[offset, offset + len)` back; they read zero from then on. The
    /// kernel unmaps them in every view first, and by its notifier in the second stage of KVM.
    ///
    /// # Errors
    /// When the kernel refuses; some of the pages may be gone then.
    pub(super) fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        loop {
            match fallocate(&*self.fd, how, self.start + offset, len) {
                // What was done is done again at no cost.
                Err(Errno::INTR) => {}
                other => return Ok(other?),
            }
        }
    }

    /// Bytes of memory that the file has now.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub(super) fn allocated(&self) -> io::Result<u64> {
        if self.span.is_some() {
            return self.allocated_part();
        }
        // Blocks are of 512 bytes, whatever the page size.
        Ok(u64::try_from(fstat(&*self.fd)?.st_blocks).unwrap_or(0) * 512)
    }

    /// The kernel counts a file's blocks as a whole only.
    fn allocated_part(&self) -> io::Result<u64> {
        let (mut at, end) = (self.start, self.start + self.len as u64);
        let mut bytes = 0;
        while at < end {
            let data = match seek(&*self.fd, SeekFrom::Data(at)) {
                Ok(data) if data < end => data,
                Ok(_) | Err(Errno::NXIO) => break,
                Err(error) => return Err(error.into()),
            };
            at = match seek(&*self.fd, SeekFrom::Hole(data)) {
                Ok(hole) => hole.min(end),
                // It went meanwhile.
                Err(Errno::NXIO) => break,
                Err(error) => return Err(error.into()),
            };
            bytes += at - data;
        }
        Ok(bytes)
    }

    /// Length in bytes, a multiple of the page size.
    pub(super) fn len(&self) -> usize {
        self.len
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        // A file goes with its last part.
        if let Some(span) = &self.span
            && !self.lent.load(Ordering::Relaxed)
            && Arc::strong_count(&self.fd) > 1
            && let Err(error) = span.remove(self.start as usize, self.len)
        {
            tracing::error!(%error, "pages of a slot that is gone stay");
        }
    }
}

fn length(pages: u64) -> io::Result<usize> {
    let len = usize::try_from(pages).ok();
    let len = len.and_then(|pages| pages.checked_mul(PAGE_SIZE as usize));
    Ok(len
        .filter(|len| *len > 0)
        .ok_or(io::ErrorKind::InvalidInput)?)
}
