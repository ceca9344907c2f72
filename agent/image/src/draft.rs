//! A file on its way to its name: it gets the name when it is whole, and not before.
//!
//! # Protocol
//! [`Draft::create`], a [`crate::Writer`] on [`Draft::file`] or on a descriptor of it in another
//! process, [`Draft::publish`]. Publishing looks whether the image is whole, makes the file
//! durable, gives it its name, makes the name durable. A crash anywhere before leaves nothing under
//! the name.
//!
//! # Names and locks
//! Where the filesystem has files without a name (O_TMPFILE), a draft is one, and a crash leaves
//! nothing at all. Elsewhere it is `.NAME.part`, with an exclusive `flock`, which lives as long as
//! any process has the file open. Whoever removes a `.part` locks it before, and looks whether the
//! name still leads to what it locked: so a name that one has locked stays what it is. [`sweep`]
//! removes those that nobody has locked.

use std::{
    ffi::{OsStr, OsString},
    fs::{File, TryLockError},
    io,
    os::{
        fd::AsRawFd as _,
        unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, RenameFlags},
    io::Errno,
};

use crate::{error::ImageError, names::Summary, reader::inspect};

/// Bytes of a name at most; `.part` and the point have room beside it.
const LONGEST: usize = 200;
const PART: &str = ".part";
/// How often a name is tried that others remove at the same time.
const TRIES: usize = 100;
/// Guest memory is nobody else's.
const MODE: Mode = Mode::RUSR.union(Mode::WUSR);

/// An image that is being written in a directory. Dropped without [`Draft::publish`] it is gone.
#[derive(Debug)]
pub struct Draft {
    dir: File,
    path: PathBuf,
    name: OsString,
    /// What it is called until then; `None`: nothing.
    part: Option<OsString>,
    file: File,
}

impl Draft {
    /// Makes an empty file that is to be `name` in `dir` one day: one without a name where the
    /// filesystem has such, or `.NAME.part`, which is locked as long as the file is open, here or
    /// in a process that was given it. Readable and writable by its owner alone.
    ///
    /// # Errors
    /// `BadName` for one that is empty, begins with a point, has a slash or more than 200 bytes;
    /// `Exists`, `Busy`, `NoSpace`, `Io`.
    pub fn create(dir: &Path, name: &str) -> Result<Self, ImageError> {
        let (opened, path) = Self::begin(dir, name)?;
        match nameless(&opened) {
            Ok(Some(file)) => Ok(Self {
                dir: opened,
                path,
                name: name.into(),
                part: None,
                file,
            }),
            Ok(None) => Self::with_name(opened, path, name),
            Err(source) => Err(failed("making a file", source)),
        }
    }

    /// What both ways begin with.
    fn begin(dir: &Path, name: &str) -> Result<(File, PathBuf), ImageError> {
        if !is_name(name.as_ref()) {
            let name = name.to_owned();
            return Err(ImageError::BadName { name });
        }
        let path = dir.join(name);
        if path.symlink_metadata().is_ok() {
            return Err(ImageError::Exists { path });
        }
        let dir = File::open(dir).map_err(ImageError::io("opening the directory"))?;
        Ok((dir, path))
    }

    fn with_name(dir: File, path: PathBuf, name: &str) -> Result<Self, ImageError> {
        let mut part = OsString::from(".");
        part.push(name);
        part.push(PART);
        for _ in 0..TRIES {
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            match rustix::fs::openat(&dir, &part, flags, MODE) {
                Ok(file) => {
                    let file = File::from(file);
                    // Somebody who sweeps may have been faster.
                    if lock(&file)? && leads_to(&dir, &part, &file)? {
                        return Ok(Self {
                            dir,
                            path,
                            name: name.into(),
                            part: Some(part),
                            file,
                        });
                    }
                }
                Err(Errno::EXIST) => match take_away(&dir, &part)? {
                    Taken::Removed | Taken::Gone => {}
                    Taken::Busy => {
                        let path = path.with_file_name(&part);
                        return Err(ImageError::Busy { path });
                    }
                },
                Err(error) => return Err(failed("making a file", error.into())),
            }
        }
        let path = path.with_file_name(&part);
        Err(ImageError::Busy { path })
    }

    /// The file, open for reading and writing, for [`crate::Writer::new`] here or, as a descriptor,
    /// in another process.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Gives the file its name once it holds a whole image, and returns when that is durable. What
    /// has the name already is left alone.
    ///
    /// # Errors
    /// As [`crate::inspect`] when it is not whole; `Exists`, `NoSpace`, `Io`. The draft is then
    /// gone, except where only the directory could not be made durable: then the file has its name.
    pub fn publish(mut self) -> Result<Summary, ImageError> {
        let summary = inspect(&self.file)?;
        let synced = self.file.sync_all();
        synced.map_err(|source| failed("making an image durable", source))?;
        let named = match &self.part {
            None => self.link_nameless(),
            Some(part) => move_to(&self.dir, part, &self.name),
        };
        match named {
            Ok(()) => self.part = None,
            Err(Errno::EXIST) => {
                let path = self.path.clone();
                return Err(ImageError::Exists { path });
            }
            Err(error) => return Err(failed("giving an image its name", error.into())),
        }
        let synced = self.dir.sync_all();
        synced.map_err(|source| failed("making an image's name durable", source))?;
        Ok(summary)
    }

