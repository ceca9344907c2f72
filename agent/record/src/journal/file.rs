//! The journal of one VM, as its process has it open, and as everybody else reads it.
//!
//! # After a failed append
//! What the file holds is then not known: after a failed sync the page cache shows a line that
//! never reached the disk, and syncing again may succeed without writing it. [`Journal::settle`]
//! writes what can be read into a new file and puts that in its place, so that what it then says is
//! durable. Where there is no space for a new file, an append that found the disk full is cut off
//! instead.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _, Seek as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    Disk, Entry, JournalError, JournalState, RealDisk,
    decode::{Decoded, VERSION, decode, header, line},
    disk::sync_parent,
};

/// What a journal says, read by others than its process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// What the entries add up to; `None` before the first.
    pub state: Option<JournalState>,
    /// The entries, in order.
    pub entries: Vec<Entry>,
}

/// What the journal in `path` says, without opening it for writing. Empty when there is none.
///
/// # Errors
/// `Io`, `Corrupt`, `Unknown`, `Version`, `Order`.
pub fn contents(path: &Path) -> Result<Contents, JournalError> {
    match std::fs::read(path) {
        Ok(bytes) => {
            let Decoded { state, entries, .. } = decode(path, &bytes)?;
            Ok(Contents { state, entries })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Contents::default()),
        Err(source) => Err(JournalError::Io {
            path: path.to_owned(),
            source,
        }),
    }
}

/// As [`contents`], for the journal of a process that is dead: what is read is made durable first,
/// so that nobody acts on a line that a crash of the host could still take back.
///
/// # Errors
/// As [`contents`]; `Io` when it cannot be made durable.
pub fn settled_contents(path: &Path) -> Result<Contents, JournalError> {
    let fail = |source| JournalError::Io {
        path: path.to_owned(),
        source,
    };
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Contents::default()),
        Err(source) => return Err(fail(source)),
    };
    let decoded = decode(path, &bytes)?;
    RealDisk
        .replace(path, &terminated(&bytes, &decoded))
        .map_err(fail)?;
    Ok(Contents {
        state: decoded.state,
        entries: decoded.entries,
    })
}

/// The whole lines, the last one with its newline.
fn terminated(bytes: &[u8], decoded: &Decoded) -> Vec<u8> {
    let mut whole = bytes[..decoded.whole].to_vec();
    if decoded.unterminated {
        whole.push(b'\n');
    }
    whole
}

/// The journal of one VM, open for appending.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    disk: Arc<dyn Disk>,
    state: Option<JournalState>,
    /// Bytes known to be durable.
    len: u64,
    /// A write failed: what the file holds is not known until it is settled.
    torn: bool,
}

impl Journal {
    /// Opens the journal in `path`, making it when it is missing, and reads it. A last line that a
    /// crash cut off is removed; nothing else ever is.
    ///
    /// # Errors
    /// As [`contents`]; `ReadOnlyVersion`. The file is then as it was.
    pub fn open(path: &Path) -> Result<Self, JournalError> {
        Self::open_on(path, Arc::new(RealDisk))
    }

    /// As [`Journal::open`], writing through `disk`.
    ///
    /// # Errors
    /// As [`Journal::open`].
    pub fn open_on(path: &Path, disk: Arc<dyn Disk>) -> Result<Self, JournalError> {
        let fail = |source| JournalError::Io {
            path: path.to_owned(),
            source,
        };
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(path)
            .map_err(fail)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(fail)?;
        let decoded = decode(path, &bytes)?;
        if decoded.version != VERSION {
            return Err(JournalError::ReadOnlyVersion {
                path: path.to_owned(),
                found: decoded.version,
                known: VERSION,
            });
        }
        let mut len = decoded.whole as u64;
        if decoded.whole < bytes.len() {
            let cut = bytes.len() - decoded.whole;
            tracing::warn!(path = %path.display(), bytes = cut, "dropping a cut-off journal entry");
            disk.truncate(path, len).map_err(fail)?;
        }
        file.seek(io::SeekFrom::End(0)).map_err(fail)?;
        let missing = if decoded.whole == 0 {
            header()
        } else if decoded.unterminated {
            "\n".to_owned()
        } else {
            String::new()
        };
        if !missing.is_empty() {
            disk.append(&mut file, missing.as_bytes()).map_err(fail)?;
            len += missing.len() as u64;
        }
        if decoded.whole == 0 {
            sync_parent(path).map_err(fail)?;
        }
        Ok(Self {
            path: path.to_owned(),
            file,
            disk,
            state: decoded.state,
            len,
            torn: false,
        })
    }

    /// What the entries in `path` add up to; `None` when there are none.
    ///
    /// # Errors
    /// As [`contents`].
    pub fn read(path: &Path) -> Result<Option<JournalState>, JournalError> {
        Ok(contents(path)?.state)
    }

    /// The state so far; `None` before the first entry.
    #[must_use]
    pub fn state(&self) -> Option<&JournalState> {
        self.state.as_ref()
    }

    /// Appends an entry and returns once it is durable. On `Io` the entry may or may not be
    /// durable: the caller must neither go on as if it were, nor do what the entry would have
    /// forbidden, before [`Journal::settle`] told which. An append after a failed one settles
    /// first.
    ///
    /// # Errors
    /// `Order` (nothing written), `Io`, and those of [`Journal::settle`].
    pub fn append(&mut self, entry: &Entry) -> Result<(), JournalError> {
        self.settle()?;
        let next = JournalState::after(self.state.as_ref(), entry)?;
        let json =
            serde_json::to_string(entry).map_err(|error| self.failed(io::Error::other(error)))?;
        let line = line(&json);
        self.torn = true;
        self.disk
            .append(&mut self.file, line.as_bytes())
            .map_err(|source| self.failed(source))?;
        self.torn = false;
        self.len += line.len() as u64;
        self.state = Some(next);
        Ok(())
    }

    /// After an append that failed: makes durable what the file holds, less a line that was cut
    /// off, so that [`Journal::state`] says what is true for good. No effect otherwise.
    ///
    /// # Errors
    /// As [`Journal::open`]: nothing is settled, to be called again.
    pub fn settle(&mut self) -> Result<(), JournalError> {
        if !self.torn {
            return Ok(());
        }
        let bytes = std::fs::read(&self.path).map_err(|source| self.failed(source))?;
        let decoded = decode(&self.path, &bytes)?;
        match self.disk.replace(&self.path, &terminated(&bytes, &decoded)) {
            Ok(()) => {}
            // No space for a copy. What was durable before is a shorter file, and needs none.
            Err(error) if is_full(&error) => self
                .disk
                .truncate(&self.path, self.len)
                .map_err(|source| self.failed(source))?,
            Err(source) => return Err(self.failed(source)),
        }
        *self = Self::open_on(&self.path, Arc::clone(&self.disk))?;
        Ok(())
    }

    fn failed(&self, source: io::Error) -> JournalError {
        JournalError::Io {
            path: self.path.clone(),
            source,
        }
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}
