//! A memory file, or a part of one, by pages.
//!
//! It is read and written by `pread` and `pwrite`, never through a mapping: a read of a hole makes
//! no page, a file that somebody cut is an error and not a signal, and pages go from file to file
//! without a mapping that would have to be kept. Nothing here has a position or a lock of its own.
//!
//! *Invariant*: whoever looks for data (`SEEK_DATA`) asks and never depends on the file's position,
//! which several processes share.

use std::{io, os::fd::OwnedFd};

use rustix::{
    fs::{FallocateFlags, SeekFrom, fallocate, fstat, seek},
    io::{Errno, pread, pwrite},
};
use slat_paging::PAGE;

/// See the module.
#[derive(Debug)]
pub(crate) struct PageFile {
    fd: OwnedFd,
    start: u64,
}

impl PageFile {
    /// `pages` pages from byte `start` of the file on, all of which it must have.
    pub(crate) fn new(fd: OwnedFd, start: u64, pages: u64) -> io::Result<Self> {
        let bytes = pages.checked_mul(PAGE as u64);
        let end = bytes.and_then(|bytes| bytes.checked_add(start));
        let size = u64::try_from(fstat(&fd)?.st_size).unwrap_or(0);
        if !start.is_multiple_of(PAGE as u64) || end.is_none_or(|end| end > size) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(Self { fd, start })
    }

    fn offset(&self, page: u64) -> u64 {
        self.start + page * PAGE as u64
    }

    /// Reads pages from `page` on.
    pub(crate) fn read(&self, page: u64, mut into: &mut [u8]) -> io::Result<()> {
        let mut at = self.offset(page);
        while !into.is_empty() {
            match pread(&self.fd, &mut *into, at) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(got) => {
                    into = &mut into[got..];
                    at += got as u64;
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Writes pages from `page` on.
    pub(crate) fn write(&self, page: u64, mut from: &[u8]) -> io::Result<()> {
        let mut at = self.offset(page);
        while !from.is_empty() {
            match pwrite(&self.fd, from, at) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(put) => {
                    from = &from[put..];
                    at += put as u64;
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// The first page in `[from, to)` that is in the file. Where a run ends is not asked for: the
    /// kernel looks for that up to the end of the file.
    pub(crate) fn first_data(&self, from: u64, to: u64) -> io::Result<Option<u64>> {
        if from >= to {
            return Ok(None);
        }
        let first = match seek(&self.fd, SeekFrom::Data(self.offset(from))) {
            Ok(at) => (at - self.start) / PAGE as u64,
            Err(Errno::NXIO) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        Ok((first < to).then_some(first))
    }

    /// Takes pages out: they read as zeroes, and all mappings of them are gone.
    pub(crate) fn punch(&self, page: u64, count: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        self.allocating(flags, page, count)
    }

    /// Makes pages that are not there, of zeroes.
    pub(crate) fn allocate(&self, page: u64, count: u64) -> io::Result<()> {
        self.allocating(FallocateFlags::KEEP_SIZE, page, count)
    }

    fn allocating(&self, flags: FallocateFlags, page: u64, count: u64) -> io::Result<()> {
        loop {
            let (at, len) = (self.offset(page), count * PAGE as u64);
            match fallocate(&self.fd, flags, at, len) {
                Err(Errno::INTR) => {}
                result => return Ok(result?),
            }
        }
    }
}

/// Whether a page is all zeroes.
pub(crate) fn is_zero(page: &[u8]) -> bool {
    let (chunks, rest) = page.as_chunks::<64>();
    chunks.iter().all(|chunk| chunk == &[0; 64]) && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(pages: u64) -> PageFile {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let fd = rustix::fs::memfd_create("test", flags).unwrap();
        rustix::fs::ftruncate(&fd, (pages + 1) * PAGE as u64).unwrap();
        PageFile::new(fd, PAGE as u64, pages).unwrap()
    }

    #[test]
    fn data_is_found_and_holes_stay_holes() {
        let file = file(100);
        assert_eq!(file.first_data(0, 100).unwrap(), None);
        let mut page = [1; PAGE];
        file.write(40, &page).unwrap();
        file.write(41, &page).unwrap();
        file.read(7, &mut page).unwrap();
        assert!(is_zero(&page));
        assert_eq!(file.first_data(0, 100).unwrap(), Some(40));
        assert_eq!(file.first_data(41, 42).unwrap(), Some(41));
        assert_eq!(file.first_data(0, 40).unwrap(), None);
        file.allocate(50, 1).unwrap();
        file.punch(40, 1).unwrap();
        assert_eq!(file.first_data(0, 100).unwrap(), Some(41));
    }

    #[test]
    fn a_file_that_is_too_short_is_refused_and_one_that_is_cut_an_error() {
        let file = file(4);
        let fd = file.fd.try_clone().unwrap();
        assert!(PageFile::new(fd, 0, 6).is_err());
        rustix::fs::ftruncate(&file.fd, 2 * PAGE as u64).unwrap();
        let error = file.read(1, &mut [0; PAGE]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
