//! The durable record of who may run a VM: one append-only file in the VM's directory, one line an entry.
//!
//! A line is the CRC-32 of the text after it (8 hexadecimal digits), a space, and the entry as JSON. [`Journal::append`]
//! returns after `fdatasync`: what it returned from survives a crash. A last line without its newline or with a wrong sum is
//! a write that a crash cut off: it never returned, so it is dropped. The same anywhere else is corruption and refused.
//!
//! # Order of syncs in a handover (epoch e)
//! 1. destination appends `Prepared(e+1)`, then says READY;
//! 2. source appends `Relinquished(e)` — **the point of no return** — then says COMMIT;
//! 3. destination appends `Owned(e+1)`, then runs its vCPUs.
//!
//! Reading the source's journal therefore decides every handover whose messages were lost: `Relinquished` means the
//! destination owns the VM, anything else that it never will. The directory is synced when the file is made, so that the
//! file itself survives.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _, Seek as _, Write as _},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use slat_proto::{ApiError, Reason};

/// One entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "entry", rename_all = "snake_case", deny_unknown_fields)]
pub enum Entry {
    /// The VM was created here and owned from the start.
    Created {
        /// `{vm}`.
        vm: String,
        /// The VM's identity.
        uid: String,
        /// Epoch 1.
        epoch: u64,
    },
    /// The VM is to be received here; not owned.
    Incoming {
        /// `{vm}`.
        vm: String,
        /// The VM's identity.
        uid: String,
        /// `{migration}`.
        migration: String,
        /// The source's epoch.
        epoch: u64,
    },
    /// Everything has been received and verified. Not owned.
    Prepared {
        /// `{migration}`.
        migration: String,
        /// The epoch the VM would have here.
        epoch: u64,
    },
    /// This process gave the VM away and may never run this epoch again.
    Relinquished {
        /// `{migration}`.
        migration: String,
        /// The epoch given up.
        epoch: u64,
    },
    /// The VM is owned here from now on.
    Owned {
        /// `{migration}`.
        migration: String,
        /// Its epoch.
        epoch: u64,
    },
    /// The incoming side was given up; nothing is owned.
    Aborted {
        /// `{migration}`.
        migration: String,
    },
    /// The VM was deleted, or the relinquished process was released.
    Ended,
}

/// What a journal says about ownership.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ownership {
    /// This process may run the epoch.
    Owner {
        /// Current epoch.
        epoch: u64,
    },
    /// Receiving; never owned.
    Incoming {
        /// `{migration}`.
        migration: String,
        /// The source's epoch.
        epoch: u64,
    },
    /// READY may have been said. Only the source's journal says what happens.
    Prepared {
        /// `{migration}`.
        migration: String,
        /// The epoch the VM would have here.
        epoch: u64,
    },
    /// Given away.
    Relinquished {
        /// `{migration}`.
        migration: String,
        /// The epoch given up.
        epoch: u64,
    },
    /// Incoming side given up.
    Aborted {
        /// `{migration}`.
        migration: String,
    },
    /// Deleted or released.
    Ended,
}

/// The state that a journal's entries add up to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JournalState {
    /// `{vm}`.
    pub vm: String,
    /// The VM's identity.
    pub uid: String,
    /// Who may run it.
    pub ownership: Ownership,
    /// The migration that brought it here, when one did.
    pub arrived_by: Option<String>,
}

/// A failure of the journal.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JournalError {
    /// Reading or writing failed.
    #[error("journal {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A line that is neither whole nor the last.
    #[error("journal {path} is corrupt at line {line}: {message}")]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// An entry that cannot follow what is there.
    #[error("journal: {entry} cannot follow {state}")]
    Order {
        /// The entry refused.
        entry: String,
        /// The state it met.
        state: String,
    },
}

impl From<JournalError> for ApiError {
    fn from(error: JournalError) -> Self {
        ApiError::new(Reason::Journal, error.to_string())
    }
}

/// The journal of one VM, open for appending.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    state: Option<JournalState>,
    /// A write failed: what the file holds is not known until it is read again.
    torn: bool,
}

impl Journal {
    /// Opens the journal in `path`, making it when it is missing, and reads it. A cut-off last line is removed.
    ///
    /// # Errors
    /// `Io`, `Corrupt`.
    pub fn open(path: &Path) -> Result<Self, JournalError> {
        let fail = |source| JournalError::Io {
            path: path.to_owned(),
            source,
        };
        let new = !path.exists();
        let file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(path)
            .map_err(fail)?;
        if new {
            file.sync_all().map_err(fail)?;
            if let Some(parent) = path.parent() {
                File::open(parent)
                    .and_then(|dir| dir.sync_all())
                    .map_err(fail)?;
            }
        }
        Self::over(path, file)
    }

