//! The audit log as a file: one line of JSON for each call, whoever made it and however it ended.
//!
//! The events are those of `slat_proto::transport` with target `audit`, looks included, which the
//! log on standard error leaves out. The file is bounded ([`slat_record::rotate`]): when it is full
//! it becomes the old one, whose predecessor goes. Who must keep all of it ships it elsewhere, or
//! has it exported as OpenTelemetry logs. A line that cannot be written is said on standard error,
//! once until one can be.
//!
//! Both files are for their owner alone, also those that an earlier start left open to others.
//!
//! One lock, held while a line is written.

use std::{
    fs::{File, OpenOptions, Permissions},
    io::{self, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use slat_record::rotate::{old, rotate_as};
use tracing_subscriber::fmt::MakeWriter;

use crate::failure::Failure;

/// Permission bits of both files, and those that are taken from files that are there.
const OWN: u32 = 0o600;
const OTHERS: u32 = 0o077;

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct AuditLog(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    limit: u64,
    file: Mutex<Open>,
}

#[derive(Debug)]
struct Open {
    file: File,
    length: u64,
    failing: bool,
}

impl AuditLog {
    /// At `path`, for its owner alone; each of the two files has `limit` bytes at most.
    pub(crate) fn open(path: &Path, limit: u64) -> Result<Self, Failure> {
        let opened = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(OWN)
            .open(path);
        let failed = |error: io::Error| {
            Failure::advised(
                format!("cannot write the audit log {}: {error}", path.display()),
                "say another file with --audit-log",
            )
        };
        let file = opened.map_err(failed)?;
        narrow(&file).map_err(failed)?;
        match File::open(old(path)) {
            Ok(old) => narrow(&old).map_err(failed)?,
            // None, or another user's, which is that one's to narrow.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied
                ) => {}
            Err(error) => return Err(failed(error)),
        }
        let length = file.metadata().map_err(failed)?.len();
        Ok(Self(Arc::new(Inner {
            path: path.to_owned(),
            limit,
            file: Mutex::new(Open {
                file,
                length,
                failing: false,
            }),
        })))
    }
}

/// Takes from others what they may do with a file. Devices and pipes are not the log's own, nor are
/// files of another user, who has said by their mode who writes them.
fn narrow(file: &File) -> io::Result<()> {
    let metadata = file.metadata()?;
    let mode = metadata.permissions().mode() & 0o7777;
    let is_own = metadata.uid() == rustix::process::geteuid().as_raw();
    if !metadata.is_file() || !is_own || mode & OTHERS == 0 {
        return Ok(());
    }
    file.set_permissions(Permissions::from_mode(mode & !OTHERS))
}

impl Inner {
    fn write(&self, line: &[u8]) {
        let mut open = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let more = line.len() as u64;
        if open.length > 0
            && open.length.saturating_add(more) > self.limit
            && let Ok(file) = rotate_as(&self.path, OWN)
        {
            open.file = file;
            open.length = 0;
        }
        match open.file.write_all(line) {
            Ok(()) => {
                open.length += more;
                open.failing = false;
            }
            Err(error) if !open.failing => {
                open.failing = true;
                // The log itself is what this is called from.
                let words = format!("the audit log {}: {error}\n", self.path.display());
                drop(io::stderr().write_all(words.as_bytes()));
            }
            Err(_) => {}
        }
    }
}

/// Writes whole lines.
#[derive(Debug)]
pub(crate) struct Line<'a>(&'a Inner);

impl io::Write for Line<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.write(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for AuditLog {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_on_where_it_was_and_is_bounded() {
        let dir = slat_test_dir::TestDir::new();
        let path = dir.path().join("audit.log");
        for _ in 0..2 {
            let log = AuditLog::open(&path, 100).unwrap();
            for _ in 0..3 {
                log.make_writer().write_all(&[b'x'; 30]).unwrap();
            }
        }
        let length = |path: &Path| std::fs::metadata(path).unwrap().len();
        assert_eq!(length(&path), 90);
        assert_eq!(length(&slat_record::rotate::old(&path)), 90);
        assert!(AuditLog::open(&path.join("no"), 100).is_err());
    }

    #[test]
    fn it_is_for_its_owner_alone_from_its_first_line_to_its_last() {
        let dir = slat_test_dir::TestDir::new();
        let path = dir.path().join("audit.log");
        let older = old(&path);
        let mode = |path: &Path| {
            let mode = std::fs::metadata(path).unwrap().permissions().mode();
            mode & 0o7777
        };
        // As an earlier start left them.
        for path in [&path, &older] {
            std::fs::write(path, "").unwrap();
            std::fs::set_permissions(path, Permissions::from_mode(0o644)).unwrap();
        }
        let log = AuditLog::open(&path, 100).unwrap();
        assert_eq!((mode(&path), mode(&older)), (0o600, 0o600));
        for _ in 0..4 {
            log.make_writer().write_all(&[b'x'; 60]).unwrap();
            assert_eq!((mode(&path), mode(&older)), (0o600, 0o600));
        }
    }
}
