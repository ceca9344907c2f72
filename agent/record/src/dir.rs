//! The directory of one VM on its host, `<state>/vms/<uid>/`: how a VM process and the agent find
//! each other. Directories of older versions are called by the VM's name; whose they are is in the
//! journal, never in the path.
//!
//! | file | what |
//! |---|---|
//! | `lock` | held with flock by the VM process while it lives; holds its pid as text |
//! | `vm.sock` | its endpoint: VmService, MemoryService, TransferService |
//! | `journal` | who may run the VM ([`crate::journal`]) |
//! | `transfer-<migration>-<source or destination>.pb` | a side's last `slat.v1.Transfer` |
//! | `console`, `console.1` | what a raw image printed; the older part ([`crate::rotate`]) |
//! | `log`, `log.1` | the process's standard error; the older part |
//!
//! The agent trusts the lock, not the pid: a lock that can be taken has no process behind it.
//!
//! Records come and go while others read: one that was listed and is gone when it is opened is no
//! record, and no error.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use prost::Message as _;
use rustix::fs::{FlockOperation, flock};
use slat_proto::{model::MigrationName, v1};

/// Names in a VM's directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmDir(PathBuf);

impl VmDir {
    /// The directory at `path`; it need not exist.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// Itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Of the VM process's endpoint.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.0.join("vm.sock")
    }

    /// Of the ownership journal.
    #[must_use]
    pub fn journal(&self) -> PathBuf {
        self.0.join("journal")
    }

    /// Of the guest's console output.
    #[must_use]
    pub fn console(&self) -> PathBuf {
        self.0.join("console")
    }

    /// Of the process's standard error.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.0.join("log")
    }

    fn lock_path(&self) -> PathBuf {
        self.0.join("lock")
    }

    fn transfer_path(&self, migration: &MigrationName, role: v1::TransferRole) -> PathBuf {
        let role = match role {
            v1::TransferRole::Destination => "destination",
            v1::TransferRole::Source | v1::TransferRole::Unspecified => "source",
        };
        self.0
            .join(format!("transfer-{}-{role}.pb", migration.id()))
    }

    /// Takes the lock for this process's life and writes its pid. `None`: another process holds it.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn lock(&self) -> io::Result<Option<File>> {
        let Some(mut file) = self.hold()? else {
            return Ok(None);
        };
        write!(file, "{}", std::process::id())?;
        Ok(Some(file))
    }

    /// Takes the lock without saying by whom, which needs no space on the disk: for who removes the
    /// directory. `None`: another process holds it.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn hold(&self) -> io::Result<Option<File>> {
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(self.lock_path())?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {
                file.set_len(0)?;
                Ok(Some(file))
            }
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether the directory was removed below the process that holds `lock`: its lock has no name
    /// any more, and there is no journal. Nobody can find, ask or order such a process again.
    ///
    /// # Errors
    /// When the file system does not say.
    pub fn is_removed(&self, lock: &File) -> io::Result<bool> {
        use std::os::unix::fs::MetadataExt as _;
        Ok(lock.metadata()?.nlink() == 0 && !self.journal().try_exists()?)
    }

    /// Pid of the living VM process; `None` when no process holds the lock.
    ///
    /// # Errors
    /// When the lock cannot be read.
    pub fn living_pid(&self) -> io::Result<Option<u32>> {
        let file = match File::open(self.lock_path()) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            // Nobody holds it exclusively; closing the file gives our shared lock back.
            Ok(()) => Ok(None),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let text = io::read_to_string(&file)?;
                Ok(text.trim().parse().ok())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Stores a side's state so that it survives the process: written aside, synced, renamed,
    /// directory synced.
    ///
    /// # Errors
    /// When a step fails; the old record is then still there.
    pub fn save_transfer(&self, transfer: &v1::Transfer) -> io::Result<()> {
        let migration = MigrationName::parse(&transfer.migration).map_err(io::Error::other)?;
        let path = self.transfer_path(&migration, transfer.role());
        let aside = path.with_extension("new");
        let mut file = File::create(&aside)?;
        file.write_all(&transfer.encode_to_vec())?;
        file.sync_all()?;
        std::fs::rename(&aside, &path)?;
        File::open(&self.0)?.sync_all()
    }

    /// All stored sides. One that is removed meanwhile may be among them or not.
    ///
    /// # Errors
    /// When the directory or a record cannot be read; `NotFound` only when there is no directory.
    pub fn transfers(&self) -> io::Result<Vec<v1::Transfer>> {
        self.transfers_as_listed(|_| {})
    }

    /// `listed` is called between finding a record and reading it.
    fn transfers_as_listed(&self, listed: impl Fn(&Path)) -> io::Result<Vec<v1::Transfer>> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&self.0)? {
            let path = entry?.path();
            let name = path
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            if name.starts_with("transfer-") && name.ends_with(".pb") {
                listed(&path);
                let bytes = match std::fs::read(&path) {
                    Ok(bytes) => bytes,
                    // Released since it was listed.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    Err(error) => return Err(error),
                };
                found.push(v1::Transfer::decode(bytes.as_slice()).map_err(io::Error::other)?);
            }
        }
        Ok(found)
    }

    /// Forgets a side. No effect when there is none.
    ///
    /// # Errors
    /// When the record cannot be removed.
    pub fn remove_transfer(
        &self,
        migration: &MigrationName,
        role: v1::TransferRole,
    ) -> io::Result<()> {
        match std::fs::remove_file(self.transfer_path(migration, role)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_was_removed_or_only_moved_is_told_apart() {
        let folder = slat_test_dir::TestDir::new();
        let dir = VmDir::new(folder.path().join("vm"));
        std::fs::create_dir(dir.path()).unwrap();
        let lock = dir.lock().unwrap().unwrap();
        std::fs::write(dir.journal(), "x").unwrap();
        assert!(!dir.is_removed(&lock).unwrap());
        // Of a lock alone the journal is left, which answers.
        std::fs::remove_file(dir.lock_path()).unwrap();
        assert!(!dir.is_removed(&lock).unwrap());
        std::fs::remove_dir_all(dir.path()).unwrap();
        assert!(dir.is_removed(&lock).unwrap());
        // Moved away, it can be moved back.
        std::fs::create_dir(dir.path()).unwrap();
        let lock = dir.lock().unwrap().unwrap();
        std::fs::rename(dir.path(), folder.path().join("elsewhere")).unwrap();
        assert!(!dir.is_removed(&lock).unwrap());
    }

    #[test]
    fn who_holds_the_lock_to_remove_names_nobody() {
        let folder = slat_test_dir::TestDir::new();
        let dir = VmDir::new(folder.path());
        std::fs::write(dir.lock_path(), "4242").unwrap();
        let held = dir.hold().unwrap().unwrap();
        // The number of who held it before must not be taken for that of the holder.
        assert_eq!(std::fs::read(dir.lock_path()).unwrap(), b"");
        assert_eq!(dir.living_pid().unwrap(), None);
        assert!(dir.lock().unwrap().is_none() && dir.hold().unwrap().is_none());
        drop(held);
        let locked = dir.lock().unwrap().unwrap();
        assert_eq!(dir.living_pid().unwrap(), Some(std::process::id()));
        drop(locked);
    }

    #[test]
    fn records_are_kept_by_migration_and_role() {
        let dir = slat_test_dir::TestDir::new();
        let dir = VmDir::new(dir.path());
        let transfer = v1::Transfer {
            migration: "migrations/m1".into(),
            role: v1::TransferRole::Source.into(),
            epoch: 3,
            ..Default::default()
        };
        dir.save_transfer(&transfer).unwrap();
        dir.save_transfer(&v1::Transfer {
            epoch: 4,
            ..transfer.clone()
        })
        .unwrap();
        let found = dir.transfers().unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].epoch, 4);
        let name = MigrationName::parse("m1").unwrap();
        dir.remove_transfer(&name, v1::TransferRole::Destination)
            .unwrap();
        assert_eq!(dir.transfers().unwrap().len(), 1);
        dir.remove_transfer(&name, v1::TransferRole::Source)
            .unwrap();
        assert!(dir.transfers().unwrap().is_empty());
    }

    /// A lock file on a full disk: it can be opened and locked, and does not grow.
    #[test]
    fn a_full_disk_does_not_keep_a_dead_directory() {
        use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
        use std::os::fd::AsRawFd as _;

        let path = slat_test_dir::TestDir::new();
        let file = memfd_create("lock", MemfdFlags::ALLOW_SEALING).unwrap();
        fcntl_add_seals(&file, SealFlags::GROW).unwrap();
        let behind = format!("/proc/self/fd/{}", file.as_raw_fd());
        std::os::unix::fs::symlink(behind, path.path().join("lock")).unwrap();
        let dir = VmDir::new(path.path());
        assert!(
            dir.lock().is_err(),
            "a VM's process without a pid is nobody's"
        );
        let held = dir.hold().unwrap();
        assert!(held.is_some());
        assert!(dir.hold().unwrap().is_none(), "it is held");
        assert_eq!(dir.living_pid().unwrap(), None);
    }

    fn record(migration: &str) -> v1::Transfer {
        v1::Transfer {
            migration: format!("migrations/{migration}"),
            role: v1::TransferRole::Destination.into(),
            ..Default::default()
        }
    }

    #[test]
    fn a_record_that_vanished_while_it_was_read_is_no_record() {
        let dir = slat_test_dir::TestDir::new();
        let dir = VmDir::new(dir.path());
        dir.save_transfer(&record("stays")).unwrap();
        dir.save_transfer(&record("goes")).unwrap();
        let goes = MigrationName::parse("goes").unwrap();
        let release = |path: &Path| {
            if path.to_string_lossy().contains("goes") {
                dir.remove_transfer(&goes, v1::TransferRole::Destination)
                    .unwrap();
            }
        };
        let found = dir.transfers_as_listed(release).unwrap();
        assert_eq!(found, [record("stays")]);
        // What is there and cannot be read is an error still.
        std::fs::write(dir.path().join("transfer-broken-source.pb"), [0xff]).unwrap();
        assert!(dir.transfers().is_err());
    }

    #[test]
    fn records_are_read_while_others_are_released() {
        let dir = slat_test_dir::TestDir::new();
        let dir = VmDir::new(dir.path());
        dir.save_transfer(&record("stays")).unwrap();
        let writer = dir.clone();
        let releases = std::thread::spawn(move || {
            for round in 0..300 {
                let name = format!("m{}", round % 7);
                writer.save_transfer(&record(&name)).unwrap();
                let name = MigrationName::parse(&name).unwrap();
                writer
                    .remove_transfer(&name, v1::TransferRole::Destination)
                    .unwrap();
            }
        });
        while !releases.is_finished() {
            let found = dir.transfers().unwrap();
            assert!(found.contains(&record("stays")), "{found:?}");
        }
        releases.join().unwrap();
    }

    #[test]
    fn the_lock_tells_the_living() {
        let dir = slat_test_dir::TestDir::new();
        let dir = VmDir::new(dir.path());
        assert_eq!(dir.living_pid().unwrap(), None);
        let held = dir.lock().unwrap().unwrap();
        assert!(dir.lock().unwrap().is_none());
        assert_eq!(dir.living_pid().unwrap(), Some(std::process::id()));
        drop(held);
        assert_eq!(dir.living_pid().unwrap(), None);
    }
}
