//! What is durable, what is dropped, what is refused.

use std::{
    fs::File,
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use proptest::prelude::*;

use super::{decode::line, *};

/// A disk whose appends fail, and whose space for new files runs out, when told so.
#[derive(Debug, Default)]
struct Failing {
    appends: AtomicBool,
    /// The line arrives although the call fails.
    late: AtomicBool,
    full: AtomicBool,
    /// A new file takes the old one's place although the call fails.
    placed: AtomicBool,
}

impl Disk for Failing {
    fn append(&self, file: &mut File, bytes: &[u8]) -> io::Result<()> {
        if !self.appends.load(Ordering::Relaxed) {
            return RealDisk.append(file, bytes);
        }
        if self.late.load(Ordering::Relaxed) {
            file.write_all(bytes)?;
        } else {
            file.write_all(&bytes[..bytes.len() / 2])?;
        }
        Err(io::Error::other("the sync failed"))
    }

    fn replace(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        if self.full.load(Ordering::Relaxed) {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        RealDisk.replace(path, bytes)?;
        if self.placed.load(Ordering::Relaxed) {
            return Err(io::Error::other("the directory's sync failed"));
        }
        Ok(())
    }

    fn truncate(&self, path: &Path, len: u64) -> io::Result<()> {
        RealDisk.truncate(path, len)
    }
}

fn created() -> Entry {
    Entry::Created {
        vm: "a".into(),
        uid: "u".into(),
        epoch: 1,
    }
}

fn relinquished() -> Entry {
    Entry::Relinquished {
        uid: "u".into(),
        migration: "m".into(),
        epoch: 1,
        grant: None,
    }
}

fn owner() -> Ownership {
    Ownership::Owner { epoch: 1 }
}

fn given() -> Ownership {
    Ownership::Relinquished {
        migration: "m".into(),
        epoch: 1,
    }
}

fn folder() -> (slat_test_dir::TestDir, PathBuf) {
    let dir = slat_test_dir::TestDir::new();
    let path = dir.path().join("journal");
    (dir, path)
}

fn ownership(path: &Path) -> Ownership {
    contents(path).unwrap().state.unwrap().ownership
}

#[test]
fn entries_survive_reopening() {
    let (_dir, path) = folder();
    assert_eq!(contents(&path).unwrap(), Contents::default());
    let mut journal = Journal::open(&path).unwrap();
    journal.append(&created()).unwrap();
    drop(journal);
    let mut journal = Journal::open(&path).unwrap();
    assert_eq!(journal.state().unwrap().ownership, owner());
    journal.append(&relinquished()).unwrap();
    assert_eq!(ownership(&path), given());
    assert_eq!(
        contents(&path).unwrap().entries,
        [created(), relinquished()]
    );
    assert_eq!(settled_contents(&path).unwrap(), contents(&path).unwrap());
}

#[test]
fn a_relinquished_epoch_is_never_owned_again() {
    let (_dir, path) = folder();
    let mut journal = Journal::open(&path).unwrap();
    journal.append(&created()).unwrap();
    journal.append(&relinquished()).unwrap();
    let owned = |epoch| Entry::Owned {
        uid: "u".into(),
        migration: "m".into(),
        epoch,
    };
    let aborted = Entry::Aborted {
        uid: "u".into(),
        migration: "m".into(),
    };
    for entry in [created(), relinquished(), owned(1), owned(2), aborted] {
        assert!(
            matches!(journal.append(&entry), Err(JournalError::Order { .. })),
            "{entry:?}"
        );
    }
    journal.append(&Entry::Ended { uid: "u".into() }).unwrap();
}

#[test]
fn a_step_says_by_which_grant_it_was_taken_and_older_steps_are_read() {
    let grant = GrantMark {
        id: "0f".repeat(16),
        digest: "a0".repeat(32),
    };
    let Entry::Relinquished {
        uid,
        migration,
        epoch,
        ..
    } = relinquished()
    else {
        unreachable!()
    };
    let by_grant = Entry::Relinquished {
        uid,
        migration,
        epoch,
        grant: Some(grant.clone()),
    };
    for (entry, said) in [(relinquished(), None), (by_grant, Some(grant))] {
        let (_dir, path) = folder();
        let mut journal = Journal::open(&path).unwrap();
        journal.append(&created()).unwrap();
        journal.append(&entry).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.contains("grant"), said.is_some(), "{text}");
        let entries = contents(&path).unwrap().entries;
        assert_eq!(entries.last(), Some(&entry));
        assert_eq!(ownership(&path), given());
    }
    // What stands beside it that nobody knows is refused, as everywhere.
    let (_dir, path) = folder();
    let mut journal = Journal::open(&path).unwrap();
    journal.append(&created()).unwrap();
    let mut file = File::options().append(true).open(&path).unwrap();
    let later = r#"{"entry":"relinquished","uid":"u","migration":"m","epoch":1,"grant":{"id":"1","digest":"2","more":3}}"#;
    file.write_all(line(later).as_bytes()).unwrap();
    assert!(matches!(contents(&path), Err(JournalError::Unknown { .. })));
}

#[test]
fn the_destination_owns_only_what_it_prepared() {
    let (_dir, path) = folder();
    let mut journal = Journal::open(&path).unwrap();
    journal
        .append(&Entry::Incoming {
            vm: "a".into(),
            uid: "u".into(),
            migration: "m".into(),
            epoch: 4,
        })
        .unwrap();
    let owned = Entry::Owned {
        uid: "u".into(),
        migration: "m".into(),
        epoch: 5,
    };
    let prepared = |migration: &str, epoch| Entry::Prepared {
        uid: "u".into(),
        migration: migration.into(),
        epoch,
        grant: None,
    };
    assert!(journal.append(&owned).is_err(), "not prepared yet");
    assert!(journal.append(&prepared("m", 6)).is_err());
    assert!(journal.append(&prepared("x", 5)).is_err());
    journal.append(&prepared("m", 5)).unwrap();
    journal.append(&owned).unwrap();
    assert_eq!(
        journal.state().unwrap().ownership,
        Ownership::Owner { epoch: 5 }
    );
}

#[test]
fn what_is_cut_off_is_cut_off_the_file_that_is_there() {
    let (_dir, path) = folder();
    let disk = Arc::new(Failing::default());
    let mut journal = Journal::open_on(&path, Arc::clone(&disk) as Arc<dyn Disk>).unwrap();
    journal.append(&created()).unwrap();
    disk.appends.store(true, Ordering::Relaxed);
    disk.late.store(true, Ordering::Relaxed);
    journal.append(&relinquished()).unwrap_err();
    // A new file with the line is in place, its name maybe not durable; then the disk is full.
    disk.placed.store(true, Ordering::Relaxed);
    journal.settle().unwrap_err();
    disk.full.store(true, Ordering::Relaxed);
    journal.settle().unwrap();
    assert_eq!(journal.state().unwrap().ownership, owner());
    assert_eq!(contents(&path).unwrap().state.unwrap().ownership, owner());
}

#[test]
fn another_vms_entry_is_refused() {
    let (_dir, path) = folder();
    let mut journal = Journal::open(&path).unwrap();
    journal.append(&created()).unwrap();
    let before = std::fs::read(&path).unwrap();
    let other = Entry::Ended { uid: "v".into() };
    assert!(matches!(
        journal.append(&other),
        Err(JournalError::Order { .. })
    ));
    assert_eq!(std::fs::read(&path).unwrap(), before);
}

#[test]
fn an_entry_with_a_right_checksum_that_is_not_understood_is_refused_and_left_alone() {
    let (_dir, path) = folder();
    let mut journal = Journal::open(&path).unwrap();
    journal.append(&created()).unwrap();
    drop(journal);
    let whole = std::fs::read(&path).unwrap();
    let newer = [
        // A new field, as a later program would write its RELINQUISHED.
        r#"{"entry":"relinquished","uid":"u","migration":"m","epoch":1,"grant":"g"}"#,
        r#"{"entry":"fenced","uid":"u"}"#,
        r#"{"entry":"ended"}"#,
        r"[]",
    ];
    for json in newer {
        for newline in [true, false] {
            let mut text = whole.clone();
            text.extend(line(json).as_bytes());
            if !newline {
                text.pop();
            }
            std::fs::write(&path, &text).unwrap();
            for result in [Journal::open(&path).map(drop), contents(&path).map(drop)] {
                assert!(
                    matches!(result, Err(JournalError::Unknown { line: 3, .. })),
                    "{json}: {result:?}"
                );
            }
            assert!(settled_contents(&path).is_err());
            assert_eq!(std::fs::read(&path).unwrap(), text, "{json}");
        }
    }
}

#[test]
fn a_later_format_is_refused_and_left_alone() {
    let (_dir, path) = folder();
    let text = line(r#"{"journal":"slat","version":3}"#) + &line(r#"{"anything":1}"#);
    std::fs::write(&path, &text).unwrap();
    for result in [Journal::open(&path).map(drop), contents(&path).map(drop)] {
        assert!(
            matches!(
                result,
                Err(JournalError::Version {
                    found: 3,
                    known: 2,
                    ..
                })
            ),
            "{result:?}"
        );
    }
    assert_eq!(std::fs::read(&path).unwrap(), text.as_bytes());
}

#[test]
fn version_1_is_read_and_not_written() {
    let (_dir, path) = folder();
    let text = line(r#"{"entry":"created","vm":"a","uid":"u","epoch":1}"#)
        + &line(r#"{"entry":"relinquished","migration":"m","epoch":1}"#)
        + "1234";
    std::fs::write(&path, &text).unwrap();
    assert_eq!(ownership(&path), given());
    assert!(matches!(
        Journal::open(&path),
        Err(JournalError::ReadOnlyVersion { found: 1, .. })
    ));
    assert_eq!(std::fs::read(&path).unwrap(), text.as_bytes());
}

#[test]
fn every_cut_of_the_last_line_is_dropped_and_nothing_else() {
    let (_dir, path) = folder();
    let mut journal = Journal::open(&path).unwrap();
    journal.append(&created()).unwrap();
    let kept = std::fs::metadata(&path).unwrap().len() as usize;
    journal.append(&relinquished()).unwrap();
    let text = std::fs::read(&path).unwrap();
    for cut in kept..text.len() {
        std::fs::write(&path, &text[..cut]).unwrap();
        let mut journal = Journal::open(&path).unwrap();
        // Only the newline is missing: the entry arrived, and its checksum says so.
        if cut == text.len() - 1 {
            assert_eq!(journal.state().unwrap().ownership, given());
        } else {
            assert_eq!(journal.state().unwrap().ownership, owner(), "{cut}");
            journal.append(&relinquished()).unwrap();
        }
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

#[test]
fn every_cut_of_a_first_write_is_an_empty_journal() {
    let (_dir, path) = folder();
    drop(Journal::open(&path).unwrap());
    let header = std::fs::read(&path).unwrap();
    for cut in 0..header.len() {
        std::fs::write(&path, &header[..cut]).unwrap();
        let mut journal = Journal::open(&path).unwrap();
        assert_eq!(journal.state(), None, "{cut}");
        journal.append(&created()).unwrap();
        assert_eq!(ownership(&path), owner(), "{cut}");
    }
}

fn failing() -> (slat_test_dir::TestDir, PathBuf, Arc<Failing>, Journal) {
    let (dir, path) = folder();
    let disk = Arc::new(Failing::default());
    let mut journal = Journal::open_on(&path, Arc::clone(&disk) as Arc<dyn Disk>).unwrap();
    journal.append(&created()).unwrap();
    disk.appends.store(true, Ordering::Relaxed);
    (dir, path, disk, journal)
}

#[test]
fn a_failed_append_is_settled_before_the_next() {
    for late in [false, true] {
        let (_dir, path, disk, mut journal) = failing();
        disk.late.store(late, Ordering::Relaxed);
        assert!(matches!(
            journal.append(&relinquished()),
            Err(JournalError::Io { .. })
        ));
        disk.appends.store(false, Ordering::Relaxed);
        journal.settle().unwrap();
        let expected = if late { given() } else { owner() };
        assert_eq!(journal.state().unwrap().ownership, expected);
        assert_eq!(ownership(&path), expected);
        journal.append(&Entry::Ended { uid: "u".into() }).unwrap();
        assert_eq!(ownership(&path), Ownership::Ended);
    }
}

#[test]
fn what_cannot_be_written_anew_is_not_believed() {
    use std::os::unix::fs::MetadataExt as _;
    let (dir, path, disk, mut journal) = failing();
    let unsynced = std::fs::metadata(&path).unwrap().ino();
    let held = File::open(&path).unwrap();
    journal.append(&relinquished()).unwrap_err();
    let torn = std::fs::read(&path).unwrap();
    // The new file cannot be made: the old one is not believed, however often it is asked.
    let aside = dir.path().join("journal.new");
    std::fs::create_dir(&aside).unwrap();
    for _ in 0..2 {
        assert!(matches!(journal.settle(), Err(JournalError::Io { .. })));
        journal.append(&relinquished()).unwrap_err();
        assert_eq!(std::fs::read(&path).unwrap(), torn);
    }
    std::fs::remove_dir(&aside).unwrap();
    disk.appends.store(false, Ordering::Relaxed);
    journal.settle().unwrap();
    assert_ne!(std::fs::metadata(&path).unwrap().ino(), unsynced);
    assert_eq!(ownership(&path), owner());
    assert!(!aside.exists());
    drop(held);
}

#[test]
fn on_a_full_disk_the_entry_is_cut_off_for_good() {
    for late in [false, true] {
        let (_dir, path, disk, mut journal) = failing();
        let before = std::fs::read(&path).unwrap();
        disk.late.store(late, Ordering::Relaxed);
        disk.full.store(true, Ordering::Relaxed);
        journal.append(&relinquished()).unwrap_err();
        journal.settle().unwrap();
        assert_eq!(journal.state().unwrap().ownership, owner());
        assert_eq!(std::fs::read(&path).unwrap(), before);
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic_and_reading_never_writes(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
        tail in "[ -~]{0,80}",
    ) {
        let (_dir, path) = folder();
        let mut text = line(r#"{"journal":"slat","version":2}"#).into_bytes();
        text.extend(line(&tail).into_bytes());
        text.extend(bytes);
        std::fs::write(&path, &text).unwrap();
        drop(contents(&path));
        prop_assert_eq!(std::fs::read(&path).unwrap(), text);
    }
}

#[test]
fn a_vm_is_taken_back_only_after_it_was_given_away_and_above_their_epoch() {
    let dir = slat_test_dir::TestDir::new();
    let path = dir.path().join("journal");
    let adopted = |epoch| Entry::Adopted {
        uid: "u".into(),
        epoch,
    };
    let mut journal = Journal::open(&path).unwrap();
    journal.append(&created()).unwrap();
    let refused = |result| matches!(result, Err(JournalError::Order { .. }));
    assert!(refused(journal.append(&adopted(9))), "it owns the VM");
    journal.append(&relinquished()).unwrap();
    for epoch in [0, 1, 2] {
        assert!(refused(journal.append(&adopted(epoch))), "{epoch}");
    }
    journal.append(&adopted(7)).unwrap();
    let state = Journal::read(&path).unwrap().unwrap();
    assert_eq!(state.ownership, Ownership::Owner { epoch: 7 });
    // It is an owner like any other: it can be given away again.
    let again = Entry::Relinquished {
        uid: "u".into(),
        migration: "m2".into(),
        epoch: 7,
        grant: None,
    };
    journal.append(&again).unwrap();
}
