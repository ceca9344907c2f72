//! The files of a host's directory of saves, as they were last looked at.
//!
//! What a file says of itself is read once, and again when its length, its time or its inode is
//! another. A file that is no save is shown nowhere, and said in the log once. Which file another
//! one builds on is known by what the file says, not by names: a save that was copied here under
//! another name is found all the same.
//!
//! All of it blocks on the disk: off the runtime's threads, under [`super::Saves`]' lock.

use std::{
    collections::BTreeMap,
    fs::{File, Metadata},
    io,
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
    sync::Arc,
    time::SystemTime,
};

use slat_image::{ImageError, ImageName, Reader, Summary, inspect};
use slat_paging::wire::MOST_FDS;
use slat_proto::{
    ApiError,
    model::{HostName, PAGE_SIZE, SaveName, timestamp},
    v1,
};

use super::{
    errors::{of_image, unknown},
    pause::count_pause,
    sections,
};

/// Ends a save's file name.
const SUFFIX: &str = ".slatsave";
/// Files that build on each other, at most: they are handed over in one message, a writer's with
/// its own file beside them.
const MOST_FILES: usize = MOST_FDS - 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp(u64, u64, i64, i64);

impl Stamp {
    fn of(file: &Metadata) -> Self {
        Self(file.ino(), file.len(), file.mtime(), file.mtime_nsec())
    }
}

#[derive(Debug)]
struct Known {
    stamp: Stamp,
    written: SystemTime,
    /// `None`: it is no save.
    summary: Option<Summary>,
    /// What is shown of it, once that was read.
    shown: Option<v1::Save>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Index {
    host: HostName,
    dir: PathBuf,
    known: BTreeMap<String, Known>,
}

/// A save's file, and those that it builds on.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) reader: Reader<Arc<File>>,
    /// Its own id and file first, then the nearest base's.
    pub(crate) chain: Vec<(String, Arc<File>)>,
}

impl Opened {
    /// The files, in order.
    pub(crate) fn files(&self) -> Vec<Arc<File>> {
        self.chain
            .iter()
            .map(|(_, file)| Arc::clone(file))
            .collect()
    }
}

impl Index {
    pub(super) fn new(host: HostName, dir: PathBuf) -> Self {
        Self {
            host,
            dir,
            known: BTreeMap::new(),
        }
    }

    /// The file of a save.
    pub(super) fn path(&self, id: &str) -> PathBuf {
        self.dir.join(file_name(id))
    }

    fn name(&self, id: &str) -> Result<SaveName, ApiError> {
        SaveName::new(self.host.clone(), id)
    }