    /// Reads the journal through `file`, opened at `path` by the caller; later entries go to it. A file that cannot be
    /// written makes a journal whose appends fail. A cut-off last line is removed.
    ///
    /// # Errors
    /// `Io`, `Corrupt`.
    pub fn over(path: &Path, mut file: File) -> Result<Self, JournalError> {
        let fail = |source| JournalError::Io {
            path: path.to_owned(),
            source,
        };
        let mut text = Vec::new();
        file.read_to_end(&mut text).map_err(fail)?;
        let (state, whole) = replay(path, &text)?;
        if whole < text.len() {
            tracing::warn!(path = %path.display(), bytes = text.len() - whole, "dropping a cut-off journal entry");
            file.set_len(whole as u64).map_err(fail)?;
            file.sync_all().map_err(fail)?;
            file.seek(io::SeekFrom::End(0)).map_err(fail)?;
        }
        Ok(Self {
            path: path.to_owned(),
            file,
            state,
            torn: false,
        })
    }

    /// After an append that failed: writes what the file holds, less a line that was cut off, into a new file that takes its
    /// place, so that [`Journal::state`] says what is durable. No effect otherwise. Reading alone would not do: after a failed
    /// sync the page cache shows a line that never reached the disk, and syncing again may succeed without writing it. What
    /// forbade something must be obeyed whatever is found: an entry found missing may have been read by others.
    ///
    /// # Errors
    /// As [`Journal::open`]; to be called again.
    pub fn recover(&mut self) -> Result<(), JournalError> {
        if self.torn {
            self.rewrite()?;
            *self = Self::open(&self.path)?;
        }
        Ok(())
    }

    fn rewrite(&self) -> Result<(), JournalError> {
        let fail = |source| JournalError::Io {
            path: self.path.clone(),
            source,
        };
        let text = std::fs::read(&self.path).map_err(fail)?;
        let (_, whole) = replay(&self.path, &text)?;
        let aside = self.path.with_extension("new");
        let mut file = File::create(&aside).map_err(fail)?;
        file.write_all(&text[..whole])
            .and_then(|()| file.sync_all())
            .and_then(|()| std::fs::rename(&aside, &self.path))
            .map_err(fail)?;
        match self.path.parent() {
            Some(parent) => File::open(parent)
                .and_then(|dir| dir.sync_all())
                .map_err(fail),
            None => Ok(()),
        }
    }

    /// What the journal in `path` says, without opening it for writing. `None` when there is none or it is empty.
    ///
    /// # Errors
    /// `Io`, `Corrupt`.
    pub fn read(path: &Path) -> Result<Option<JournalState>, JournalError> {
        match std::fs::read(path) {
            Ok(text) => Ok(replay(path, &text)?.0),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(JournalError::Io {
                path: path.to_owned(),
                source,
            }),
        }
    }