    fn link_nameless(&self) -> Result<(), Errno> {
        let own = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        rustix::fs::linkat(CWD, own, &self.dir, &self.name, AtFlags::SYMLINK_FOLLOW)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if let Some(part) = &self.part {
            // What stays is swept later.
            let _ = rustix::fs::unlinkat(&self.dir, part, AtFlags::empty());
        }
    }
}

/// Removes what writers that are dead left in `dir`, and says the names. What a living writer makes
/// stays.
///
/// # Errors
/// `Io` when the directory cannot be read, or a file not removed.
pub fn sweep(dir: &Path) -> Result<Vec<OsString>, ImageError> {
    let entries = std::fs::read_dir(dir).map_err(ImageError::io("reading the directory"))?;
    let opened = File::open(dir).map_err(ImageError::io("opening the directory"))?;
    let mut removed = Vec::new();
    for entry in entries {
        let name = entry
            .map_err(ImageError::io("reading the directory"))?
            .file_name();
        if is_part(&name) && take_away(&opened, &name)? == Taken::Removed {
            removed.push(name);
        }
    }
    removed.sort();
    Ok(removed)
}

fn is_name(name: &OsStr) -> bool {
    let bytes = name.as_bytes();
    let fits = |byte: &u8| *byte != b'/' && *byte != 0;
    (1..=LONGEST).contains(&bytes.len()) && bytes[0] != b'.' && bytes.iter().all(fits)
}

fn is_part(name: &OsStr) -> bool {
    let name = name.as_bytes().strip_prefix(b".");
    let name = name.and_then(|name| name.strip_suffix(PART.as_bytes()));
    name.is_some_and(|name| is_name(OsStr::from_bytes(name)))
}

fn failed(doing: &'static str, source: io::Error) -> ImageError {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ImageError::NoSpace {
            needed: 0,
            written: 0,
        },
        _ => ImageError::Io { doing, source },
    }
}

/// A file without a name, where there are such and they can be given one.
fn nameless(dir: &File) -> io::Result<Option<File>> {
    let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
    match rustix::fs::openat(dir, ".", flags, MODE) {
        // Without /proc it could not be given its name.
        Ok(_) if !Path::new("/proc/self/fd").is_dir() => Ok(None),
        Ok(file) => Ok(Some(file.into())),
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL | Errno::NOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Whether the file could be locked. It is until nobody has it open.
fn lock(file: &File) -> Result<bool, ImageError> {
    match file.try_lock() {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(source)) => Err(failed("locking a file", source)),
    }
}

/// Whether the name is that of this file.
fn leads_to(dir: &File, name: &OsStr, file: &File) -> Result<bool, ImageError> {
    let own = file
        .metadata()
        .map_err(ImageError::io("looking at a file"))?;
    match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(there) => Ok(there.st_ino == own.ino() && there.st_dev == own.dev()),
        Err(Errno::NOENT) => Ok(false),
        Err(error) => Err(failed("looking at a file", error.into())),
    }
}

/// What became of a file that may be left over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Taken {
    Removed,
    /// Somebody else removed it, or it is no file.
    Gone,
    /// A writer has it.
    Busy,
}

/// Removes a `.part` that nobody has locked.
fn take_away(dir: &File, name: &OsStr) -> Result<Taken, ImageError> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match rustix::fs::openat(dir, name, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(Errno::NOENT | Errno::LOOP | Errno::NXIO) => return Ok(Taken::Gone),
        Err(error) => return Err(failed("opening what is left over", error.into())),
    };
    if !file.metadata().is_ok_and(|metadata| metadata.is_file()) {
        return Ok(Taken::Gone);
    }
    if !lock(&file)? {
        return Ok(Taken::Busy);
    }
    if !leads_to(dir, name, &file)? {
        return Ok(Taken::Gone);
    }
    match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) => Ok(Taken::Removed),
        Err(Errno::NOENT) => Ok(Taken::Gone),
        Err(error) => Err(failed("removing what is left over", error.into())),
    }
}

/// Renames without replacing.
fn move_to(dir: &File, from: &OsStr, to: &OsStr) -> Result<(), Errno> {
    match rustix::fs::renameat_with(dir, from, dir, to, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS) => {
            rustix::fs::linkat(dir, from, dir, to, AtFlags::empty())?;
            // It has two names now. That this one goes is not needed: it is swept.
            let _ = rustix::fs::unlinkat(dir, from, AtFlags::empty());
            Ok(())
        }
        renamed => renamed,
    }
}

#[cfg(test)]
mod tests {
    use slat_test_dir::TestDir;