    /// Looks at the directory again.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn scan(&mut self) -> io::Result<()> {
        let mut there = BTreeMap::new();
        for entry in std::fs::read_dir(&self.dir)? {
            let entry = entry?;
            let name = entry.file_name();
            let Some(id) = name.to_str().and_then(|name| name.strip_suffix(SUFFIX)) else {
                continue;
            };
            // Removed meanwhile, or no file of a name that could be asked for.
            if self.name(id).is_ok()
                && let Ok(file) = std::fs::metadata(entry.path())
                && file.is_file()
            {
                there.insert(id.to_owned(), file);
            }
        }
        self.known.retain(|id, _| there.contains_key(id));
        for (id, file) in there {
            let stamp = Stamp::of(&file);
            if self
                .known
                .get(&id)
                .is_some_and(|known| known.stamp == stamp)
            {
                continue;
            }
            let path = self.path(&id);
            let opened = File::open(&path).map_err(|source| ImageError::Io {
                doing: "opening it",
                source,
            });
            let summary = match opened.and_then(|file| inspect(&file)) {
                Ok(summary) => Some(summary),
                Err(error) if error.is_of_the_file() => {
                    tracing::warn!(path = %path.display(), %error, "this is no save, and is shown nowhere");
                    None
                }
                Err(error) => {
                    // Another look may find more.
                    tracing::warn!(path = %path.display(), %error, "a save cannot be read");
                    self.known.remove(&id);
                    continue;
                }
            };
            let known = Known {
                stamp,
                written: file.modified().unwrap_or(SystemTime::UNIX_EPOCH),
                summary,
                shown: None,
            };
            self.known.insert(id, known);
        }
        Ok(())
    }

    fn summary(&self, id: &str) -> Option<&Summary> {
        self.known.get(id)?.summary.as_ref()
    }

    fn of_image(&self, image: &ImageName) -> Option<&str> {
        let is = |known: &Known| known.summary.as_ref().is_some_and(|is| is.name == *image);
        let found = self.known.iter().find(|(_, known)| is(known));
        found.map(|(id, _)| id.as_str())
    }

    /// Saves that build on this one, directly.
    pub(super) fn built_on(&self, id: &str) -> Vec<String> {
        let Some(own) = self.summary(id) else {
            return Vec::new();
        };
        let name = own.name;
        let builds = |known: &Known| {
            let summary = known.summary.as_ref();
            summary.is_some_and(|summary| summary.base == Some(name))
        };
        let builders = self.known.iter().filter(|(_, known)| builds(known));
        builders.map(|(id, _)| id.clone()).collect()
    }

    /// Opens a save with all that it builds on. The directory was looked at before.
    ///
    /// # Errors
    /// NO_SUCH_SAVE; SAVE_CORRUPT, with the file, also when a base is not here; STORE.
    pub(super) fn open(&self, id: &str) -> Result<Opened, ApiError> {
        let name = self.name(id)?;
        let failed = |id: &str, error: &ImageError| of_image(&name, &self.path(id), error);
        let mut chain: Vec<(String, Arc<File>)> = Vec::new();
        let mut next = Some(id.to_owned());
        while let Some(id) = next.take() {
            let summary = self.summary(&id).ok_or_else(|| unknown(&name))?;
            let file = File::open(self.path(&id)).map_err(|source| {
                let doing = "opening it";
                failed(&id, &ImageError::Io { doing, source })
            })?;
            if chain.len() == MOST_FILES {
                let what = "files that build on each other";
                let (found, most) = (MOST_FILES as u64 + 1, MOST_FILES as u64);
                return Err(failed(&id, &ImageError::Limit { what, found, most }));
            }
            if let Some(base) = &summary.base {
                let found = self.of_image(base).ok_or_else(|| {
                    let wanted = Some(*base);
                    failed(
                        &id,
                        &ImageError::WrongBase {
                            wanted,
                            given: None,
                        },
                    )
                })?;
                next = Some(found.to_owned());
            }
            chain.push((id, Arc::new(file)));
        }
        let mut below: Option<Arc<Reader<Arc<File>>>> = None;
        for (id, file) in chain.iter().rev() {
            let reader = Reader::open(Arc::clone(file), below.take());
            below = Some(Arc::new(reader.map_err(|error| failed(id, &error))?));
        }
        let reader = below
            .and_then(Arc::into_inner)
            .ok_or_else(|| unknown(&name))?;
        Ok(Opened { reader, chain })
    }

    /// Everything that is here, by id. The directory was looked at before.
    pub(super) fn shown(&mut self) -> Vec<v1::Save> {
        let ids: Vec<String> = self.known.keys().cloned().collect();
        ids.iter().filter_map(|id| self.show(id)).collect()
    }

    /// One save; `None` when there is none of that id.
    pub(super) fn show(&mut self, id: &str) -> Option<v1::Save> {
        self.summary(id)?;
        let read = match self.known.get(id)?.shown.clone() {
            Some(read) => Ok(read),
            None => self.open(id).and_then(|opened| {
                let read = sections::shown(&opened.reader);
                let name = self.name(id)?;
                read.map_err(|error| of_image(&name, &self.path(id), &error))
            }),
        };
        let base = self.summary(id)?.base;
        let base = base.and_then(|base| self.of_image(&base).map(str::to_owned));
        let base = base.map_or_else(String::new, |base| {
            self.name(&base)
                .map_or_else(|_| base, |name| name.to_string())
        });
        let (name, path) = (self.name(id).ok()?, self.path(id));
        let known = self.known.get_mut(id)?;
        let summary = known.summary.as_ref()?;
        let mut save = match read {
            Ok(read) => {
                known.shown = Some(read.clone());
                v1::Save {
                    state: v1::save::State::Written.into(),
                    ..read
                }
            }
            // It may be mended by bringing back what it builds on.
            Err(error) => v1::Save {
                state: v1::save::State::Failed.into(),
                state_message: error.message,
                reason: error.reason.as_str().to_owned(),
                ..Default::default()
            },
        };
        let pages = summary.memories.iter().map(|memory| memory.pages);
        let pages = pages.fold(0, u64::saturating_add);
        save.name = name.to_string();
        save.path = path.display().to_string();
        save.memory_bytes = pages.saturating_mul(PAGE_SIZE);
        save.done_bytes = save.memory_bytes;
        save.file_bytes = summary.length;
        save.pages = summary.data_pages;
        save.base = base;
        // Of one that builds on another, the file does not say which pages are that one's.
        save.empty_pages = match summary.base {
            None => pages.saturating_sub(summary.data_pages),
            Some(_) => 0,
        };
        save.end_time = Some(timestamp(known.written));
        count_pause(&mut save);
        Some(save)
    }
}

/// The name of a save's file in its directory.
pub(super) fn file_name(id: &str) -> String {
    format!("{id}{SUFFIX}")
}
