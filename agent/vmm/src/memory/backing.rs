//! What guest memory is made of: one memfd a slot.
//!
//! The file holds the contents; views only map it. It lives as long as any view of it, whatever
//! becomes of their translations.

use std::{io, os::fd::OwnedFd};

use rustix::{
    fs::{MemfdFlags, SeekFrom, ftruncate, memfd_create, seek},
    io::{Errno, pwrite},
};
use slat_proto::model::PAGE_SIZE;

/// What is written to allocate pages; small enough to stay in a processor's cache.
static ZEROES: [u8; 1 << 16] = [0; 1 << 16];

/// A memfd of a fixed length.
#[derive(Debug)]
pub(super) struct Backing {
    fd: OwnedFd,
    len: usize,
}

impl Backing {
    /// `pages` pages of zeroes, which take no memory until they are touched. `name` shows in /proc.
    ///
    /// # Errors
    /// When the kernel refuses the file or its length.
    pub(super) fn new(name: &str, pages: u64) -> io::Result<Self> {
        let len = usize::try_from(pages)
            .ok()
            .and_then(|pages| pages.checked_mul(PAGE_SIZE as usize))
            .filter(|len| *len > 0)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let fd = memfd_create(name, MemfdFlags::CLOEXEC)?;
        ftruncate(&fd, len as u64)?;
        Ok(Self { fd, len })
    }

    /// The file, for whoever maps it.
    pub(super) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// Allocates bytes `[offset, offset + len)`, all of them zero, if the file has none of them
    /// yet; false when it has some. Nobody may write them meanwhile.
    ///
    /// The kernel takes less time to write zeroes to a file than to have each page of it faulted
    /// in, and pages that are there are then mapped many at a time.
    ///
    /// # Errors
    /// When memory is short.
    pub(super) fn allocate(&self, offset: u64, len: u64) -> io::Result<bool> {
        let end = offset + len;
        match seek(&self.fd, SeekFrom::Data(offset)) {
            Ok(data) if data < end => return Ok(false),
            Ok(_) | Err(Errno::NXIO) => {}
            Err(error) => return Err(error.into()),
        }
        let mut at = offset;
        while at < end {
            let piece = (ZEROES.len() as u64).min(end - at) as usize;
            match pwrite(&self.fd, &ZEROES[..piece], at)? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                written => at += written as u64,
            }
        }
        Ok(true)
    }

    /// Length in bytes, a multiple of the page size.
    pub(super) fn len(&self) -> usize {
        self.len
    }
}
