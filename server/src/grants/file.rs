//! Keys on disk: one file a key, in a directory of their own (mode 0700).
//!
//! ```text
//! <from>-<until>.key   PKCS#8, mode 0600: it signs between these milliseconds since 1970
//! <from>-<until>.pub   the public half alone, 32 bytes: its time is over, its last grants may not
//! ```
//! A file is written aside, synced and renamed, so that there is no half of one. What cannot be
//! read as a key is left where it is, and said.

use std::{
    fs::{DirBuilder, File, OpenOptions, Permissions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use slat_trust::grant::Signer;
use zeroize::Zeroizing;

use super::error::GrantsError;

/// Longest file that can be a key.
const LONGEST: u64 = 1024;
/// No key lasts into the year 10000, in milliseconds.
const LAST: u64 = 253_402_300_800_000;

/// What a file holds.
#[derive(Debug)]
pub(super) enum Half {
    Both(Signer),
    Public([u8; 32]),
}

/// One key and when it signs.
#[derive(Debug)]
pub(super) struct Key {
    pub(super) half: Half,
    pub(super) from: SystemTime,
    pub(super) until: SystemTime,
}

impl Key {
    pub(super) fn public_key(&self) -> [u8; 32] {
        match &self.half {
            Half::Both(signer) => signer.public_key(),
            Half::Public(key) => *key,
        }
    }

    pub(super) fn signer(&self) -> Option<&Signer> {
        match &self.half {
            Half::Both(signer) => Some(signer),
            Half::Public(_) => None,
        }
    }

    pub(super) fn file(&self) -> String {
        let ending = match self.half {
            Half::Both(_) => "key",
            Half::Public(_) => "pub",
        };
        format!("{}-{}.{ending}", millis(self.from), millis(self.until))
    }
}

/// Milliseconds since 1970.
pub(super) fn millis(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> GrantsError {
    let path = path.to_owned();
    move |source| GrantsError::Directory { path, source }
}

/// Makes the directory when it is missing, and takes it away from everybody else. What a crash left
/// half written goes.
pub(super) fn make(directory: &Path) -> Result<(), GrantsError> {
    let made = DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory);
    made.and_then(|()| own(directory, 0o700))
        .map_err(failed(directory))?;
    for entry in std::fs::read_dir(directory).map_err(failed(directory))? {
        let path = entry.map_err(failed(directory))?.path();
        if path.extension().is_some_and(|ending| ending == "new") {
            std::fs::remove_file(&path).map_err(failed(&path))?;
        }
    }
    Ok(())
}

/// Takes a file or directory away from everybody else.
fn own(path: &Path, mode: u32) -> io::Result<()> {
    let found = std::fs::metadata(path)?.permissions().mode() & 0o777;
    if found & 0o077 == 0 {
        return Ok(());
    }
    tracing::warn!(path = %path.display(), mode = format_args!("{found:o}"), "others could read the keys that sign grants: not any more");
    std::fs::set_permissions(path, Permissions::from_mode(mode))
}

/// Names of what may be keys, sorted.
pub(super) fn names(directory: &Path) -> Result<Vec<String>, GrantsError> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(failed(directory))? {
        let name = entry.map_err(failed(directory))?.file_name();
        if let Some(name) = name.to_str().filter(|name| times(name).is_some()) {
            names.push(name.to_owned());
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// What a file's name says.
fn times(name: &str) -> Option<(SystemTime, SystemTime, &str)> {
    let (stem, ending) = name.rsplit_once('.')?;
    let (from, until) = stem.split_once('-')?;
    let time = |text: &str| {
        let millis = text.parse().ok().filter(|millis| *millis < LAST)?;
        UNIX_EPOCH.checked_add(Duration::from_millis(millis))
    };
    matches!(ending, "key" | "pub").then_some(())?;
    let (from, until) = (time(from)?, time(until)?);
    (from < until).then_some((from, until, ending))
}

/// Reads a key. `None`: the file is gone, or is none, which is said.
pub(super) fn read(directory: &Path, name: &str) -> Option<Key> {
    let path = directory.join(name);
    match try_read(&path, name) {
        Ok(key) => Some(key),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => {
            tracing::error!(path = %path.display(), %error, "a key that signs grants is left out");
            None
        }
    }
}

fn try_read(path: &Path, name: &str) -> io::Result<Key> {
    let no_key = || io::Error::new(io::ErrorKind::InvalidData, "it is no key");
    let (from, until, ending) = times(name).ok_or_else(no_key)?;
    own(path, 0o600)?;
    if std::fs::metadata(path)?.len() > LONGEST {
        return Err(no_key());
    }
    let bytes = Zeroizing::new(std::fs::read(path)?);
    let half = if ending == "key" {
        Half::Both(Signer::from_pkcs8(&bytes).map_err(|_| no_key())?)
    } else {
        Half::Public(bytes.as_slice().try_into().map_err(|_| no_key())?)
    };
    Ok(Key { half, from, until })
}

/// Writes a key; returns when it is durable.
pub(super) fn write(directory: &Path, key: &Key) -> Result<(), GrantsError> {
    let path = directory.join(key.file());
    let aside = path.with_extension("new");
    let bytes = match &key.half {
        Half::Both(signer) => signer.pkcs8(),
        Half::Public(public) => public.as_slice(),
    };
    let write = || -> io::Result<()> {
        // Left by a crash, perhaps with another mode.
        match std::fs::remove_file(&aside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&aside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&aside, &path)?;
        File::open(directory)?.sync_all()
    };
    write().map_err(failed(&path))
}

/// Removes a key. No effect when there is none.
pub(super) fn remove(directory: &Path, name: &str) -> Result<(), GrantsError> {
    let path = directory.join(name);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(&path)(error)),
        _ => Ok(()),
    }
}
