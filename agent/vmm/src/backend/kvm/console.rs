//! What a raw image prints, into a file. A guest cannot fill the host's disk: after [`LIMIT`] bytes
//! the file becomes the old one, and what was the old one goes ([`slat_record::rotate`]). What the
//! guest printed last is always there.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use slat_record::rotate::rotate;

/// Most bytes of one file; there are two.
const LIMIT: usize = 1 << 20;

#[derive(Debug)]
pub(super) struct Console {
    path: PathBuf,
    output: Mutex<Output>,
}

#[derive(Debug)]
struct Output {
    file: File,
    /// How much may still go into it.
    left: usize,
    /// Something could not be written. Logged once: the guest may print for ever.
    failed: bool,
}

impl Console {
    /// Appends to the file at `path`, which is made when missing.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        let before = usize::try_from(file.metadata()?.len()).unwrap_or(LIMIT);
        Ok(Self {
            path: path.to_owned(),
            output: Mutex::new(Output {
                file,
                left: LIMIT.saturating_sub(before),
                failed: false,
            }),
        })
    }

    /// Prints. What cannot be written is dropped, and not reported to the guest.
    pub(super) fn print(&self, bytes: &[u8]) {
        let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        for bytes in bytes.chunks(LIMIT) {
            if let Err(error) = output.write(bytes, &self.path)
                && !std::mem::replace(&mut output.failed, true)
            {
                tracing::warn!(%error, "guest console: what cannot be written is dropped");
            }
        }
    }
}

impl Output {
    /// At most [`LIMIT`] bytes.
    fn write(&mut self, bytes: &[u8], path: &Path) -> io::Result<()> {
        if bytes.len() > self.left {
            self.file = rotate(path)?;
            self.left = LIMIT;
        }
        self.left -= bytes.len();
        self.file.write_all(bytes)
    }
}

#[cfg(test)]
mod tests {
    use slat_record::rotate::old;

    use super::*;

    #[test]
    fn the_console_is_bounded_and_has_what_was_printed_last() {
        let dir = slat_test_dir::TestDir::new();
        let path = dir.path().join("console");
        let console = Console::open(&path).unwrap();
        for round in 0..40_u8 {
            console.print(&vec![round; LIMIT / 8]);
        }
        console.print(b"the end");
        let read = |path: &Path| std::fs::read(path).unwrap();
        assert_eq!(read(&path), b"the end");
        let older = read(&old(&path));
        assert_eq!(older.len(), LIMIT);
        assert_eq!((older[0], older[LIMIT - 1]), (32, 39));
        // More at once than both files hold, and a process that finds files there.
        console.print(&vec![b'x'; 3 * LIMIT]);
        Console::open(&path).unwrap().print(b"again");
        assert_eq!(read(&path), b"again");
        assert_eq!(read(&old(&path)).len(), LIMIT);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
