//! What was issued, one JSON file for each certificate: `issued/SERIAL.json`. A record is written
//! before its certificate is given out, so none is in use that cannot be revoked.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};

use super::{
    PkiError,
    disk::{PUBLIC, make_dir, replace},
};
use crate::{Identity, TrustError, files::read_bounded};

/// Where they are, below the CA's directory.
const FOLDER: &str = "issued";
/// Bytes of one.
const MAX_RECORD: u64 = 64 << 10;

/// A certificate that was issued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Issued {
    /// Its serial number, in hexadecimal digits.
    pub serial: String,
    /// Whose it is.
    pub identity: Identity,
    /// The root that it was issued under, by the root's serial number.
    pub root: String,
    /// When it begins to be valid.
    pub not_before: SystemTime,
    /// When it ends to be valid.
    pub not_after: SystemTime,
    /// When it was revoked.
    pub revoked: Option<SystemTime>,
    /// The serial number of the one that a renewal put into its place.
    pub replaced_by: Option<String>,
}

/// As it stands in the file; times in seconds since 1970.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    serial: String,
    identity: String,
    root: String,
    not_before: u64,
    not_after: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    revoked: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    replaced_by: Option<String>,
}

pub(crate) fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH
        .checked_add(Duration::from_secs(seconds))
        .unwrap_or(SystemTime::UNIX_EPOCH)
}

/// Whether a text may be a serial number, and so a file's name.
pub(crate) fn is_serial(text: &str) -> bool {
    (1..=40).contains(&text.len())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

impl Issued {
    /// Whether it may be in use at a time: not revoked, not over and not renewed.
    #[must_use]
    pub fn is_in_use(&self, now: SystemTime) -> bool {
        self.revoked.is_none() && self.replaced_by.is_none() && self.not_after >= now
    }

    pub(crate) fn write(&self, ca: &Path) -> Result<(), PkiError> {
        let dir = ca.join(FOLDER);
        make_dir(&dir, 0o755)?;
        let line = Line {
            serial: self.serial.clone(),
            identity: self.identity.to_string(),
            root: self.root.clone(),
            not_before: seconds(self.not_before),
            not_after: seconds(self.not_after),
            revoked: self.revoked.map(seconds),
            replaced_by: self.replaced_by.clone(),
        };
        let mut json =
            serde_json::to_vec_pretty(&line).map_err(|error| PkiError::Make(error.to_string()))?;
        json.push(b'\n');
        replace(&dir, &format!("{}.json", self.serial), &json, PUBLIC, None)
    }

    fn read(path: &Path) -> Result<Self, PkiError> {
        let bad = |why: String| PkiError::Record {
            path: path.to_owned(),
            why,
        };
        let bytes = read_bounded(path, MAX_RECORD, false)?;
        let line: Line = serde_json::from_slice(&bytes).map_err(|error| bad(error.to_string()))?;
        let named = path.file_stem().and_then(|stem| stem.to_str());
        if !is_serial(&line.serial) || named != Some(&line.serial) {
            return Err(bad("its serial number is not its name".to_owned()));
        }
        let identity = line.identity.parse();
        Ok(Self {
            serial: line.serial,
            identity: identity.map_err(|error: crate::IdentityError| bad(error.to_string()))?,
            root: line.root,
            not_before: at(line.not_before),
            not_after: at(line.not_after),
            revoked: line.revoked.map(at),
            replaced_by: line.replaced_by,
        })
    }

    /// All of a CA, the oldest first.
    pub(crate) fn all(ca: &Path) -> Result<Vec<Self>, PkiError> {
        let dir = ca.join(FOLDER);
        let mut all = Vec::new();
        for path in paths(&dir)? {
            all.push(Self::read(&path)?);
        }
        all.sort_by(|a, b| (a.not_before, &a.serial).cmp(&(b.not_before, &b.serial)));
        Ok(all)
    }

    /// The one with a serial number.
    pub(crate) fn find(ca: &Path, serial: &str) -> Result<Option<Self>, PkiError> {
        if !is_serial(serial) {
            return Ok(None);
        }
        match Self::read(&ca.join(FOLDER).join(format!("{serial}.json"))) {
            Ok(found) => Ok(Some(found)),
            Err(PkiError::Read(TrustError::Missing(_))) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Files of records; what a writer left half done begins with a dot.
fn paths(dir: &Path) -> Result<Vec<PathBuf>, PkiError> {
    let failed = |source| {
        PkiError::Read(TrustError::Read {
            path: dir.to_owned(),
            source,
        })
    };
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        if name.is_some_and(|name| name.ends_with(".json") && !name.starts_with('.')) {
            paths.push(path);
        }
    }
    Ok(paths)
}
