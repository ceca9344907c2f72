//! What a raw image prints, into a file. A guest cannot fill the host's disk: after [`LIMIT`] bytes the rest is dropped.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    path::Path,
    sync::{Mutex, PoisonError},
};

/// Most bytes of one process.
const LIMIT: usize = 1 << 20;

#[derive(Debug)]
pub(super) struct Console {
    /// The file and how much may still go into it.
    file: Mutex<(File, usize)>,
}

impl Console {
    /// Appends to the file at `path`, which is made when missing.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        Ok(Self {
            file: Mutex::new((file, LIMIT)),
        })
    }

    /// Prints. What cannot be written is logged, not reported to the guest.
    pub(super) fn print(&self, bytes: &[u8]) {
        let mut guard = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let (file, left) = &mut *guard;
        if *left == 0 {
            return;
        }
        let bytes = &bytes[..bytes.len().min(*left)];
        *left -= bytes.len();
        if let Err(error) = file.write_all(bytes) {
            tracing::warn!(%error, "guest console");
        }
        if *left == 0 {
            tracing::warn!(limit = LIMIT, "guest console is full; the rest is dropped");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_console_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        let console = Console::open(&path).unwrap();
        console.print(b"hello ");
        for _ in 0..3 {
            console.print(&vec![b'x'; LIMIT / 2]);
        }
        let bytes = std::fs::read(path).unwrap();
        assert_eq!(bytes.len(), LIMIT);
        assert!(bytes.starts_with(b"hello x"));
    }
}