    /// The entries of a journal that [`Journal::read`] has accepted, oldest first; a cut-off last line is left out as there.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn history(path: &Path) -> io::Result<Vec<Entry>> {
        match std::fs::read(path) {
            Ok(text) => Ok(text
                .split_inclusive(|byte| *byte == b'\n')
                .map_while(|line| parse(line).ok())
                .collect()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// The state so far; `None` before the first entry.
    #[must_use]
    pub fn state(&self) -> Option<&JournalState> {
        self.state.as_ref()
    }

    /// Appends an entry and returns once it is durable. On an error the entry may or may not be durable: the caller must
    /// not go on as if it were, and must not resume what the entry would have forbidden. The next append recovers first.
    ///
    /// # Errors
    /// `Order` (nothing written), `Io`, and those of [`Journal::recover`].
    pub fn append(&mut self, entry: &Entry) -> Result<(), JournalError> {
        self.recover()?;
        let next = step(self.state.as_ref(), entry)?;
        let json = serde_json::to_string(entry).map_err(|error| JournalError::Io {
            path: self.path.clone(),
            source: io::Error::other(error),
        })?;
        let line = format!("{:08x} {json}\n", crc32fast::hash(json.as_bytes()));
        self.torn = true;
        self.file
            .write_all(line.as_bytes())
            .and_then(|()| self.file.sync_data())
            .map_err(|source| JournalError::Io {
                path: self.path.clone(),
                source,
            })?;
        self.torn = false;
        self.state = Some(next);
        Ok(())
    }
}

/// The state and the length of the whole lines.
fn replay(path: &Path, text: &[u8]) -> Result<(Option<JournalState>, usize), JournalError> {
    let mut state = None;
    let mut whole = 0;
    for (index, line) in text.split_inclusive(|byte| *byte == b'\n').enumerate() {
        let last = whole + line.len() == text.len();
        match parse(line) {
            Ok(entry) => state = Some(step(state.as_ref(), &entry)?),
            Err(_) if last => break,
            Err(message) => {
                return Err(JournalError::Corrupt {
                    path: path.to_owned(),
                    line: index + 1,
                    message,
                });
            }
        }
        whole += line.len();
    }
    Ok((state, whole))
}

fn parse(line: &[u8]) -> Result<Entry, String> {
    let line = line.strip_suffix(b"\n").ok_or("no newline")?;
    let text = std::str::from_utf8(line).map_err(|error| error.to_string())?;
    let (sum, json) = text.split_once(' ').ok_or("no checksum")?;
    let sum = u32::from_str_radix(sum, 16).map_err(|error| error.to_string())?;
    if sum != crc32fast::hash(json.as_bytes()) {
        return Err("wrong checksum".to_owned());
    }
    serde_json::from_str(json).map_err(|error| error.to_string())
}

/// The state after `entry`, or why it cannot come next. The only transitions are those of the handover.
fn step(state: Option<&JournalState>, entry: &Entry) -> Result<JournalState, JournalError> {
    let refuse = || {
        Err(JournalError::Order {
            entry: format!("{entry:?}"),
            state: format!("{state:?}"),
        })
    };
    let Some(state) = state else {
        return match entry {
            Entry::Created { vm, uid, epoch } => Ok(JournalState {
                vm: vm.clone(),
                uid: uid.clone(),
                ownership: Ownership::Owner { epoch: *epoch },
                arrived_by: None,
            }),
            Entry::Incoming {
                vm,
                uid,
                migration,
                epoch,
            } => Ok(JournalState {
                vm: vm.clone(),
                uid: uid.clone(),
                ownership: Ownership::Incoming {
                    migration: migration.clone(),
                    epoch: *epoch,
                },
                arrived_by: Some(migration.clone()),
            }),
            _ => refuse(),
        };
    };
    let ownership = match (&state.ownership, entry) {
        (
            Ownership::Owner { epoch },
            Entry::Relinquished {
                migration,
                epoch: given,
            },
        ) if epoch == given => Ownership::Relinquished {
            migration: migration.clone(),
            epoch: *epoch,
        },
        (
            Ownership::Incoming { migration, epoch },
            Entry::Prepared {
                migration: of,
                epoch: next,
            },
        ) if migration == of && *next == epoch + 1 => Ownership::Prepared {
            migration: migration.clone(),
            epoch: *next,
        },
        (
            Ownership::Prepared { migration, epoch },
            Entry::Owned {
                migration: of,
                epoch: next,
            },
        ) if migration == of && epoch == next => Ownership::Owner { epoch: *epoch },
        (
            Ownership::Incoming { migration, .. } | Ownership::Prepared { migration, .. },
            Entry::Aborted { migration: of },
        ) if migration == of => Ownership::Aborted {
            migration: migration.clone(),
        },
        (_, Entry::Ended) => Ownership::Ended,
        _ => return refuse(),
    };
    Ok(JournalState {
        ownership,
        ..state.clone()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn created() -> Entry {
        Entry::Created {
            vm: "a".into(),
            uid: "u".into(),
            epoch: 1,
        }
    }

    fn relinquished() -> Entry {
        Entry::Relinquished {
            migration: "m".into(),
            epoch: 1,
        }
    }

    #[test]
    fn entries_survive_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        assert_eq!(Journal::read(&path).unwrap(), None);
        let mut journal = Journal::open(&path).unwrap();
        journal.append(&created()).unwrap();
        drop(journal);
        let mut journal = Journal::open(&path).unwrap();
        assert_eq!(
            journal.state().unwrap().ownership,
            Ownership::Owner { epoch: 1 }
        );
        journal.append(&relinquished()).unwrap();
        let state = Journal::read(&path).unwrap().unwrap();
        assert_eq!(
            state.ownership,
            Ownership::Relinquished {
                migration: "m".into(),
                epoch: 1
            }
        );
    }

    #[test]
    fn a_relinquished_epoch_is_never_owned_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(&dir.path().join("journal")).unwrap();
        journal.append(&created()).unwrap();
        journal.append(&relinquished()).unwrap();
        for entry in [
            created(),
            relinquished(),
            Entry::Owned {
                migration: "m".into(),
                epoch: 1,
            },
            Entry::Owned {
                migration: "m".into(),
                epoch: 2,
            },
            Entry::Aborted {
                migration: "m".into(),
            },
        ] {
            assert!(
                matches!(journal.append(&entry), Err(JournalError::Order { .. })),
                "{entry:?}"
            );
        }
        journal.append(&Entry::Ended).unwrap();
    }

    #[test]
    fn the_destination_owns_only_what_it_prepared() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(&dir.path().join("journal")).unwrap();
        let incoming = Entry::Incoming {
            vm: "a".into(),
            uid: "u".into(),
            migration: "m".into(),
            epoch: 4,
        };
        journal.append(&incoming).unwrap();
        let owned = Entry::Owned {
            migration: "m".into(),
            epoch: 5,
        };
        assert!(journal.append(&owned).is_err(), "not prepared yet");
        assert!(
            journal
                .append(&Entry::Prepared {
                    migration: "m".into(),
                    epoch: 6
                })
                .is_err()
        );
        assert!(
            journal
                .append(&Entry::Prepared {
                    migration: "x".into(),
                    epoch: 5
                })
                .is_err()
        );
        journal
            .append(&Entry::Prepared {
                migration: "m".into(),
                epoch: 5,
            })
            .unwrap();
        journal.append(&owned).unwrap();
        assert_eq!(
            journal.state().unwrap().ownership,
            Ownership::Owner { epoch: 5 }
        );
    }

    #[test]
    fn a_failed_append_is_looked_up_before_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let mut journal = Journal::open(&path).unwrap();
        journal.append(&created()).unwrap();
        journal.file = File::open(&path).unwrap();
        assert!(matches!(
            journal.append(&relinquished()),
            Err(JournalError::Io { .. })
        ));
        // As if the line had reached the file although the call failed.
        let json = serde_json::to_string(&relinquished()).unwrap();
        let line = format!("{:08x} {json}\n", crc32fast::hash(json.as_bytes()));
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(line.as_bytes()).unwrap();
        assert!(
            matches!(
                journal.append(&relinquished()),
                Err(JournalError::Order { .. })
            ),
            "the entry is there already"
        );
        journal.append(&Entry::Ended).unwrap();
        assert_eq!(
            Journal::read(&path).unwrap().unwrap().ownership,
            Ownership::Ended
        );
    }

