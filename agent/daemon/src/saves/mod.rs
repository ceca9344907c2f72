//! The saves of a host: files in one directory, and those that are being written to it.
//!
//! | file | what |
//! |---|---|
//! | `index` | the files, and what they say of themselves |
//! | `sections` | what is in a file beside memory |
//! | `going` | a save that is being written, or that failed |
//! | `writer` | what is said to the process that writes one |
//! | `users` | which VMs need a file |
//! | `errors` | what is wrong, as callers hear it |
//!
//! A save is `NAME.slatsave` in that directory. It gets this name when it is whole and durable;
//! before, it has none, or one that is swept when the agent starts.
//!
//! # Locking
//! `index` is held over reads of the disk, by blocking threads alone; it is also what a removal and
//! an opening exclude each other by. `going` and `using` are leaves, taken under it or alone, and
//! held for one look or change. None is held across an `.await`.

mod errors;
mod going;
mod index;
mod pause;
mod sections;
mod users;
mod writer;

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use slat_image::{Draft, ImageError};
use slat_proto::{
    ApiError, Reason,
    model::{HostName, SaveName},
    v1::{self, save::State},
};
use tokio::sync::{Semaphore, watch};

use self::{
    errors::{exists, in_use, not_written, of_image, unknown},
    going::{Going, Table},
    index::{Index, Opened, file_name},
};
pub(super) use self::{
    going::Begun,
    sections::{Contents, working_set},
    users::{needed_by, note},
    writer::{Order, write},
};

/// Saves that are written at a time.
const MOST_WRITING: usize = 8;
/// Failed ones that are shown.
const MOST_FAILED: usize = 64;
/// What is wrong with a file, so much of it is said.
const MOST_FAULTS: usize = 4;

/// See the module.
#[derive(Debug)]
pub(super) struct Saves {
    host: HostName,
    dir: PathBuf,
    index: Mutex<Index>,
    going: Arc<Table>,
    /// Saves that are being read, and by how many.
    using: Mutex<BTreeMap<String, u32>>,
    /// One file is verified at a time: it takes a whole disk's time.
    verifying: Semaphore,
}

/// A save that was opened, which nobody removes meanwhile.
#[derive(Debug)]
pub(super) struct Used {
    pub(super) opened: Opened,
    saves: Arc<Saves>,
}

impl Used {
    /// The ids of the save and of all that it builds on.
    pub(super) fn ids(&self) -> Vec<String> {
        self.opened.chain.iter().map(|(id, _)| id.clone()).collect()
    }

    /// Its path and those of all that it builds on, with their files.
    pub(super) fn named_files(&self) -> Vec<(String, Arc<File>)> {
        let path = |id: &str| self.saves.path(id).display().to_string();
        let chain = self.opened.chain.iter();
        chain
            .map(|(id, file)| (path(id), Arc::clone(file)))
            .collect()
    }

    /// What it has beside memory. Blocks on the disk.
    ///
    /// # Errors
    /// SAVE_CORRUPT, STATE_VERSION_UNSUPPORTED, STORE.
    pub(super) fn contents(&self, name: &SaveName) -> Result<Contents, ApiError> {
        Contents::read(&self.opened.reader)
            .map_err(|error| of_image(name, &self.saves.path(name.id()), &error))
    }
}

impl Drop for Used {
    fn drop(&mut self) {
        let mut using = lock(&self.saves.using);
        for (id, _) in &self.opened.chain {
            if let Some(count) = using.get_mut(id) {
                *count = count.saturating_sub(1);
            }
        }
        using.retain(|_, count| *count > 0);
    }
}

