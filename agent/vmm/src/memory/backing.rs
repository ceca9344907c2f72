//! What guest memory is made of: one memfd a slot.
//!
//! The file holds the contents; views only map it. It lives as long as any view of it, whatever
//! becomes of their translations.

use std::{io, os::fd::OwnedFd};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use slat_proto::model::PAGE_SIZE;

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

    /// Length in bytes, a multiple of the page size.
    pub(super) fn len(&self) -> usize {
        self.len
    }
}