    use super::*;
    use crate::{Compression, ImageId, Options, Reader, Writer};

    fn write(draft: &Draft) {
        let options = Options {
            id: ImageId([1; 16]),
            compression: Compression::None,
            base: None,
        };
        Writer::new(draft.file(), &options)
            .unwrap()
            .finish()
            .unwrap();
    }

    type Create = fn(&Path, &str) -> Result<Draft, ImageError>;

    fn with_name(dir: &Path, name: &str) -> Result<Draft, ImageError> {
        let (opened, path) = Draft::begin(dir, name)?;
        Draft::with_name(opened, path, name)
    }

    /// Where there are files without a name, both ways.
    const WAYS: [Create; 2] = [Draft::create, with_name];

    fn names(dir: &Path) -> Vec<OsString> {
        let entries = std::fs::read_dir(dir).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_name_is_had_by_a_whole_image_only() {
        let dir = TestDir::new();
        for (name, create) in ["a", "b"].into_iter().zip(WAYS) {
            let draft = create(dir.path(), name).unwrap();
            assert!(draft.publish().is_err(), "empty");
            let draft = create(dir.path(), name).unwrap();
            assert!(!names(dir.path()).contains(&name.into()));
            write(&draft);
            assert!(!names(dir.path()).contains(&name.into()));
            draft.publish().unwrap();
            let file = File::open(dir.path().join(name)).unwrap();
            assert_eq!(file.metadata().unwrap().mode() & 0o777, 0o600);
            Reader::open(file, None).unwrap();
        }
        assert_eq!(names(dir.path()), ["a", "b"]);
    }

    #[test]
    fn what_is_there_is_left_alone() {
        let dir = TestDir::new();
        for create in WAYS {
            let draft = create(dir.path(), "a").unwrap();
            write(&draft);
            std::fs::write(dir.path().join("a"), "mine").unwrap();
            assert!(matches!(draft.publish(), Err(ImageError::Exists { .. })));
            let error = create(dir.path(), "a").unwrap_err();
            assert!(matches!(error, ImageError::Exists { .. }));
            assert_eq!(std::fs::read(dir.path().join("a")).unwrap(), b"mine");
            assert_eq!(names(dir.path()), ["a"]);
            std::fs::remove_file(dir.path().join("a")).unwrap();
        }
    }

    #[test]
    fn a_draft_that_is_dropped_is_gone() {
        let dir = TestDir::new();
        for create in WAYS {
            write(&create(dir.path(), "a").unwrap());
            assert!(names(dir.path()).is_empty());
        }
    }

    #[test]
    fn what_the_dead_left_is_swept_and_what_the_living_make_is_not() {
        let dir = TestDir::new();
        let mut living = with_name(dir.path(), "living").unwrap();
        let error = with_name(dir.path(), "living").unwrap_err();
        assert!(matches!(error, ImageError::Busy { .. }));
        for name in [".dead.part", ".part", "seen.part", ".other"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        std::os::unix::fs::symlink("seen.part", dir.path().join(".link.part")).unwrap();
        assert_eq!(sweep(dir.path()).unwrap(), [".dead.part"]);
        // Another process has the file still open: a descriptor of it is the lock.
        let elsewhere = living.file().try_clone().unwrap();
        // Whoever made it dies.
        living.part = None;
        drop(living);
        assert!(sweep(dir.path()).unwrap().is_empty());
        drop(elsewhere);
        assert_eq!(sweep(dir.path()).unwrap(), [".living.part"]);
    }

    #[test]
    fn what_the_dead_left_is_in_nobodys_way() {
        let dir = TestDir::new();
        std::fs::write(dir.path().join(".a.part"), "old").unwrap();
        let draft = with_name(dir.path(), "a").unwrap();
        write(&draft);
        draft.publish().unwrap();
        assert_eq!(names(dir.path()), ["a"]);
    }

    #[test]
    fn one_of_many_gets_the_name() {
        let dir = TestDir::new();
        for (name, create) in ["a", "b"].into_iter().zip(WAYS) {
            let published = std::thread::scope(|scope| {
                let tries = || {
                    let draft = create(dir.path(), name).ok()?;
                    write(&draft);
                    drop(sweep(dir.path()));
                    draft.publish().ok()
                };
                let threads: Vec<_> = (0..8).map(|_| scope.spawn(tries)).collect();
                let results = threads.into_iter().map(|thread| thread.join().unwrap());
                results.flatten().count()
            });
            assert_eq!(published, 1);
        }
        assert_eq!(names(dir.path()), ["a", "b"]);
    }

    #[test]
    fn names_that_are_none_are_refused() {
        let dir = TestDir::new();
        let long = "x".repeat(LONGEST + 1);
        for name in ["", ".", "..", ".hidden", "a/b", "a\0b", &long] {
            let error = Draft::create(dir.path(), name).unwrap_err();
            assert!(matches!(error, ImageError::BadName { .. }), "{name}");
        }
    }
}
