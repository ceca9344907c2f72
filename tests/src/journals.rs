//! Keeps every ownership journal that a fleet writes, also of VMs whose directories are gone by the
//! test's end, and has them explained by the machines.
//!
//! A thread looks for journals and links each into a folder of its own: a link shows what is
//! appended later, and stays when the directory is removed. Where a host's state is on a file
//! system of its own, that folder is there. A VM that lived for less than `LOOK` may be missed.

use std::{
    collections::{BTreeSet, HashSet},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::mpsc,
    thread::JoinHandle,
    time::Duration,
};

use crate::explorer::replay::{Kept, replay_with_fences};

/// Where a host's journals are kept when its state is on a file system of its own.
const BESIDE: &str = "kept-journals";
/// Between two looks.
const LOOK: Duration = Duration::from_millis(10);

/// The thread, and where it links to.
#[derive(Debug)]
pub struct Keeper {
    folder: PathBuf,
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    /// VMs for whose destinations a fence may decide.
    fenced: BTreeSet<String>,
}

impl Keeper {
    /// Keeps the journals of all hosts below `root`.
    ///
    /// # Errors
    /// When the folder cannot be made or no thread started.
    pub fn start(root: &Path) -> std::io::Result<Self> {
        let folder = root.join("journals");
        std::fs::create_dir(&folder)?;
        let (stop, stopped) = mpsc::channel();
        let (root, to) = (root.to_owned(), folder.clone());
        let thread = std::thread::Builder::new()
            .name("journals".to_owned())
            .spawn(move || {
                let mut kept = HashSet::new();
                while stopped.recv_timeout(LOOK) == Err(mpsc::RecvTimeoutError::Timeout) {
                    look(&root, &to, &mut kept);
                }
                look(&root, &to, &mut kept);
            })?;
        Ok(Self {
            folder,
            stop: Some(stop),
            thread: Some(thread),
            fenced: BTreeSet::new(),
        })
    }

    /// A fence may decide for the destination of this VM, by its uid.
    pub fn may_be_fenced(&mut self, uid: &str) {
        self.fenced.insert(uid.to_owned());
    }

    /// Ends the thread and explains what it kept. Returns how many journals there were.
    ///
    /// # Errors
    /// What the machines could not have written, with the file.
    pub fn explain(&mut self) -> Result<usize, String> {
        self.end();
        let mut kept = Vec::new();
        let root = self.folder.parent().unwrap_or(&self.folder);
        let folders = list(root).into_iter().map(|host| host.join(BESIDE));
        for path in folders
            .chain([self.folder.clone()])
            .flat_map(|dir| list(&dir))
        {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let place = name.rsplit_once('@').map_or(&*name, |(place, _)| place);
            kept.push(Kept {
                place: place.to_owned(),
                path: path.clone(),
            });
        }
        replay_with_fences(&kept, &self.fenced)
    }

    fn end(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            eprintln!("the thread that keeps journals panicked");
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.end();
    }
}

/// Links every journal that is new.
fn look(root: &Path, to: &Path, kept: &mut HashSet<u64>) {
    for host in list(root) {
        for vm in list(&host.join("vms")) {
            let journal = vm.join("journal");
            let Ok(found) = std::fs::metadata(&journal) else {
                continue;
            };
            if kept.contains(&found.ino()) {
                continue;
            }
            let text = |path: &Path| {
                path.file_name()
                    .unwrap_or_default()
                    .to_string_lossy()
                    .into_owned()
            };
            let name = format!("{}.{}@{}", text(&host), text(&vm), found.ino());
            // It may be gone again, or be another by now: the next look finds what is there.
            let link = |to: &Path| std::fs::hard_link(&journal, to.join(&name)).is_ok();
            let beside = || {
                let to = host.join(BESIDE);
                found.dev() != metadata_dev(root)
                    && std::fs::create_dir_all(&to).is_ok()
                    && link(&to)
            };
            if link(to) || beside() {
                kept.insert(found.ino());
            }
        }
    }
}

fn metadata_dev(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |found| found.dev())
}

fn list(dir: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect()
}

#[cfg(test)]
mod tests {
    use slat_record::journal::{Entry, Journal};

    use super::*;
    use crate::wait::PATIENCE;

    fn entry(migration: Option<&str>) -> Entry {
        let uid = "u".to_owned();
        match migration {
            None => Entry::Created {
                vm: "v".into(),
                uid,
                epoch: 1,
            },
            Some(migration) => Entry::Incoming {
                vm: "v".into(),
                uid,
                migration: migration.into(),
                epoch: 1,
            },
        }
    }

    /// Keeps what `entries` are written into a VM's journal, whose directory is then removed.
    fn kept(entries: &[Entry]) -> Result<usize, String> {
        let root = slat_test_dir::TestDir::new();
        let mut keeper = Keeper::start(root.path()).unwrap();
        let vm = root.path().join("host/vms/v");
        std::fs::create_dir_all(&vm).unwrap();
        let mut journal = Journal::open(&vm.join("journal")).unwrap();
        let begin = std::time::Instant::now();
        while list(&keeper.folder).is_empty() {
            assert!(begin.elapsed() < PATIENCE, "it is never kept");
            std::thread::sleep(LOOK);
        }
        for entry in entries {
            journal.append(entry).unwrap();
        }
        std::fs::remove_dir_all(&vm).unwrap();
        keeper.explain()
    }

    #[test]
    fn a_journal_outlives_its_directory() {
        assert_eq!(kept(&[entry(None)]), Ok(1));
    }

    #[test]
    fn what_the_machines_never_write_is_told() {
        let prepared = Entry::Prepared {
            uid: "u".into(),
            migration: "m".into(),
            epoch: 2,
            grant: None,
        };
        let owned = Entry::Owned {
            uid: "u".into(),
            migration: "m".into(),
            epoch: 2,
        };
        let fault = kept(&[entry(Some("m")), prepared, owned]).unwrap_err();
        assert!(fault.contains("no journal gave epoch 1 away"), "{fault}");
    }
}