/// How a save stands.
pub(super) enum Standing {
    /// It is being written.
    Going(watch::Receiver<v1::Save>),
    /// As it is.
    Ended(Box<v1::Save>),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each change is one map operation: a panic elsewhere leaves the map whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Saves {
    /// Opens the directory, makes it when it is missing, and removes what dead writers left.
    ///
    /// # Errors
    /// When it cannot be made or read.
    pub(super) fn open(host: &HostName, dir: &Path) -> io::Result<Arc<Self>> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)?;
        // Descriptors' links and messages have it, wherever they are read.
        let dir = dir.canonicalize()?;
        for name in slat_image::sweep(&dir).map_err(io::Error::other)? {
            tracing::info!(name = %name.display(), "a save that was not finished is removed");
        }
        Ok(Arc::new(Self {
            host: host.clone(),
            index: Mutex::new(Index::new(host.clone(), dir.clone())),
            dir,
            going: Arc::default(),
            using: Mutex::default(),
            verifying: Semaphore::new(1),
        }))
    }

    /// Where they are.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The file of a save.
    pub(super) fn path(&self, id: &str) -> PathBuf {
        self.dir.join(file_name(id))
    }

    fn scanned(&self) -> Result<MutexGuard<'_, Index>, ApiError> {
        let mut index = lock(&self.index);
        index
            .scan()
            .map_err(|error| ApiError::from_io(Reason::Store, &self.dir, &error))?;
        Ok(index)
    }

    /// Everything that is here, by name. Blocks on the disk.
    ///
    /// # Errors
    /// STORE.
    pub(super) fn list(&self) -> Result<Vec<v1::Save>, ApiError> {
        let mut all: BTreeMap<String, v1::Save> = BTreeMap::new();
        // First those that are going on: one that ends meanwhile is a file afterwards.
        for going in self.going.lock().values() {
            let save = going.shown();
            all.insert(save.name.clone(), save);
        }
        for save in self.scanned()?.shown() {
            all.insert(save.name.clone(), save);
        }
        Ok(all.into_values().collect())
    }

    /// One save. Blocks on the disk.
    ///
    /// # Errors
    /// NO_SUCH_SAVE; STORE.
    pub(super) fn standing(&self, name: &SaveName) -> Result<Standing, ApiError> {
        if let Some(going) = self.going.lock().get(name.id())
            && going.state() == State::Writing
        {
            return Ok(Standing::Going(going.watch()));
        }
        if let Some(save) = self.scanned()?.show(name.id()) {
            return Ok(Standing::Ended(Box::new(save)));
        }
        match self.going.lock().get(name.id()) {
            Some(going) => Ok(Standing::Ended(Box::new(going.shown()))),
            None => Err(unknown(name)),
        }
    }

    /// Takes a name for a new save, with nothing under it.
    ///
    /// # Errors
    /// SAVE_EXISTS; LIMIT_REACHED.
    pub(super) fn begin(&self, name: &SaveName) -> Result<Begun, ApiError> {
        let path = self.path(name.id());
        // Whether it is a save or not: a file is never written over.
        if path.symlink_metadata().is_ok() {
            return Err(exists(name, &path));
        }
        let mut going = self.going.lock();
        let writing = going.values().filter(|is| is.state() == State::Writing);
        if writing.count() >= MOST_WRITING {
            let words = format!("{MOST_WRITING} saves are being written here");
            return Err(ApiError::new(Reason::LimitReached, words)
                .with("host", &self.host)
                .with("most", MOST_WRITING)
                .with("advice", "wait for one of them"));
        }
        if let Some(other) = going.get(name.id())
            && other.state() == State::Writing
        {
            return Err(exists(name, &path).with("state", "WRITING"));
        }
        let new = Going::new(name.clone());
        going.insert(name.id().to_owned(), Arc::clone(&new));
        forget_oldest(&mut going);
        drop(going);
        Ok(Begun::new(Arc::clone(&self.going), new))
    }

    /// A file for a save, without its name. Blocks on the disk.
    ///
    /// # Errors
    /// SAVE_EXISTS, DISK_FULL, STORE.
    pub(super) fn draft(&self, name: &SaveName) -> Result<Draft, ApiError> {
        Draft::create(&self.dir, &file_name(name.id())).map_err(|error| self.failed(name, &error))
    }

    /// Gives a file its name. Blocks on the disk.
    ///
    /// # Errors
    /// SAVE_EXISTS, DISK_FULL, STORE; SAVE_CORRUPT when it is not whole.
    pub(super) fn publish(&self, name: &SaveName, draft: Draft) -> Result<(), ApiError> {
        draft
            .publish()
            .map(drop)
            .map_err(|error| self.failed(name, &error))
    }

    fn failed(&self, name: &SaveName, error: &ImageError) -> ApiError {
        of_image(name, &self.path(name.id()), error)
    }

    /// Opens a save, which nobody removes until the answer is dropped. Blocks on the disk.
    ///
    /// # Errors
    /// NO_SUCH_SAVE; SAVE_NOT_WRITTEN; SAVE_CORRUPT; STORE.
    pub(super) fn use_one(self: &Arc<Self>, name: &SaveName) -> Result<Used, ApiError> {
        let index = self.scanned()?;
        let opened = match index.open(name.id()) {
            Err(error) if error.reason == Reason::NoSuchSave => {
                let going = self.going.lock();
                let Some(going) = going.get(name.id()) else {
                    return Err(error);
                };
                let save = going.shown();
                let state = save.state().as_str_name().trim_start_matches("STATE_");
                return Err(not_written(name, state, &save.state_message));
            }
            opened => opened?,
        };
        let mut using = lock(&self.using);
        for (id, _) in &opened.chain {
            *using.entry(id.clone()).or_default() += 1;
        }
        drop(using);
        Ok(Used {
            opened,
            saves: Arc::clone(self),
        })
    }

    /// What is asked to end when a save is deleted that is being written; its end is told by the
    /// answer's token.
    pub(super) fn cancel(&self, name: &SaveName) -> Option<tokio_util::sync::CancellationToken> {
        let going = self.going.lock();
        let one = going
            .get(name.id())
            .filter(|is| is.state() == State::Writing)?;
        one.cancel.cancel();
        Some(one.ended.clone())
    }

    /// Removes a save, or forgets one that failed. `needed`: what VMs need, and which. Blocks on
    /// the disk.
    ///
    /// # Errors
    /// NO_SUCH_SAVE; SAVE_IN_USE; STORE.
    pub(super) fn remove(
        &self,
        name: &SaveName,
        needed: &[(String, Vec<String>)],
    ) -> Result<(), ApiError> {
        let index = self.scanned()?;
        let path = self.path(name.id());
        let mut users: Vec<String> = needed
            .iter()
            .filter(|(_, ids)| ids.iter().any(|id| id == name.id()))
            .map(|(vm, _)| vm.clone())
            .collect();
        for id in index.built_on(name.id()) {
            users.push(SaveName::new(self.host.clone(), &id)?.to_string());
        }
        if users.is_empty() && lock(&self.using).contains_key(name.id()) {
            users.push("a call that reads it now".to_owned());
        }
        if !users.is_empty() {
            return Err(in_use(name, &users));
        }
        let failed = self.going.lock().remove(name.id()).is_some();
        let store = |error: &io::Error| ApiError::from_io(Reason::Store, &path, error);
        match std::fs::remove_file(&path) {
            Ok(()) => {
                let synced = File::open(&self.dir).and_then(|dir| dir.sync_all());
                synced.map_err(|error| store(&error))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound && failed => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(unknown(name)),
            Err(error) => Err(store(&error)),
        }
    }

    /// Compares a whole save with its checksums, one at a time on this host.
    ///
    /// # Errors
    /// As [`Saves::use_one`]; SAVE_CORRUPT with what is wrong first.
    pub(super) async fn verify(
        self: &Arc<Self>,
        name: &SaveName,
    ) -> Result<v1::VerifySaveResponse, ApiError> {
        let Ok(_one) = self.verifying.acquire().await else {
            // Nobody closes it.
            return Err(ApiError::new(Reason::Internal, "nothing can be verified"));
        };
        let (me, name) = (Arc::clone(self), name.clone());
        blocking(move || {
            let used = me.use_one(&name)?;
            let verified = used.opened.reader.verify(MOST_FAULTS);
            let verified = verified.map_err(|error| me.failed(&name, &error))?;
            let Some(first) = verified.faults.first() else {
                let files = used.opened.chain.iter();
                let lengths = files.map(|(_, file)| file.metadata().map_or(0, |it| it.len()));
                return Ok(v1::VerifySaveResponse {
                    file_bytes: lengths.sum(),
                    pages: verified.data_pages,
                });
            };
            let more = verified.faults.len() as u64 - 1 + verified.more_faults;
            let error = ImageError::Corrupt {
                what: first.what,
                offset: first.offset,
            };
            Err(me
                .failed(&name, &error)
                .with("image", first.image)
                .with("more_faults", more))
        })
        .await
    }
}

/// Runs work that blocks off the runtime's threads.
///
/// # Errors
/// Its own; INTERNAL when it panicked.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| {
            let words = format!("a task of the agent failed: {error}");
            Err(ApiError::new(Reason::Internal, words))
        })
}

/// Of those that failed, so many are shown.
fn forget_oldest(going: &mut BTreeMap<String, Arc<Going>>) {
    let mut failed: Vec<(i64, String)> = going
        .iter()
        .filter(|(_, is)| is.state() == State::Failed)
        .map(|(id, is)| {
            let time = is.shown().create_time;
            (time.map_or(0, |time| time.seconds), id.clone())
        })
        .collect();
    failed.sort();
    let excess = failed.len().saturating_sub(MOST_FAILED);
    for (_, id) in failed.into_iter().take(excess) {
        going.remove(&id);
    }
}
