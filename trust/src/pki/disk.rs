//! Files that are whole or not there: written under another name, synchronised, then renamed. And
//! the lock that lets one command at a time work on a CA.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use rustix::fs::{FlockOperation, Gid, Mode, OFlags, Uid};

use super::PkiError;

/// Modes of what everybody may read, and of private keys.
pub(crate) const PUBLIC: u32 = 0o644;
pub(crate) const PRIVATE: u32 = 0o600;
/// How long another command is waited for, and how often it is looked at.
const PATIENCE: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(20);
/// Locked by who works on the directory.
const LOCK: &str = ".lock";

/// Held until it is dropped.
pub(crate) struct Lock(#[expect(dead_code, reason = "closing it unlocks")] File);

impl Lock {
    pub(crate) fn take(dir: &Path) -> Result<Self, PkiError> {
        let path = dir.join(LOCK);
        let failed = |errno: rustix::io::Errno| PkiError::write(&path, errno);
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = rustix::fs::open(&path, flags, Mode::from_raw_mode(PRIVATE)).map_err(failed)?;
        let until = Instant::now() + PATIENCE;
        loop {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Self(file.into())),
                Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(failed(errno)),
            }
            if Instant::now() >= until {
                return Err(PkiError::Busy(dir.to_owned()));
            }
            thread::sleep(LOOK);
        }
    }
}

/// A directory and those above it.
pub(crate) fn make_dir(dir: &Path, mode: u32) -> Result<(), PkiError> {
    let failed = |error| PkiError::write(dir, error);
    if dir.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(dir).map_err(failed)?;
    fs::set_permissions(dir, fs::Permissions::from_mode(mode)).map_err(failed)
}

/// Makes renames in a directory last.
pub(crate) fn sync_dir(dir: &Path) -> Result<(), PkiError> {
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    synced.map_err(|error| PkiError::write(dir, error))
}

/// Replaces a file. One that takes an older one's place has its owner and group, and its mode as
/// far as `mode` allows the group; a new one has `mode`.
pub(crate) fn replace(
    dir: &Path,
    name: &str,
    content: &[u8],
    mode: u32,
    like: Option<&fs::Metadata>,
) -> Result<(), PkiError> {
    let path = dir.join(name);
    let temporary = dir.join(format!(".{name}.new"));
    let written =
        write_new(&temporary, content, mode, like).and_then(|()| fs::rename(&temporary, &path));
    if let Err(error) = written {
        // What is half written is of no use, and would be overwritten by the next.
        let _ = fs::remove_file(&temporary);
        return Err(PkiError::write(&path, error));
    }
    sync_dir(dir)
}

fn write_new(
    path: &Path,
    content: &[u8],
    mode: u32,
    like: Option<&fs::Metadata>,
) -> io::Result<()> {
    // A leftover may be open in another process, or have another mode.
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::from_raw_mode(PRIVATE))?;
    let mut file = File::from(file);
    file.write_all(content)?;
    let mut mode = mode;
    if let Some(like) = like {
        let own = file.metadata()?;
        if (own.uid(), own.gid()) != (like.uid(), like.gid()) {
            let (uid, gid) = (Uid::from_raw(like.uid()), Gid::from_raw(like.gid()));
            rustix::fs::fchown(&file, Some(uid), Some(gid))?;
        }
        // A group that could read the old one can read the new one; nobody else.
        mode |= like.mode() & 0o040;
    }
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    file.sync_all()
}

/// What stands at a path, if anything does.
pub(crate) fn metadata(path: &Path) -> Option<fs::Metadata> {
    fs::metadata(path).ok()
}

/// Removes what need not be there.
pub(crate) fn remove(path: &Path) -> Result<(), PkiError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(PkiError::write(path, error)),
        _ => Ok(()),
    }
}