    #[test]
    fn what_a_failed_append_left_is_written_anew_or_not_believed() {
        use std::os::unix::fs::MetadataExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let mut journal = Journal::open(&path).unwrap();
        journal.append(&created()).unwrap();
        let unsynced = std::fs::metadata(&path).unwrap().ino();
        let held = File::open(&path).unwrap();
        let before = std::fs::read(&path).unwrap();
        journal.file = File::open(&path).unwrap();
        journal.append(&relinquished()).unwrap_err();
        // The new file cannot be made: the old one is not believed, however often it is asked.
        let aside = dir.path().join("journal.new");
        std::fs::create_dir(&aside).unwrap();
        for _ in 0..2 {
            assert!(matches!(journal.recover(), Err(JournalError::Io { .. })));
            journal.append(&relinquished()).unwrap_err();
            assert_eq!(std::fs::read(&path).unwrap(), before);
        }
        std::fs::remove_dir(&aside).unwrap();
        journal.recover().unwrap();
        assert_ne!(std::fs::metadata(&path).unwrap().ino(), unsynced);
        assert_eq!(std::fs::read(&path).unwrap(), before);
        assert!(!aside.exists());
        drop(held);
        journal.append(&relinquished()).unwrap();
        assert!(matches!(
            Journal::read(&path).unwrap().unwrap().ownership,
            Ownership::Relinquished { .. }
        ));
    }

    #[test]
    fn every_cut_of_the_last_line_is_dropped_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let mut journal = Journal::open(&path).unwrap();
        journal.append(&created()).unwrap();
        let kept = std::fs::metadata(&path).unwrap().len() as usize;
        journal.append(&relinquished()).unwrap();
        let text = std::fs::read(&path).unwrap();
        for cut in kept..text.len() {
            std::fs::write(&path, &text[..cut]).unwrap();
            let mut journal = Journal::open(&path).unwrap();
            assert_eq!(
                journal.state().unwrap().ownership,
                Ownership::Owner { epoch: 1 },
                "{cut}"
            );
            journal.append(&relinquished()).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), text, "{cut}");
        }
        let mut broken = text.clone();
        broken[2] ^= 1;
        std::fs::write(&path, &broken).unwrap();
        assert!(matches!(
            Journal::open(&path),
            Err(JournalError::Corrupt { line: 1, .. })
        ));
    }
}
