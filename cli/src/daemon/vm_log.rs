//! The log of a VM's process: its standard error, which the agent opened as `<dir>/log`.
//!
//! A VM may run for years, so the process bounds the file itself ([`slat_record::rotate`]): before
//! a line that would make it too long, the file becomes the old one and standard error a new one,
//! by `dup2`. What is written without a line of the log, such as the message of a panic, goes to
//! whatever standard error is at that moment, and counts, for the length is asked of the file.
//!
//! One lock, held while a line is written, keeps two threads from rotating at once. A process whose
//! standard error is something else, such as a terminal, rotates nothing.

use std::{
    fs::File,
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use slat_record::rotate::rotate;
use tracing_subscriber::fmt::MakeWriter;

/// Standard error, bounded where it is a VM's log.
#[derive(Clone, Debug)]
pub(crate) struct VmLog(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    /// Most bytes of one file, unless one line is longer; there are two files.
    limit: u64,
    writing: Mutex<()>,
}

impl VmLog {
    /// The log at `path`; `None` when standard error is not that file. Messages of panics are
    /// bounded too from now on.
    pub(crate) fn on_stderr(path: PathBuf, limit: u64) -> Option<Self> {
        is_stderr(&path).ok().filter(|is| *is)?;
        let log = Self(Arc::new(Inner {
            path,
            limit,
            writing: Mutex::default(),
        }));
        let (panicked, bounded) = (std::panic::take_hook(), log.clone());
        std::panic::set_hook(Box::new(move |info| {
            panicked(info);
            // Not if this very thread was writing a line.
            if let Ok(_writing) = bounded.0.writing.try_lock() {
                bounded.0.make_room(0);
            }
        }));
        Some(log)
    }
}

/// Whether standard error is the file at `path`.
fn is_stderr(path: &Path) -> io::Result<bool> {
    let is = |fd: &dyn AsFd| rustix::fs::fstat(fd.as_fd()).map(|stat| (stat.st_dev, stat.st_ino));
    Ok(is(&io::stderr())? == is(&File::open(path)?)?)
}

impl Inner {
    /// Rotates when `more` bytes would make the file too long. What fails is tried again with the
    /// next line; until then the file grows on. The caller holds the lock.
    fn make_room(&self, more: u64) {
        let length = rustix::fs::fstat(io::stderr()).map(|stat| stat.st_size);
        let length = length.ok().and_then(|length| u64::try_from(length).ok());
        let full = |length: u64| length > 0 && length.saturating_add(more) > self.limit;
        if length.is_some_and(full)
            && let Ok(file) = rotate(&self.path)
        {
            // Should it fail, the old file grows on, and is rotated once more.
            let _ = rustix::stdio::dup2_stderr(&file);
        }
    }
}

/// Writes whole lines.
#[derive(Debug)]
pub(crate) struct Line<'a>(&'a Inner);

impl io::Write for Line<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let _writing = self
            .0
            .writing
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.0.make_room(line.len() as u64);
        io::Write::write_all(&mut io::stderr(), line)?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for VmLog {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line(&self.0)
    }
}
