//! The audit log as a file: one line of JSON for each call, whoever made it and however it ended.
//!
//! The events are those of `slat_proto::transport` with target `audit`, looks included, which the
//! log on standard error leaves out. The file is bounded ([`slat_record::rotate`]): when it is full
//! it becomes the old one, whose predecessor goes. Who must keep all of it ships it elsewhere, or
//! has it exported as OpenTelemetry logs. A line that cannot be written is said on standard error,
//! once until one can be.
//!
//! One lock, held while a line is written.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use slat_record::rotate::rotate;
use tracing_subscriber::fmt::MakeWriter;

use crate::failure::Failure;

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
            .mode(0o600)
            .open(path);
        let failed = |error: io::Error| {
            Failure::advised(
                format!("cannot write the audit log {}: {error}", path.display()),
                "say another file with --audit-log",
            )
        };
        let file = opened.map_err(failed)?;
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

impl Inner {
    fn write(&self, line: &[u8]) {
        let mut open = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let more = line.len() as u64;
        if open.length > 0
            && open.length.saturating_add(more) > self.limit
            && let Ok(file) = rotate(&self.path)
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
}
